# SPDX-License-Identifier: GPL-2.0-only
"""Checks of an emulated CPU: QEMU boots emulator_probe.S in place of a kernel, which runs guests as KVM does."""

import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kvm_util.guest_program import GuestProgramError, assemble
from runner.arch import this_arch
from runner.errors import CannotTest

SOURCE = Path(__file__).with_suffix(".S")
OUTPUT = SOURCE.parent.parent / "build" / "runner" / "emulator_probe.elf"
# It takes half a second on an idle host.
_TIMEOUT = 60.0

_VMMCALL, _XSETBV, _NESTED_PAGE_FAULT = 0x81, 0x8D, 0x400
# The first page of the guest's test memory, and the guest's table for it: the probe's TEST and GUEST_TABLE
_TEST, _TABLE = 0x400000, 0x5FF000
# The error code of a nested page fault: for the final access, or for one to the guest's page tables
_FINAL, _WALK = 1 << 32, 1 << 33
_PRESENT, _WRITE, _USER = 1 << 0, 1 << 1, 1 << 2
_ACCESSED, _DIRTY = 1 << 5, 1 << 6
_GUEST_ENTRY = _PRESENT | _WRITE
_NESTED_ENTRY = _PRESENT | _WRITE | _USER
_NESTED_SHIFT = 12


@dataclass(frozen=True)
class _Check:
    """A check of the probe, with the answer of a correct CPU.

    :ivar answer: EXITCODE, EXITINFO1 and EXITINFO2 of the guest's exit, and a value of the check's own
    :ivar wrong: what another answer means
    """

    name: str
    answer: tuple[int, int, int, int]
    wrong: str


def _completed(value: int = 0) -> tuple[int, int, int, int]:
    """The answer of a guest that ran to its VMMCALL."""
    return (_VMMCALL, 0, 0, value)


def _fault(information: int, address: int, value: int = 0) -> tuple[int, int, int, int]:
    """The answer of a guest that took a nested page fault."""
    return (_NESTED_PAGE_FAULT, information | _USER, address, value)


CHECKS = (
    _Check("plain", _completed(), "a guest without nested paging does not run"),
    _Check("nested", _completed(), "a guest with nested paging does not run"),
    _Check(
        "xsetbv",
        (_XSETBV, 0, 0, 1),
        "a guest sets XCR0 behind KVM's back (XSETBV is not intercepted): KVM then switches AVX off under it",
    ),
    _Check("avx-store", _completed(1), "a store of 32 bytes by a guest fails"),
    _Check("avx-store-nested", _completed(1), "a store of 32 bytes by a guest with nested paging fails"),
    _Check(
        "load-marks",
        _completed(_NESTED_ENTRY << _NESTED_SHIFT | _GUEST_ENTRY | _ACCESSED),
        "a load does not set just the accessed bit of the guest's page table",
    ),
    _Check(
        "store-marks",
        _completed(_NESTED_ENTRY << _NESTED_SHIFT | _GUEST_ENTRY | _ACCESSED | _DIRTY),
        "a store does not set accessed and dirty bit of the guest's page table",
    ),
    _Check(
        "load-marks-nested",
        _completed((_NESTED_ENTRY | _ACCESSED) << _NESTED_SHIFT | _GUEST_ENTRY | _ACCESSED),
        "a load does not set just the accessed bits of the guest's and the nested page table",
    ),
    _Check(
        "store-marks-nested",
        _completed((_NESTED_ENTRY | _ACCESSED | _DIRTY) << _NESTED_SHIFT | _GUEST_ENTRY | _ACCESSED | _DIRTY),
        "a store does not set accessed and dirty bit of the guest's and the nested page table",
    ),
    _Check(
        "store-protected-again",
        _fault(_FINAL | _PRESENT | _WRITE, _TEST),
        "a store to a page that was write-protected after an earlier one does not fault as it should",
    ),
    _Check("load-protected", _completed(), "a load from a write-protected page fails"),
    _Check(
        "failed-exchange-protected",
        _fault(_FINAL | _PRESENT | _WRITE, _TEST),
        "a compare-and-exchange that fails is not the write to a write-protected page that it should be",
    ),
    _Check(
        "string-store-protected",
        _fault(_FINAL | _PRESENT | _WRITE, _TEST + 0x1000, value=1),
        "a string store does not fault at the write-protected page that it comes to",
    ),
    _Check("load-absent", _fault(_FINAL, _TEST), "a load from a page that is not mapped does not fault as it should"),
    _Check(
        "walk-protected",
        _fault(_WALK | _PRESENT | _WRITE, _TABLE),
        "setting a bit in a write-protected page table of the guest does not fault as it should",
    ),
    _Check("real-mode-nested", _completed(), "a guest in real mode is not behind the nested page tables"),
)


def probe(command: Sequence[str], cpu_model: str, accel: str) -> dict[str, str]:
    """Find the faults of an emulated CPU that the suite would take for those of the kernel.

    :param command: starts QEMU, without the options of a machine
    :param cpu_model: as ``-cpu`` takes it; features that it lacks are not checked
    """
    try:
        assemble(SOURCE, OUTPUT)
    except GuestProgramError as error:
        raise CannotTest(f"the emulator's probe cannot be assembled: {error}") from None
    machine = (
        *("-machine", this_arch().machine, "-accel", accel, "-cpu", cpu_model, "-m", "64M"),
        *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
        *("-debugcon", "stdio", "-device", "isa-debug-exit,iobase=0xf4,iosize=4"),
        *("-kernel", str(OUTPUT)),
    )
    try:
        done = subprocess.run(
            [*command, *machine], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_TIMEOUT
        )
    except OSError as error:
        raise CannotTest(f"{command[0]} does not run: {error.strerror}") from None
    except subprocess.TimeoutExpired as error:
        output = (error.stdout or b"").decode(errors="replace")
        return evaluate(output, f"no end within {_TIMEOUT:g} s")
    errors = done.stderr.strip().splitlines()
    return evaluate(done.stdout, errors[-1] if errors else f"the machine ended, with status {done.returncode}")


def evaluate(output: str, end: str) -> dict[str, str]:
    """The checks that failed, by the output of the probe.

    :param end: how the probe ended, in case its output is incomplete
    """
    lines = output.splitlines()
    if not lines:
        raise CannotTest(f"the emulator's probe gave no answer: {end}")
    if lines[0] == "svm absent":
        raise CannotTest(
            "this CPU model cannot run guests: it has no SVM, AMD's virtualization (add +svm to --cpu-model)"
        )
    failed = {}
    remaining = iter(lines)
    for check in CHECKS:
        line = next(remaining, "")
        if line == f"{check.name} absent":
            continue
        if line == f"{check.name}= " + " ".join(f"{number:016x}" for number in check.answer):
            continue
        name, _, numbers = line.partition("= ")
        if name != check.name or not numbers:
            failed[check.name] = f"the machine broke down: {end}"
            break
        found = ", ".join(f"{int(number, 16):#x}" for number in numbers.split())
        wanted = ", ".join(f"{number:#x}" for number in check.answer)
        failed[check.name] = f"{check.wrong} (exit code, its information and value: {found}; right: {wanted})"
    return failed
