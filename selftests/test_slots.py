# SPDX-License-Identifier: GPL-2.0-only
"""Tracking through a slot's life: switched on and off, moved, deleted and made again, beside others, over huge pages."""

from collections.abc import Callable, Iterator

import pytest

from lib import uapi
from lib.kvm import Kvm
from lib.log_modes import LOG_MODES
from lib.memory import BACKINGS, GIB, MIB
from lib.tracked_vm import FIRST_GPA, PAGE, Operation, TrackedVm

SLOT, BELOW, ABOVE = 1, 2, 3
NPAGES = 64 + 9
ALL = range(NPAGES)
HUGE_NPAGES = 3 * 512 + 7


@pytest.fixture(params=list(LOG_MODES))
def mode(request: pytest.FixtureRequest, needs_log_mode: Callable[[str], None]) -> str:
    needs_log_mode(request.param)
    return str(request.param)


@pytest.fixture
def empty(kvm: Kvm, mode: str) -> Iterator[TrackedVm]:
    with TrackedVm(kvm, mode) as vm:
        yield vm


def switch_on(vm: TrackedVm, slot: int = SLOT) -> None:
    """Switch tracking on, and take the first report where all pages are dirty at first."""
    vm.set_tracking(slot, on=True)
    if vm.mode.initially_set:
        vm.expect("switching tracking on", {slot: range(vm.vm.memslots[slot].npages)})


def test_pages_that_were_mapped_before_are_tracked(empty: TrackedVm) -> None:
    """All of them writable when tracking begins: the first write of each is seen, and not what was before."""
    empty.add_slot(SLOT, FIRST_GPA, NPAGES, tracked=False)
    empty.write(SLOT, *ALL)
    switch_on(empty)
    empty.expect("nothing since tracking began", {})
    empty.write(SLOT, *ALL[::2])
    empty.expect("writes to every second page", {SLOT: ALL[::2]})
    empty.write(SLOT, *ALL[1::2])
    empty.expect("writes to the others", {SLOT: ALL[1::2]})


def test_off_and_on_again(empty: TrackedVm) -> None:
    """What was written while it was off is not told later, nor what was not collected before."""
    empty.add_slot(SLOT, FIRST_GPA, NPAGES)
    for turn in range(4):
        empty.write(SLOT, turn)
        empty.expect("a write", {SLOT: [turn]})
        empty.set_tracking(SLOT, on=False)
        empty.write(SLOT, *range(20, 30))
        switch_on(empty)
        empty.expect("nothing since tracking began again", {})


def test_switching_it_on_twice_loses_nothing(empty: TrackedVm) -> None:
    """The same flags again change nothing."""
    empty.add_slot(SLOT, FIRST_GPA, NPAGES)
    empty.write(SLOT, 3)
    empty.set_tracking(SLOT, on=True)
    empty.write(SLOT, 4)
    empty.expect("writes before and after the same flags", {SLOT: [3, 4]})


def test_neighbours_do_not_leak(empty: TrackedVm) -> None:
    """Slots right below and above, untracked and tracked, written in turn with this one."""
    empty.add_slot(BELOW, FIRST_GPA - NPAGES * PAGE, NPAGES, tracked=False)
    empty.add_slot(SLOT, FIRST_GPA, NPAGES)
    empty.add_slot(ABOVE, FIRST_GPA + NPAGES * PAGE, NPAGES)
    for slot in (BELOW, SLOT, ABOVE):
        empty.write(slot, 0, NPAGES - 1)
    empty.expect("writes to the edges of three slots", {SLOT: [0, NPAGES - 1], ABOVE: [0, NPAGES - 1]})
    empty.set_tracking(ABOVE, on=False)
    for slot in (BELOW, SLOT, ABOVE):
        empty.write(slot, 1)
    empty.expect("writes with one slot tracked", {SLOT: [1]})


def test_deleted_and_made_again(empty: TrackedVm) -> None:
    """A new slot in the same place begins clean, and is tracked from its first write on."""
    memslot = empty.add_slot(SLOT, FIRST_GPA, NPAGES)
    for page in (2, 5):
        empty.write(SLOT, page)
        empty.expect("a write", {SLOT: [page]})
        empty.vm.delete_memory_region(SLOT)
        empty.vm.set_user_memory_region(SLOT, FIRST_GPA, memslot.memory, uapi.KVM_MEM_LOG_DIRTY_PAGES)
        if empty.mode.initially_set:
            empty.expect("making the slot again", {SLOT: ALL})
        empty.expect("nothing in the new slot", {})


def test_moved(empty: TrackedVm) -> None:
    """At its new address it is tracked, from the first write on."""
    memslot = empty.add_slot(SLOT, FIRST_GPA, NPAGES)
    empty.write(SLOT, 2)
    empty.expect("a write before the move", {SLOT: [2]})
    moved = FIRST_GPA + 4 * MIB
    empty.vm.set_user_memory_region(SLOT, moved, memslot.memory, uapi.KVM_MEM_LOG_DIRTY_PAGES)
    empty.map(moved, NPAGES)
    empty.write(SLOT, 2, 3)
    empty.expect("writes after the move", {SLOT: [2, 3]})


@pytest.mark.parametrize("backing", ["anonymous_thp", "anonymous_hugetlb_2mb", "shmem"])
@pytest.mark.parametrize("shift", [0, 3], ids=["aligned", "unaligned"])
def test_huge_pages_are_reported_page_by_page(
    empty: TrackedVm, lacks: Callable[[str], None], backing: str, shift: int
) -> None:
    """Mapped huge before tracking began: the writes at both ends of each huge page, and no others; then again."""
    if reason := BACKINGS[backing].missing(HUGE_NPAGES * PAGE):
        lacks(reason)
    empty.add_slot(SLOT, FIRST_GPA + shift * PAGE, HUGE_NPAGES, backing, tracked=False)
    empty.run(*(Operation("store_8", empty.address(SLOT, page)) for page in range(0, HUGE_NPAGES, 64)))
    switch_on(empty)
    edges = sorted({page for edge in (0, 512, 1024, 1536) for page in (edge, max(0, edge - 1))} | {HUGE_NPAGES - 1})
    for pages in (edges, [100], edges, [511, 513]):
        empty.write(SLOT, *pages)
        empty.expect("writes into huge pages", {SLOT: pages})
    empty.set_tracking(SLOT, on=False)
    empty.write(SLOT, *edges)
    switch_on(empty)
    empty.write(SLOT, 700)
    empty.expect("a write into pages that may have been merged again", {SLOT: [700]})


@pytest.mark.parametrize("npages", [(1 << 16) + 65, (1 << 20) + 3], ids=["2^16", "2^20"])
def test_slots_with_many_pages(empty: TrackedVm, npages: int) -> None:
    """Beyond what 16 and 20 bits can count; the memory is sparse, and so are the writes."""
    empty.add_slot(SLOT, 2 * GIB, npages, tracked=False)
    switch_on(empty)
    pages = sorted({0, 63, 64, 65535, 65536, 65537, npages // 2, npages - 65, npages - 1})
    for _ in range(2):
        empty.write(SLOT, *pages)
        empty.expect("sparse writes", {SLOT: pages})
