# SPDX-License-Identifier: GPL-2.0-only
"""The page sizes with which KVM maps a VM's memory: by its statistics, and as a memslot allows."""

from dataclasses import dataclass

from kvm_util.arch import current as arch
from kvm_util.binary_stats import BinaryStats
from kvm_util.memory import GIB, KIB, MIB, align_down, align_up
from kvm_util.vm import Memslot

STATISTICS = {4 * KIB: "pages_4k", 2 * MIB: "pages_2m", GIB: "pages_1g"}


@dataclass(frozen=True)
class MappingSizes:
    """How many mappings of each size KVM has for a VM, over all memslots (pages_4k, pages_2m, pages_1g)."""

    pages_4k: int
    pages_2m: int
    pages_1g: int

    @classmethod
    def read(cls, stats: BinaryStats) -> "MappingSizes":
        """Read them from the VM's statistics."""
        return cls(*(stats.value(name) for name in STATISTICS.values()))

    def huge(self, size: int) -> int:
        """How many pages of *size* bytes are mapped."""
        return int(getattr(self, STATISTICS[size]))

    def __str__(self) -> str:
        return f"{self.pages_4k} of 4 KiB, {self.pages_2m} of 2 MiB, {self.pages_1g} of 1 GiB"


def huge_pages(memslot: Memslot, size: int) -> list[range]:
    """The huge pages of *size* bytes that lie in *memslot* as a whole, each as the range of its page numbers in the slot.

    KVM maps no huge page of which only a part is in the slot (``kvm_alloc_memslot_metadata()``, arch/x86/kvm/x86.c).
    """
    end = align_down(memslot.gpa + memslot.memory.size, size)
    first = (align_up(memslot.gpa, size) - memslot.gpa) // arch.PAGE_SIZE
    step = size // arch.PAGE_SIZE
    return [range(page, page + step) for page in range(first, (end - memslot.gpa) // arch.PAGE_SIZE, step)]
