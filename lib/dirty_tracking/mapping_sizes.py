# SPDX-License-Identifier: GPL-2.0-only
"""The page sizes with which KVM maps a VM's memory: by its statistics, and as a memslot allows."""

from dataclasses import dataclass

from kvm_util.arch import current as arch
from kvm_util.binary_stats import BinaryStats
from kvm_util.memory import HOST_PAGE_SIZE, align_down, align_up, size_text
from kvm_util.vm import Memslot


@dataclass(frozen=True)
class MappingSizes:
    """How many mappings of each size in bytes KVM has for a VM, over all memslots."""

    counts: dict[int, int]

    @classmethod
    def read(cls, stats: BinaryStats) -> "MappingSizes":
        """Read them from the VM's statistics."""
        return cls({size: stats.value(name) for size, name in arch.MAPPING_STATISTICS.items()})

    def __str__(self) -> str:
        return ", ".join(f"{count} of {size_text(size)}" for size, count in self.counts.items())


def huge_pages(memslot: Memslot, size: int) -> list[range]:
    """The huge pages of *size* bytes that lie in *memslot* as a whole, each as the range of its page numbers in the slot.

    KVM maps no huge page of which only a part is in the slot (``kvm_alloc_memslot_metadata()``, arch/x86/kvm/x86.c).
    """
    end = align_down(memslot.gpa + memslot.memory.size, size)
    first = (align_up(memslot.gpa, size) - memslot.gpa) // HOST_PAGE_SIZE
    step = size // HOST_PAGE_SIZE
    return [range(page, page + step) for page in range(first, (end - memslot.gpa) // HOST_PAGE_SIZE, step)]
