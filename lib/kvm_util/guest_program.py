# SPDX-License-Identifier: GPL-2.0-only
"""Guest programs: assembles ``guest_code/<arch>/*.S`` and loads the resulting ELF files."""

import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from elftools.elf.elffile import ELFFile
from elftools.elf.sections import SymbolTableSection

from kvm_util.arch import current as arch
from kvm_util.memory import MIB

_CHECKOUT = Path(__file__).resolve().parents[2]
SOURCES = _CHECKOUT / "guest_code" / arch.NAME
# A folder with all programs, assembled elsewhere by another toolchain (kselftest/Makefile)
_PREBUILT = os.environ.get("DIRTY_LOG_GUEST_CODE")
OUTPUT = Path(_PREBUILT) if _PREBUILT else _CHECKOUT / "build" / "guest_code" / arch.NAME

# Programs are linked for this address, and nothing is below it: those pages are not mapped.
LOAD_ADDRESS = 2 * MIB
ENTRY_SYMBOL = "guest_main"


class GuestProgramError(Exception):
    """A guest program cannot be built or loaded; the message says what to do."""


@dataclass(frozen=True)
class GuestProgram:
    """A program to load: its segments as (gpa, contents, size in memory) and the addresses of its symbols."""

    name: str
    segments: tuple[tuple[int, bytes, int], ...]
    symbols: dict[str, int]

    @property
    def end(self) -> int:
        """The first address after the program."""
        return max(address + size for address, _, size in self.segments)

    @classmethod
    @cache
    def load(cls, name: str) -> "GuestProgram":
        """Load the assembled program *name*; cached.

        :raises GuestProgramError: it has not been assembled
        """
        path = OUTPUT / f"{name}.elf"
        try:
            return cls._read(name, path)
        except FileNotFoundError:
            raise GuestProgramError(f"guest program {path} does not exist: run make guest_code") from None

    @classmethod
    def from_source(cls, name: str, text: str) -> "GuestProgram":
        """Assemble *text*, which may include ``guest.inc``; for a program that is not in ``guest_code/``.

        :param name: what reports call the program
        :raises GuestProgramError: when there is no assembler, or it rejects the program
        """
        with tempfile.TemporaryDirectory() as folder:
            source, target = Path(folder) / f"{name}.S", Path(folder) / f"{name}.elf"
            source.write_text(text)
            assemble(source, target)
            return cls._read(name, target)

    @classmethod
    def _read(cls, name: str, path: Path) -> "GuestProgram":
        with path.open("rb") as file:
            elf = ELFFile(file)
            segments = tuple(
                (segment["p_vaddr"], segment.data(), segment["p_memsz"]) for segment in elf.iter_segments("PT_LOAD")
            )
            table = elf.get_section_by_name(".symtab")
            assert isinstance(table, SymbolTableSection)  # ld writes one unless it is told to strip
            symbols = {symbol.name: symbol["st_value"] for symbol in table.iter_symbols()}
            return cls(name, segments, symbols)


def assemble_all() -> None:
    """Build every program that is missing or older than its sources; none if another toolchain has built them.

    :raises GuestProgramError: binutils are missing, or reject a program
    """
    if _PREBUILT:
        if not [*OUTPUT.glob("*.elf")]:
            raise GuestProgramError(f"no guest programs in {OUTPUT} (DIRTY_LOG_GUEST_CODE): build them with make")
        return
    for source in sorted(SOURCES.glob("*.S")):
        assemble(source, OUTPUT / f"{source.stem}.elf")


def assemble(source: Path, target: Path) -> None:
    """Build one program if it is missing, or older than *source*, the ``*.inc`` files next to it, or this module.

    :raises GuestProgramError: binutils are missing, or reject the program
    """
    sources = (source, *source.parent.glob("*.inc"), Path(__file__))
    newest = max(path.stat().st_mtime_ns for path in sources)
    if target.exists() and target.stat().st_mtime_ns >= newest:
        return
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise GuestProgramError(f"{target.parent} cannot be created: {error.strerror}") from None
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:  # another process may build the same program
        object_file, linked = Path(folder) / "object", Path(folder) / "linked"
        _tool("as", "-I", str(source.parent), "-I", str(SOURCES), "-o", str(object_file), str(source))
        _tool(
            *("ld", "-nostdlib", "-static", "-z", "noexecstack", "-z", f"max-page-size={arch.PAGE_SIZE}"),
            *(f"-Ttext-segment={LOAD_ADDRESS:#x}", "-e", ENTRY_SYMBOL, "-o", str(linked), str(object_file)),
        )
        linked.replace(target)  # atomically: another process may be loading it


def _tool(name: str, *arguments: str) -> None:
    program = shutil.which(name)
    if program is None:
        raise GuestProgramError(f"no {name} on this machine: install binutils (apt install binutils, or gcc)")
    done = subprocess.run([program, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise GuestProgramError(f"{name} failed:\n{done.stderr.strip()}")
