# SPDX-License-Identifier: GPL-2.0-only
"""Tests that break the kernel they run in, for test_check_kernel.py, which boots one for each.

They are collected only if they are named, and fail at once outside such a kernel.
"""

import io
import os
import signal
import struct
import time
from pathlib import Path

import pytest
from elftools.elf.elffile import ELFFile
from elftools.elf.relocation import RelocationSection
from elftools.elf.sections import SymbolTableSection

from dirty_tracking.cell import Cell, Settings
from dirty_tracking.dirty_log_run import DirtyLogRun
from kvm_util.kvm import Kvm
from kvm_util.vm import Vm
from runner.guest_init import JOB
from selftests.unit.boot.kernel_code import RELA_SIZE, RETURN_0, load_module, replace_function
from selftests.unit.mutants.faults import falsify_bitmaps

# Machine code that takes the place of a module's init function
UD2 = b"\x0f\x0b"  # WARN() where the address is in the table of such places, an invalid opcode elsewhere
# include/linux/bug.h, arch/x86/include/asm/bug.h: an entry has two relative addresses, the line and the flags
BUGFLAG_WARNING = 1
BUG_ENTRY = 12


@pytest.fixture(autouse=True)
def only_in_a_machine_of_its_own() -> None:
    if os.getppid() != 1 or not Path(JOB).exists():
        pytest.fail("this test breaks the kernel: it runs only in one that was booted for it")


def test_before() -> None:
    """A test that passes before the kernel breaks."""


def test_panic() -> None:
    Path("/proc/sysrq-trigger").write_text("c")


def test_oops() -> None:
    load_module_with(UD2, warn=False)


def test_warn() -> None:
    load_module_with(UD2 + RETURN_0, warn=True)


def test_hang() -> None:
    time.sleep(1e6)


def test_killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.threads
def test_lost(kvm: Kvm, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """KVM's bitmap is falsified: the first page that was written is not reported."""

    def lose_the_first(_vm: Vm, _slot: int, bitmap: bytearray) -> None:
        first = next((index for index, byte in enumerate(bitmap) if byte), None)
        if first is not None:
            bitmap[first] &= bitmap[first] - 1

    falsify_bitmaps(monkeypatch, lose_the_first)
    cell = Cell("dirty-log", "48bit-4k", "anonymous", "cooperative", "sparse", 1)
    with DirtyLogRun(kvm, cell, settings) as run:
        run.run()


def test_fails() -> None:
    pytest.fail("on purpose")


def test_ends_all() -> None:
    """The session exits with status 0 before its last test."""
    os._exit(0)


def test_int3() -> None:
    """An oops at an unknown breakpoint, as a fault of the emulator at a static key causes it."""
    load_module_with(b"\xcc" + RETURN_0, warn=False)


def test_after() -> None:
    """A test that does not run if the kernel died before."""


def load_module_with(code: bytes, warn: bool) -> None:
    """Load a copy of kvm_amd under another name, whose init function is *code*.

    :param warn: whether the address of *code* is in the table of WARN()s
    """
    data = bytearray(Path("/modules/kvm_amd.ko").read_bytes())
    section, where = replace_function(data, "init_module", code)
    elf = ELFFile(io.BytesIO(bytes(data)))
    if warn:
        symbols = elf.get_section_by_name(".symtab")
        bugs, places = elf.get_section_by_name("__bug_table"), elf.get_section_by_name(".rela__bug_table")
        assert isinstance(symbols, SymbolTableSection)
        assert bugs is not None
        assert isinstance(places, RelocationSection)
        offset = bugs["sh_offset"] + BUG_ENTRY - 2
        (flags,) = struct.unpack_from("<H", data, offset)
        struct.pack_into("<H", data, offset, flags | BUGFLAG_WARNING)
        section_symbol = next(
            number
            for number, symbol in enumerate(symbols.iter_symbols())
            if symbol["st_info"]["type"] == "STT_SECTION" and symbol["st_shndx"] == section
        )
        first = next(i for i, place in enumerate(places.iter_relocations()) if place["r_offset"] == 0)
        # Keep the kind of the relocation, but count from the init function's section.
        entry = places["sh_offset"] + first * RELA_SIZE
        (info,) = struct.unpack_from("<Q", data, entry + 8)
        struct.pack_into("<QQ", data, entry + 8, section_symbol << 32 | info & 0xFFFFFFFF, where)
    this_module = elf.get_section_by_name(".gnu.linkonce.this_module")
    assert this_module is not None
    name = data.index(b"kvm_amd\0", this_module["sh_offset"])
    data[name : name + 8] = b"kvm_bad\0"
    load_module(bytes(data))
