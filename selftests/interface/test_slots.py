# SPDX-License-Identifier: GPL-2.0-only
"""Dirty logging over a memslot's life: enabled, disabled, moved, deleted, recreated, next to and aliased by other slots."""

from collections.abc import Iterator

import pytest

from dirty_tracking.scripted_vm import ScriptedVm
from dirty_tracking.vm import FIRST_GPA, PAGE
from kvm_util import uapi
from kvm_util.kvm import Kvm
from kvm_util.memory import MIB

SLOT, BELOW, ABOVE, ALIAS = 1, 2, 3, 4
NPAGES = 64 + 9
ALL = range(NPAGES)
MOVED = FIRST_GPA + 4 * MIB


@pytest.fixture
def vm(kvm: Kvm, log_mode: str) -> Iterator[ScriptedVm]:
    """A VM with one vCPU and no test slots, in each log mode."""
    with ScriptedVm(kvm, log_mode) as vm:
        yield vm


def still_reported(vm: ScriptedVm, page: int) -> dict[int, list[int]]:
    """What is still reported of a write to *page* after its slot was deleted or its logging disabled.

    The bitmap is freed with it. Ring entries stay: they have the slot's number, and no change of memslots removes them
    (kvm_dirty_ring_push()).
    """
    return {SLOT: [page]} if vm.mode.uses_ring else {}


def test_logging_disabled_and_enabled(vm: ScriptedVm) -> None:
    """Dirty logging that is enabled again reports no write from while it was disabled, nor older bits of a bitmap."""
    vm.add_slot(SLOT, FIRST_GPA, NPAGES)
    for page in range(4):
        vm.write(SLOT, page)
        vm.assert_dirty("a write", {SLOT: [page]})
        vm.write(SLOT, 10 + page)
        vm.disable_dirty_logging(SLOT)
        vm.write(SLOT, *range(20, 30))
        vm.enable_dirty_logging(SLOT)
        vm.assert_dirty("an uncollected write before logging was disabled", still_reported(vm, 10 + page))
        vm.assert_dirty("no write since logging was enabled again", {})


def test_enabling_logging_twice(vm: ScriptedVm) -> None:
    """Enabling dirty logging of a slot that has it already loses no dirty page."""
    vm.add_slot(SLOT, FIRST_GPA, NPAGES)
    vm.write(SLOT, 3)
    vm.enable_dirty_logging(SLOT, assert_initial=False)
    vm.write(SLOT, 4)
    vm.assert_dirty("writes before and after enabling logging twice", {SLOT: [3, 4]})


def test_adjacent_slots_are_independent(vm: ScriptedVm) -> None:
    """Each of three adjacent slots that has dirty logging reports its own writes only."""
    vm.add_slot(BELOW, FIRST_GPA - NPAGES * PAGE, NPAGES, logged=False)
    vm.add_slot(SLOT, FIRST_GPA, NPAGES)
    vm.add_slot(ABOVE, FIRST_GPA + NPAGES * PAGE, NPAGES)
    for slot in (BELOW, SLOT, ABOVE):
        vm.write(slot, 0, NPAGES - 1)
    vm.assert_dirty("writes to the edges of three slots", {SLOT: [0, NPAGES - 1], ABOVE: [0, NPAGES - 1]})
    vm.disable_dirty_logging(ABOVE)
    for slot in (BELOW, SLOT, ABOVE):
        vm.write(slot, 1)
    vm.assert_dirty("writes with logging enabled for one slot", {SLOT: [1]})


def test_slot_deleted_and_recreated(vm: ScriptedVm) -> None:
    """A slot recreated in the same place starts clean, and logs from its first write on."""
    memslot = vm.add_slot(SLOT, FIRST_GPA, NPAGES)
    for page in (2, 5):
        vm.write(SLOT, page)
        vm.assert_dirty("a write", {SLOT: [page]})
        vm.write(SLOT, page + 1)
        vm.vm.delete_memory_region(SLOT)
        vm.vm.set_user_memory_region(SLOT, FIRST_GPA, memslot.memory, uapi.KVM_MEM_LOG_DIRTY_PAGES)
        if vm.mode.initially_set:
            vm.assert_dirty("recreating the slot", {SLOT: ALL})
        vm.assert_dirty("an uncollected write to the deleted slot", still_reported(vm, page + 1))
        vm.assert_dirty("no write to the new slot", {})


def test_entries_of_a_deleted_slot(vm: ScriptedVm) -> None:
    """Ring entries of a deleted slot can be harvested and reset, and a new slot in its place logs its writes."""
    memslot = vm.add_slot(SLOT, FIRST_GPA, NPAGES)
    vm.write(SLOT, 2)
    vm.vm.delete_memory_region(SLOT)
    vm.assert_dirty("a write to a slot that was deleted", still_reported(vm, 2))
    vm.vm.set_user_memory_region(SLOT, FIRST_GPA, memslot.memory, uapi.KVM_MEM_LOG_DIRTY_PAGES)
    if vm.mode.initially_set:
        vm.assert_dirty("recreating the slot", {SLOT: ALL})
    vm.write(SLOT, 2, 3)
    vm.assert_dirty("writes to the new slot", {SLOT: [2, 3]})


def test_slot_move_keeps_dirty_pages(vm: ScriptedVm) -> None:
    """A moved slot keeps exactly its uncollected dirty pages, and logs from the first write at its new address on."""
    memslot = vm.add_slot(SLOT, FIRST_GPA, NPAGES)
    vm.write(SLOT, 2)
    vm.assert_dirty("a write before the move", {SLOT: [2]})
    vm.write(SLOT, 5)
    vm.vm.set_user_memory_region(SLOT, MOVED, memslot.memory, uapi.KVM_MEM_LOG_DIRTY_PAGES)
    # The slot keeps its bitmap, so KVM_DIRTY_LOG_INITIALLY_SET does not apply (kvm_prepare_memory_region()).
    vm.assert_dirty("an uncollected write before the move", {SLOT: [5]})
    vm.map(MOVED, NPAGES)
    vm.write(SLOT, 2, 3, 5)
    vm.assert_dirty("writes after the move", {SLOT: [2, 3, 5]})


def test_slot_move_that_toggles_logging(vm: ScriptedVm) -> None:
    """A call that moves a slot and disables or enables its dirty logging frees or creates its bitmap as without a move."""
    memslot = vm.add_slot(SLOT, FIRST_GPA, NPAGES)
    vm.map(MOVED, NPAGES)
    vm.write(SLOT, 5)
    vm.vm.set_user_memory_region(SLOT, MOVED, memslot.memory)
    vm.write(SLOT, 2, 3)
    vm.vm.set_user_memory_region(SLOT, FIRST_GPA, memslot.memory, uapi.KVM_MEM_LOG_DIRTY_PAGES)
    if vm.mode.initially_set:
        vm.assert_dirty("moving the slot and enabling logging", {SLOT: ALL})
    vm.assert_dirty("an uncollected write before logging was disabled", still_reported(vm, 5))
    vm.write(SLOT, 2, 5)
    vm.assert_dirty("writes after the slot was moved back", {SLOT: [2, 5]})


def test_two_slots_with_the_same_memory(vm: ScriptedVm) -> None:
    """Each of two slots with the same host memory that has dirty logging reports the writes to its own gfns only."""
    memslot = vm.add_slot(SLOT, FIRST_GPA, NPAGES)
    vm.vm.set_user_memory_region(ALIAS, MOVED, memslot.memory)
    vm.map(MOVED, NPAGES)
    vm.write(ALIAS, 2, 3, value=7)
    assert [memslot.memory.words[page * PAGE // 8] for page in (2, 3)] == [7, 7], "the two slots do not share memory"
    vm.assert_dirty("writes to the slot without logging", {})
    vm.write(SLOT, 3, 4)
    vm.write(ALIAS, 4, 5)
    vm.assert_dirty("writes to both slots, the first with logging", {SLOT: [3, 4]})
    vm.enable_dirty_logging(ALIAS)
    vm.write(SLOT, 3, 4)
    vm.write(ALIAS, 4, 5)
    vm.assert_dirty("writes to both slots, both with logging", {SLOT: [3, 4], ALIAS: [4, 5]})
    vm.disable_dirty_logging(SLOT)
    vm.write(SLOT, 3, 5)
    vm.write(ALIAS, 4)
    vm.assert_dirty("writes to both slots, the second with logging", {ALIAS: [4]})
