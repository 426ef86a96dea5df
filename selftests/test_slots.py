# SPDX-License-Identifier: GPL-2.0-only
"""Tracking through a slot's life: switched on and off, moved, deleted and made again, beside others."""

from collections.abc import Iterator

import pytest

from lib import uapi
from lib.kvm import Kvm
from lib.memory import MIB
from lib.tracked_vm import FIRST_GPA, PAGE, TrackedVm

SLOT, BELOW, ABOVE = 1, 2, 3
NPAGES = 64 + 9
ALL = range(NPAGES)


@pytest.fixture
def empty(kvm: Kvm, log_mode: str) -> Iterator[TrackedVm]:
    with TrackedVm(kvm, log_mode) as vm:
        yield vm


def test_off_and_on_again(empty: TrackedVm) -> None:
    """What was written while it was off is not told later, nor what was not collected before."""
    empty.add_slot(SLOT, FIRST_GPA, NPAGES)
    for turn in range(4):
        empty.write(SLOT, turn)
        empty.expect("a write", {SLOT: [turn]})
        empty.set_tracking(SLOT, on=False)
        empty.write(SLOT, *range(20, 30))
        empty.switch_on(SLOT)
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
