# SPDX-License-Identifier: GPL-2.0-only
"""Tracking through a slot's life: switched on and off, moved, deleted and made again, beside others and over their memory."""

from collections.abc import Iterator

import pytest

from dirty_tracking.tracked_vm import FIRST_GPA, PAGE, TrackedVm
from kvm_util import uapi
from kvm_util.kvm import Kvm
from kvm_util.memory import MIB

SLOT, BELOW, ABOVE, ALIAS = 1, 2, 3, 4
NPAGES = 64 + 9
ALL = range(NPAGES)
MOVED = FIRST_GPA + 4 * MIB


@pytest.fixture
def empty(kvm: Kvm, log_mode: str) -> Iterator[TrackedVm]:
    with TrackedVm(kvm, log_mode) as vm:
        yield vm


def left_of(vm: TrackedVm, page: int) -> dict[int, list[int]]:
    """What is still told of a write to *page* after its slot went or was switched off: a bitmap goes too, a ring stays.

    Entries name a slot by its number, and no change of slots looks for them (kvm_dirty_ring_push()).
    """
    return {SLOT: [page]} if vm.mode.uses_ring else {}


def test_off_and_on_again(empty: TrackedVm) -> None:
    """What was written while it was off is not told later, nor what a bitmap still had of before."""
    empty.add_slot(SLOT, FIRST_GPA, NPAGES)
    for turn in range(4):
        empty.write(SLOT, turn)
        empty.assert_dirty("a write", {SLOT: [turn]})
        empty.write(SLOT, 10 + turn)
        empty.disable_dirty_logging(SLOT)
        empty.write(SLOT, *range(20, 30))
        empty.enable_dirty_logging(SLOT)
        empty.assert_dirty("a write before it was off, not collected", left_of(empty, 10 + turn))
        empty.assert_dirty("nothing since tracking began again", {})


def test_switching_it_on_twice_loses_nothing(empty: TrackedVm) -> None:
    """The same flags again change nothing."""
    empty.add_slot(SLOT, FIRST_GPA, NPAGES)
    empty.write(SLOT, 3)
    empty.enable_dirty_logging(SLOT, assert_initial=False)
    empty.write(SLOT, 4)
    empty.assert_dirty("writes before and after the same flags", {SLOT: [3, 4]})


def test_neighbours_do_not_leak(empty: TrackedVm) -> None:
    """Slots right below and above, untracked and tracked, written in turn with this one."""
    empty.add_slot(BELOW, FIRST_GPA - NPAGES * PAGE, NPAGES, tracked=False)
    empty.add_slot(SLOT, FIRST_GPA, NPAGES)
    empty.add_slot(ABOVE, FIRST_GPA + NPAGES * PAGE, NPAGES)
    for slot in (BELOW, SLOT, ABOVE):
        empty.write(slot, 0, NPAGES - 1)
    empty.assert_dirty("writes to the edges of three slots", {SLOT: [0, NPAGES - 1], ABOVE: [0, NPAGES - 1]})
    empty.disable_dirty_logging(ABOVE)
    for slot in (BELOW, SLOT, ABOVE):
        empty.write(slot, 1)
    empty.assert_dirty("writes with one slot tracked", {SLOT: [1]})


def test_deleted_and_made_again(empty: TrackedVm) -> None:
    """A new slot in the same place begins clean, and is tracked from its first write on."""
    memslot = empty.add_slot(SLOT, FIRST_GPA, NPAGES)
    for page in (2, 5):
        empty.write(SLOT, page)
        empty.assert_dirty("a write", {SLOT: [page]})
        empty.write(SLOT, page + 1)
        empty.vm.delete_memory_region(SLOT)
        empty.vm.set_user_memory_region(SLOT, FIRST_GPA, memslot.memory, uapi.KVM_MEM_LOG_DIRTY_PAGES)
        if empty.mode.initially_set:
            empty.assert_dirty("making the slot again", {SLOT: ALL})
        empty.assert_dirty("a write to the old slot, not collected", left_of(empty, page + 1))
        empty.assert_dirty("nothing in the new slot", {})


def test_collected_while_it_is_deleted(empty: TrackedVm) -> None:
    """A ring's entries of a slot that is gone are there, and are taken back; the next slot in its place is tracked."""
    memslot = empty.add_slot(SLOT, FIRST_GPA, NPAGES)
    empty.write(SLOT, 2)
    empty.vm.delete_memory_region(SLOT)
    empty.assert_dirty("a write to a slot that is gone", left_of(empty, 2))
    empty.vm.set_user_memory_region(SLOT, FIRST_GPA, memslot.memory, uapi.KVM_MEM_LOG_DIRTY_PAGES)
    if empty.mode.initially_set:
        empty.assert_dirty("making the slot again", {SLOT: ALL})
    empty.write(SLOT, 2, 3)
    empty.assert_dirty("writes to the new slot", {SLOT: [2, 3]})


def test_moved(empty: TrackedVm) -> None:
    """It takes along what was not collected, and no more; at its new address it is tracked, from the first write on."""
    memslot = empty.add_slot(SLOT, FIRST_GPA, NPAGES)
    empty.write(SLOT, 2)
    empty.assert_dirty("a write before the move", {SLOT: [2]})
    empty.write(SLOT, 5)
    empty.vm.set_user_memory_region(SLOT, MOVED, memslot.memory, uapi.KVM_MEM_LOG_DIRTY_PAGES)
    # It keeps its bitmap, so that KVM_DIRTY_LOG_INITIALLY_SET sets no bits either (kvm_prepare_memory_region()).
    empty.assert_dirty("a write before the move, not collected", {SLOT: [5]})
    empty.map(MOVED, NPAGES)
    empty.write(SLOT, 2, 3, 5)
    empty.assert_dirty("writes after the move", {SLOT: [2, 3, 5]})


def test_moved_and_switched_off_and_on(empty: TrackedVm) -> None:
    """One call may do both: it drops the bitmap, or begins with a new one, as if it did not move."""
    memslot = empty.add_slot(SLOT, FIRST_GPA, NPAGES)
    empty.map(MOVED, NPAGES)
    empty.write(SLOT, 5)
    empty.vm.set_user_memory_region(SLOT, MOVED, memslot.memory)
    empty.write(SLOT, 2, 3)
    empty.vm.set_user_memory_region(SLOT, FIRST_GPA, memslot.memory, uapi.KVM_MEM_LOG_DIRTY_PAGES)
    if empty.mode.initially_set:
        empty.assert_dirty("moving it and switching it on", {SLOT: ALL})
    empty.assert_dirty("a write before it was off, not collected", left_of(empty, 5))
    empty.write(SLOT, 2, 5)
    empty.assert_dirty("writes after it came back", {SLOT: [2, 5]})


def test_two_slots_over_the_same_memory(empty: TrackedVm) -> None:
    """What is tracked is a guest-physical address: a slot tells of writes through its own, whatever they change elsewhere."""
    memslot = empty.add_slot(SLOT, FIRST_GPA, NPAGES)
    empty.vm.set_user_memory_region(ALIAS, MOVED, memslot.memory)
    empty.map(MOVED, NPAGES)
    empty.write(ALIAS, 2, 3, value=7)
    assert [memslot.memory.words[page * PAGE // 8] for page in (2, 3)] == [7, 7], "it is not the same memory"
    empty.assert_dirty("writes through the slot that is not tracked", {})
    empty.write(SLOT, 3, 4)
    empty.write(ALIAS, 4, 5)
    empty.assert_dirty("writes through both, one of them tracked", {SLOT: [3, 4]})
    empty.enable_dirty_logging(ALIAS)
    empty.write(SLOT, 3, 4)
    empty.write(ALIAS, 4, 5)
    empty.assert_dirty("writes through both, both tracked", {SLOT: [3, 4], ALIAS: [4, 5]})
    empty.disable_dirty_logging(SLOT)
    empty.write(SLOT, 3, 5)
    empty.write(ALIAS, 4)
    empty.assert_dirty("writes through both, the other one tracked", {ALIAS: [4]})
