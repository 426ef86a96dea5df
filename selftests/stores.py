# SPDX-License-Identifier: GPL-2.0-only
"""What the tests of single writes share: a VM with two logged memslots side by side, and checks of one store in them."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import pytest

from dirty_tracking.scripted_vm import Operation, ScriptedVm
from dirty_tracking.vm import FIRST_GPA, GVA_OFFSET, PAGE
from kvm_util.guest import GuestError

SLOT, NEIGHBOUR = 1, 2
NPAGES = 24
WRITTEN = 5
# A guest-virtual address that nothing else uses, for mappings with other permissions
SPARE_GVA = FIRST_GPA + GVA_OFFSET + (1 << 36)

SkipUnemulated = Callable[[str], AbstractContextManager[None]]
MaxEntries = Callable[[int], int]


def add_loaded_slots(vm: ScriptedVm) -> None:
    """Add two logged memslots side by side, and have the guest read all of their pages."""
    vm.add_slot(SLOT, FIRST_GPA, NPAGES)
    vm.add_slot(NEIGHBOUR, FIRST_GPA + NPAGES * PAGE, NPAGES)
    vm.run(*(Operation("load", vm.address(slot, page)) for slot in (SLOT, NEIGHBOUR) for page in range(NPAGES)))
    vm.assert_dirty("loads of all pages", {})


@dataclass(frozen=True)
class Store:
    """An operation that writes *size* bytes at its address.

    :ivar aligned: it faults unless its address is a multiple of its size, and so never straddles two pages
    :ivar exchanges: it writes its value only where memory holds its count
    """

    name: str
    size: int
    value: int = 0xA5
    count: int = 0
    aligned: bool = False
    exchanges: bool = False

    def __str__(self) -> str:
        return self.name

    @property
    def straddles(self) -> bool:
        """Whether it can write to two pages."""
        return not self.aligned and self.size > 1

    @property
    def writes(self) -> int:
        """How many writes it makes to a page at most."""
        return max(1, self.count if self.name.startswith("rep_") else 1)


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


def check_store_in_page(vm: ScriptedVm, skip_unemulated: SkipUnemulated, max_entries: MaxEntries, store: Store) -> None:
    """*store* at a page's beginning and at its very end."""
    for offset in (0, PAGE - store.size):
        with skip_unemulated(store.name):
            check_store_twice(vm, store, offset, [WRITTEN], max_entries(store.writes))


def check_store_across_boundary(vm: ScriptedVm, max_entries: MaxEntries, store: Store) -> None:
    """*store* to two pages of a memslot, and to the last page of one memslot and the first page of the next."""
    most = max_entries(store.writes)
    check_store_twice(vm, store, PAGE - store.size // 2, [WRITTEN, WRITTEN + 1], most)
    vm.run(Operation(store.name, vm.address(NEIGHBOUR, 0, -(store.size // 2)), store.value, store.count))
    vm.assert_dirty(f"{store} across the end of a memslot", {SLOT: [NPAGES - 1], NEIGHBOUR: [0]}, most)


def check_faulting_store(vm: ScriptedVm, skip_unemulated: SkipUnemulated, operation: Operation) -> None:
    """*operation* to a page that the guest's own page tables make read-only."""
    vm.guest.page_tables.map(SPARE_GVA, FIRST_GPA, NPAGES * PAGE, writable=False)
    before = bytes(vm.vm.memslots[SLOT].memory.view)
    with skip_unemulated(operation.name), pytest.raises(GuestError, match="#PF"):
        vm.run(replace(operation, address=SPARE_GVA + WRITTEN * PAGE))
    vm.assert_dirty(f"{operation.name} to a page that is read-only in the guest", {})
    assert bytes(vm.vm.memslots[SLOT].memory.view) == before, "the store changed memory"


def check_fault_in_second_page(
    vm: ScriptedVm, skip_unemulated: SkipUnemulated, emulates: bool, boundary_gva: int, operation: Operation
) -> None:
    """*operation* from the last bytes before *boundary_gva* to the page behind it, where it faults."""
    before = bytes(vm.vm.memslots[SLOT].memory.view)
    with skip_unemulated(operation.name), pytest.raises(GuestError, match="#PF"):
        vm.run(replace(operation, address=boundary_gva - 4))
    changed = vm.changed_pages(SLOT, before)
    # KVM's emulator writes the first page before it looks at the second (emulator_read_write(), arch/x86/kvm/x86.c).
    assert emulates or not changed, f"a store that faulted changed pages {changed}"
    report = vm.collect()
    dirty = report.dirty(SLOT)
    assert set(changed) <= dirty <= {WRITTEN}, f"pages {changed} changed, and KVM reports {sorted(dirty)}"
    assert not report.dirty(NEIGHBOUR), "KVM reports pages of the other memslot"


def check_no_write(vm: ScriptedVm, name: str) -> None:
    """The operation *name* on each page dirties none, and a later store is still logged."""
    vm.run(*(Operation(name, vm.address(SLOT, page)) for page in range(NPAGES)))
    vm.assert_dirty(name, {})
    vm.write(SLOT, WRITTEN)
    vm.assert_dirty(f"a store after {name}", {SLOT: [WRITTEN]})
