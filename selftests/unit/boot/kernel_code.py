# SPDX-License-Identifier: GPL-2.0-only
"""Other machine code in a module of the kernel's, for kernels that were booted to be broken."""

import ctypes
import io
import os
import struct

from elftools.elf.elffile import ELFFile
from elftools.elf.relocation import RelocationSection
from elftools.elf.sections import SymbolTableSection

from runner.guest_init import FINIT_MODULE

RETURN_0 = b"\x31\xc0\xc3"
# What may come first in a function of the kernel's, and stays
_ENDBR64, _CALL, _CALL_SIZE = b"\xf3\x0f\x1e\xfa", 0xE8, 5
_R_X86_64_NONE = 0
RELA_SIZE = 24
# What a module ends with that has a signature, which does not fit any more (kernel/module/signing.c)
_SIGNED = b"~Module signature appended~\n"
_DELETE_MODULE = {"x86_64": 176}
_LIBC = ctypes.CDLL(None, use_errno=True)


def function_names(module: bytearray) -> set[str]:
    """The names that *module*, an ELF file, has."""
    symbols = ELFFile(io.BytesIO(bytes(module))).get_section_by_name(".symtab")
    assert isinstance(symbols, SymbolTableSection)
    return {symbol.name for symbol in symbols.iter_symbols()}


def replace_function(module: bytearray, name: str, code: bytes) -> tuple[int, int]:
    """Have function *name* of *module*, an ELF file, begin with *code*.

    :returns: the section that the code is in, and where in there
    """
    elf = ELFFile(io.BytesIO(bytes(module)))
    symbols = elf.get_section_by_name(".symtab")
    assert isinstance(symbols, SymbolTableSection)
    (symbol,) = symbols.get_symbol_by_name(name) or []
    where, section = symbol["st_value"], elf.get_section(symbol["st_shndx"])
    start = section["sh_offset"] + where
    skipped = len(_ENDBR64) if module.startswith(_ENDBR64, start) else 0
    skipped += _CALL_SIZE if module[start + skipped] == _CALL else 0  # to __fentry__, which ftrace insists on
    where, start = where + skipped, start + skipped
    module[start : start + len(code)] = code
    relocations = elf.get_section_by_name(f".rela{section.name}")
    assert isinstance(relocations, RelocationSection)
    for index, relocation in enumerate(relocations.iter_relocations()):
        # The kernel would write the addresses that the old code wanted into the new one.
        if where - 4 < relocation["r_offset"] < where + len(code):
            struct.pack_into("<Q", module, relocations["sh_offset"] + index * RELA_SIZE + 8, _R_X86_64_NONE)
    return symbol["st_shndx"], where


def load_module(module: bytes, arguments: str = "") -> None:
    """Load *module*, whose signature is gone."""
    file = os.memfd_create("module")
    os.write(file, module.removesuffix(_SIGNED))
    _check(_LIBC.syscall(FINIT_MODULE["x86_64"], file, arguments.encode(), 0), "module does not load")
    os.close(file)


def unload_module(name: str) -> None:
    """Unload the module *name*, which nobody may be using."""
    _check(_LIBC.syscall(_DELETE_MODULE["x86_64"], name.encode(), os.O_NONBLOCK), f"{name} does not unload")


def _check(status: int, what: str) -> None:
    if status:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")
