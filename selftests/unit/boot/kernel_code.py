# SPDX-License-Identifier: GPL-2.0-only
"""Replacing machine code in a kernel module, to break a kernel that was booted for it (x86_64)."""

import ctypes
import io
import os
import struct

from elftools.elf.elffile import ELFFile
from elftools.elf.relocation import RelocationSection
from elftools.elf.sections import SymbolTableSection

RETURN_0 = b"\x31\xc0\xc3"
# Instructions that may start a function of the kernel, and stay
_ENDBR64, _CALL, _CALL_SIZE = b"\xf3\x0f\x1e\xfa", 0xE8, 5
_R_X86_64_NONE = 0
RELA_SIZE = 24
# The end of a signed module; the signature no longer matches (kernel/module/signing.c)
_SIGNED = b"~Module signature appended~\n"
_LIBC = ctypes.CDLL(None, use_errno=True)


def function_names(module: bytearray) -> set[str]:
    """The names in the symbol table of *module*, an ELF file."""
    symbols = ELFFile(io.BytesIO(bytes(module))).get_section_by_name(".symtab")
    assert isinstance(symbols, SymbolTableSection)
    return {symbol.name for symbol in symbols.iter_symbols()}


def replace_function(module: bytearray, name: str, code: bytes) -> tuple[int, int]:
    """Replace the start of function *name* in *module*, an ELF file, by *code*.

    :returns: the number of the section with the code, and its offset there
    """
    elf = ELFFile(io.BytesIO(bytes(module)))
    symbols = elf.get_section_by_name(".symtab")
    assert isinstance(symbols, SymbolTableSection)
    (symbol,) = symbols.get_symbol_by_name(name) or []
    where, section = symbol["st_value"], elf.get_section(symbol["st_shndx"])
    start = section["sh_offset"] + where
    skipped = len(_ENDBR64) if module.startswith(_ENDBR64, start) else 0
    skipped += _CALL_SIZE if module[start + skipped] == _CALL else 0  # to __fentry__, which ftrace checks
    where, start = where + skipped, start + skipped
    module[start : start + len(code)] = code
    relocations = elf.get_section_by_name(f".rela{section.name}")
    assert isinstance(relocations, RelocationSection)
    for index, relocation in enumerate(relocations.iter_relocations()):
        # The kernel would relocate the old code's operands within the new code.
        if where - 4 < relocation["r_offset"] < where + len(code):
            struct.pack_into("<Q", module, relocations["sh_offset"] + index * RELA_SIZE + 8, _R_X86_64_NONE)
    return symbol["st_shndx"], where


def load_module(module: bytes, arguments: str = "") -> None:
    """Load *module* without its signature."""
    data = module.removesuffix(_SIGNED)
    _check(_LIBC.init_module(data, ctypes.c_ulong(len(data)), arguments.encode()), "module does not load")


def unload_module(name: str) -> None:
    """Unload the module *name*, which must be unused."""
    _check(_LIBC.delete_module(name.encode(), os.O_NONBLOCK), f"{name} does not unload")


def _check(status: int, what: str) -> None:
    if status:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")
