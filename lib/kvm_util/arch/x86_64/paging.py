# SPDX-License-Identifier: GPL-2.0-only
"""Guest page tables for any gva-to-gpa mapping, with 4 or 5 levels and pages of 4 KiB, 2 MiB or 1 GiB."""

from array import array
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvm_util.arch.x86_64.vcpu_state import accepts_la57
from kvm_util.memory import GIB, KIB, MIB, align_down

if TYPE_CHECKING:
    from kvm_util.kvm import Kvm

# The guest's smallest page, the size of its page tables
PAGE_SIZE = 4 * KIB
_ENTRIES = 512

# Intel SDM volume 3, "Paging"; AMD APM volume 2, "Page translation and protection"
_PRESENT, _WRITABLE, _USER, _PAGE_SIZE_BIT = 1 << 0, 1 << 1, 1 << 2, 1 << 7
_ADDRESS_MASK = 0x000F_FFFF_FFFF_F000


@dataclass(frozen=True)
class GuestMode:
    """How the guest maps test memory.

    :ivar levels: of the page tables, 4 or 5
    :ivar page_size: in bytes
    """

    name: str
    levels: int
    page_size: int

    def missing(self, kvm: "Kvm") -> str | None:
        """What *kvm* lacks for this mode; None if a vCPU can use it.

        KVM's CPUID has LA57 wherever the CPU has it; a backend may refuse it all the same, as kvm_pvm does.
        """
        cpuid = kvm.supported_cpuid
        if self.levels == 5:
            if not cpuid.has_la57():
                return f"{self.name}: KVM offers no 5-level paging here (CPUID LA57)"
            with kvm.create_vm() as vm:
                if not accepts_la57(vm.create_vcpu(0).fd, cpuid):
                    return f"{self.name}: KVM refuses 5-level paging here (KVM_SET_SREGS with CR4.LA57)"
        if self.page_size == GIB and not cpuid.has_1gib_pages():
            return f"{self.name}: KVM offers no 1 GiB guest pages here (CPUID PDPE1GB)"
        return None


GUEST_MODES = {
    mode.name: mode
    for mode in (
        GuestMode("48bit-4k", 4, 4 * KIB),
        GuestMode("48bit-2m", 4, 2 * MIB),
        GuestMode("48bit-1g", 4, GIB),
        GuestMode("57bit-4k", 5, 4 * KIB),
        GuestMode("57bit-2m", 5, 2 * MIB),
        GuestMode("57bit-1g", 5, GIB),
    )
}


class PageTables:
    """Page tables in guest memory.

    :param levels: 4 or 5; fewer for tables to :meth:`attach` to others
    :param allocate: returns the gpa of a new, zeroed page
    :param words: returns the 512 entries of the table at a gpa
    :param nested: for nested page tables: with NPT all walks are user accesses, with EPT the same bit lets code be executed
        (AMD APM volume 2, "Nested Paging"; Intel SDM volume 3, "The Extended Page Table Mechanism")
    :param leaf: more bits of the entries that map pages
    """

    def __init__(
        self,
        levels: int,
        allocate: Callable[[], int],
        words: Callable[[int], memoryview],
        nested: bool = False,
        leaf: int = 0,
    ) -> None:
        self._levels = levels
        self._table_access = _PRESENT | _WRITABLE | (_USER if nested else 0)
        self._leaf = leaf
        self._allocate = allocate
        self._words = words
        self.root = allocate()

    def map(self, gva: int, gpa: int, size: int, page_size: int = PAGE_SIZE, writable: bool = True) -> None:
        """Map *size* bytes at *gva* to *gpa* with pages of *page_size*.

        The start is rounded down to a whole page, the end up.

        :raises ValueError: *gva* and *gpa* are not congruent modulo *page_size*
        """
        if (gva - gpa) % page_size:
            raise ValueError(f"gva {gva:#x} and gpa {gpa:#x} are not congruent modulo {page_size:#x}")
        start = align_down(gva, page_size)
        access = self._table_access if writable else self._table_access & ~_WRITABLE
        self._map(self.root, self._levels, start, gva + size, gpa - (gva - start), page_size, access)

    def attach(self, gva: int, below: "PageTables") -> None:
        """Let the root entry for *gva* point to *below*, page tables with one level less."""
        span = PAGE_SIZE * _ENTRIES ** (self._levels - 1)
        self._words(self.root)[gva // span % _ENTRIES] = below.root | self._table_access

    def entry(self, gva: int) -> int:
        """The gpa of the entry that maps *gva*, which must be mapped."""
        table, level = self.root, self._levels
        while True:
            index: int = gva // (PAGE_SIZE * _ENTRIES ** (level - 1)) % _ENTRIES
            word = self._words(table)[index]
            if level == 1 or word & _PAGE_SIZE_BIT:
                return table + index * 8
            table, level = word & _ADDRESS_MASK, level - 1

    def _map(self, table: int, level: int, start: int, end: int, gpa: int, page_size: int, access: int) -> None:
        """Fill the entries of *table* that translate [start, end); lower tables are allocated on demand."""
        words = self._words(table)
        span = PAGE_SIZE * _ENTRIES ** (level - 1)
        if span == page_size:
            first = start // span % _ENTRIES
            count = -(-(end - start) // span)
            flags = access | self._leaf | (_PAGE_SIZE_BIT if level > 1 else 0)
            base = gpa | flags
            words[first : first + count] = memoryview(array("Q", range(base, base + count * span, span)))
            return
        while start < end:
            index = start // span % _ENTRIES
            part_end = min(end, align_down(start, span) + span)
            if not words[index]:
                words[index] = self._allocate() | self._table_access
            self._map(words[index] & _ADDRESS_MASK, level - 1, start, part_end, gpa, page_size, access)
            gpa += part_end - start
            start = part_end
