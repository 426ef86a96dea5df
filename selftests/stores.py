# SPDX-License-Identifier: GPL-2.0-only
"""What the tests of single writes share: a VM with two logged memslots side by side, and a check of one store in them."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

from dirty_tracking.scripted_vm import Operation, ScriptedVm
from dirty_tracking.vm import GVA_OFFSET, PAGE
from kvm_util import uapi
from kvm_util.memory import HUGE_PAGE_SIZE
from selftests.decoys import add_decoys, low_memory

SLOT, NEIGHBOUR = 1, 2
NPAGES = 24
WRITTEN = 5
# Where SLOT begins: above slot 0, and so low that the number is a gfn of a CPU with 39 bits of physical address, too
SLOT_GPA = 33 * HUGE_PAGE_SIZE
# A guest-virtual address that nothing else uses, for mappings with other permissions
SPARE_GVA = SLOT_GPA + GVA_OFFSET + (1 << 36)

SkipUnemulated = Callable[[str], AbstractContextManager[None]]
MaxEntries = Callable[[int], int]


def add_loaded_slots(vm: ScriptedVm) -> None:
    """Add two logged memslots side by side, and decoys for the first; have the guest read all of their pages."""
    flags = uapi.KVM_MEM_LOG_DIRTY_PAGES
    vm.vm.add_memory(SLOT, SLOT_GPA, NPAGES * PAGE, flags=flags, make_memory=low_memory)
    vm.map(SLOT_GPA, NPAGES)
    add_decoys(vm, SLOT, WRITTEN, 2)
    vm.add_slot(NEIGHBOUR, SLOT_GPA + NPAGES * PAGE, NPAGES)
    vm.run(*(Operation("load", vm.address(slot, page)) for slot in (SLOT, NEIGHBOUR) for page in range(NPAGES)))
    vm.assert_dirty("loads of all pages", {})


@dataclass(frozen=True)
class Store:
    """An operation that writes *size* bytes at its address.

    :ivar aligned: it faults unless its address is a multiple of its size, and so never straddles two pages
    :ivar exchanges: it writes its value only where memory holds its count
    :ivar writes: how many writes it makes to a page at most
    """

    name: str
    size: int
    value: int = 0xA5
    count: int = 0
    aligned: bool = False
    exchanges: bool = False
    writes: int = 1

    def __str__(self) -> str:
        return self.name

    @property
    def straddles(self) -> bool:
        """Whether it can write to two pages."""
        return not self.aligned and self.size > 1


def check_store_twice(vm: ScriptedVm, store: Store, offset: int, pages: list[int], max_entries: int) -> None:
    """*store* dirties *pages*, with at most *max_entries* ring entries each; a second one with another value does so too."""
    start = WRITTEN * PAGE + offset

    def held() -> int:
        return int.from_bytes(vm.vm.memslots[SLOT].memory.view[start : start + store.size], "little")

    for repetition, value in (("first", store.value), ("second", store.value + 1)):
        count = held() if store.exchanges else store.count
        vm.run(Operation(store.name, vm.address(SLOT, WRITTEN, offset), value, count))
        vm.assert_dirty(f"{repetition} {store} at offset {offset}", {SLOT: pages}, max_entries)
        assert not store.exchanges or held() == value, f"memory holds {held():#x} after {store} of {value:#x}"
