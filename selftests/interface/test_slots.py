# SPDX-License-Identifier: GPL-2.0-only
"""Dirty logging over a memslot's life: enabled, disabled, moved, deleted, recreated, next to and aliased by other slots."""

from collections.abc import Iterator
from contextlib import closing

import pytest

from dirty_tracking.scripted_vm import Operation, ScriptedVm
from dirty_tracking.vm import FIRST_GPA, PAGE
from kvm_util import uapi
from kvm_util.kvm import Kvm
from kvm_util.memory import MIB, GuestMemory

SLOT, BELOW, ABOVE, ALIAS = 1, 2, 3, 4
NPAGES = 64 + 9
ALL = range(NPAGES)
PAGES = [0, 5, 63]
MOVED = FIRST_GPA + 4 * MIB


@pytest.fixture
def vm(kvm: Kvm, log_mode: str) -> Iterator[ScriptedVm]:
    """A VM with one vCPU and no test slots, in each log mode."""
    with ScriptedVm(kvm, log_mode) as vm:
        yield vm


@pytest.fixture(params=[True, False], ids=["zap-all", "zap-slot"])
def zapping_vm(request: pytest.FixtureRequest, kvm: Kvm, log_mode: str) -> Iterator[ScriptedVm]:
    """As vm; a change of a slot zaps the SPTEs of all slots, or only of that one (KVM_X86_QUIRK_SLOT_ZAP_ALL)."""
    quirk = 0 if request.param else request.getfixturevalue("zap_all_quirk")
    with ScriptedVm(kvm, log_mode) as vm:
        if quirk:
            vm.vm.enable_cap(uapi.KVM_CAP_DISABLE_QUIRKS2, quirk)
        yield vm


@pytest.fixture
def readonly_memslots(kvm: Kvm) -> None:
    """Skips where KVM has no read-only memslots."""
    if not kvm.check_extension(uapi.KVM_CAP_READONLY_MEM):
        pytest.skip("no KVM_CAP_READONLY_MEM")


def still_reported(vm: ScriptedVm, *pages: int) -> dict[int, list[int]]:
    """What is still reported of writes to *pages* after its slot was deleted or its logging disabled.

    The bitmap is freed with it. Ring entries stay: they have the slot's number, and no change of memslots removes them
    (kvm_dirty_ring_push()).
    """
    return {SLOT: list(pages)} if vm.mode.uses_ring else {}


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


def recreate(vm: ScriptedVm, memory: GuestMemory) -> None:
    """Delete SLOT, collect what is reported of the PAGES that were written, and create it again with *memory*, logged."""
    vm.vm.delete_memory_region(SLOT)
    vm.assert_dirty("uncollected writes to a slot that was deleted", still_reported(vm, *PAGES))
    vm.vm.set_user_memory_region(SLOT, FIRST_GPA, memory, uapi.KVM_MEM_LOG_DIRTY_PAGES)
    if vm.mode.initially_set:
        vm.assert_dirty("recreating the slot", {SLOT: range(memory.size // PAGE)})


def test_written_pages_of_a_changed_slot(zapping_vm: ScriptedVm) -> None:
    """Pages that were mapped writable are not so any more after their slot was moved, or recreated smaller or larger."""
    vm = zapping_vm
    large = vm.add_slot(SLOT, FIRST_GPA, NPAGES).memory
    vm.map(MOVED, NPAGES)
    vm.write(SLOT, *PAGES)
    vm.vm.set_user_memory_region(SLOT, MOVED, large, uapi.KVM_MEM_LOG_DIRTY_PAGES)
    vm.assert_dirty("uncollected writes before a move", {SLOT: PAGES})
    vm.vm.set_user_memory_region(SLOT, FIRST_GPA, large, uapi.KVM_MEM_LOG_DIRTY_PAGES)
    vm.write(SLOT, *PAGES)
    vm.assert_dirty("writes after a move and back", {SLOT: PAGES})
    # The memory stays until the end: if KVM still had it mapped, the guest must not write to pages that were freed.
    with closing(GuestMemory(large.backing, 64 * PAGE, FIRST_GPA)) as small:
        for value, memory in ((1, small), (2, large)):
            vm.write(SLOT, *PAGES)
            recreate(vm, memory)
            vm.write(SLOT, *PAGES, value=value)
            vm.assert_dirty(f"writes after the slot was recreated with {memory.size // PAGE} pages", {SLOT: PAGES})
            assert [memory.words[page * PAGE // 8] for page in PAGES] == [value] * len(PAGES), "KVM maps other memory"


@pytest.mark.usefixtures("readonly_memslots")
def test_readonly_slot_made_writable(zapping_vm: ScriptedVm) -> None:
    """The first store to each page of a slot that was read-only, and was recreated writable and logged, is logged."""
    memory = zapping_vm.add_slot(SLOT, FIRST_GPA, NPAGES, readonly=True).memory
    memory.populate()
    zapping_vm.run(*(Operation("load", zapping_vm.address(SLOT, page)) for page in PAGES))
    zapping_vm.vm.delete_memory_region(SLOT)
    zapping_vm.vm.set_user_memory_region(SLOT, FIRST_GPA, memory, uapi.KVM_MEM_LOG_DIRTY_PAGES)
    if zapping_vm.mode.initially_set:
        zapping_vm.assert_dirty("recreating the slot", {SLOT: ALL})
    zapping_vm.write(SLOT, *PAGES)
    zapping_vm.assert_dirty("stores to a slot that was read-only", {SLOT: PAGES})


def test_vcpu_created_while_logging(vm: ScriptedVm) -> None:
    """The writes of a vCPU that is created while a slot is logged are logged, as are those of the others."""
    vm.add_slot(SLOT, FIRST_GPA, NPAGES)
    vm.write(SLOT, 2)
    vm.assert_dirty("a write of the only vCPU", {SLOT: [2]})
    vm.write(SLOT, 3)
    vm.add_vcpu()
    vm.write(SLOT, 2, 4, vcpu=1)
    vm.assert_dirty("a write of the first vCPU, and the first ones of a vCPU created since", {SLOT: [2, 3, 4]})
    vm.write(SLOT, 2, 5, vcpu=1)
    vm.assert_dirty("more writes of the new vCPU", {SLOT: [2, 5]})
    vm.write(SLOT, 2, 3, vcpu=0)
    vm.assert_dirty("writes of the first vCPU", {SLOT: [2, 3]})
