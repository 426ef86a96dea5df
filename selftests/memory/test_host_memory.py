# SPDX-License-Identifier: GPL-2.0-only
"""The host changes its mapping of a memslot: KVM's MMU notifier zaps its SPTEs, and the dirty log loses no write."""

import pytest

from dirty_tracking.mapping_sizes import huge_pages
from dirty_tracking.scripted_vm import ScriptedVm
from dirty_tracking.vm import FIRST_GPA, PAGE
from harness.fixtures import Provided
from kvm_util import uapi
from kvm_util.kvm import Kvm
from kvm_util.memory import HUGE_PAGE_SIZE
from selftests.memory.huge_memory import SLOT, MakeHugeVm, few_huge_pages, inside, touched
from selftests.memory.invalidations import (
    HOST_WIDE,
    WHY_NOT,
    Invalidation,
    aged,
    call_at,
    collapsed,
    discarded,
    merged_by_ksm,
    migrated,
    moved,
    protected,
    replaced,
    shared_with_a_child,
    soft_dirty_bits_cleared,
    swapped_out,
    way_to_discard,
    write_protected_by_userfaultfd,
)

ALIAS = 2
NPAGES = 64 + 9
# Pages that the invalidations concern, and others
INSIDE, OUTSIDE = [8, 9, 30, 65], [3, 66, 72]

INVALIDATIONS = [
    ("anonymous", discarded),
    ("anonymous", protected),
    ("anonymous", replaced),
    ("anonymous", moved),
    ("anonymous", write_protected_by_userfaultfd),
    ("anonymous", shared_with_a_child),
    ("shmem", discarded),
    ("shmem", protected),
    ("shmem", replaced),
    ("shmem", moved),
    ("anonymous_thp", collapsed),
    ("shmem_thp", collapsed),
    ("anonymous", soft_dirty_bits_cleared),
    ("anonymous", merged_by_ksm),
    ("anonymous", aged),
    ("anonymous", migrated),
    ("shmem", migrated),
    ("anonymous", swapped_out),
]


@pytest.mark.parametrize(
    ("backing", "invalidation"),
    [
        pytest.param(
            backing, way, id=f"{backing}-{way.__name__}", marks=[pytest.mark.disposable_kernel] * (way in HOST_WIDE)
        )
        for backing, way in INVALIDATIONS
    ],
)
def test_dirty_log_survives_mmu_notifier(
    kvm: Kvm, provided: Provided, log_mode: str, backing: str, invalidation: Invalidation
) -> None:
    """Writes before and after an MMU notifier invalidation are reported, and the invalidation itself dirties no page."""
    if invalidation in WHY_NOT and (reason := WHY_NOT[invalidation]()):
        pytest.skip(reason)
    with provided(backing, NPAGES * PAGE), ScriptedVm(kvm, log_mode) as vm:
        memory = vm.add_slot(SLOT, FIRST_GPA, NPAGES, backing).memory
        vm.write(SLOT, *range(NPAGES))
        vm.assert_dirty("writes to all pages", {SLOT: range(NPAGES)})
        with invalidation(memory):
            vm.assert_dirty("an invalidation without writes", {})
            vm.write(SLOT, *INSIDE, *OUTSIDE)
            vm.assert_dirty("writes after an invalidation", {SLOT: INSIDE + OUTSIDE})
        vm.write(SLOT, *INSIDE, *OUTSIDE)
        with invalidation(memory):
            vm.assert_dirty("writes before an invalidation", {SLOT: INSIDE + OUTSIDE})
        vm.write(SLOT, *INSIDE)
        with invalidation(memory):
            vm.write(SLOT, *INSIDE, *OUTSIDE)
            # A store to a page that was zapped faults, and KVM pushes the page again.
            vm.assert_dirty("writes before and after an invalidation", {SLOT: INSIDE + OUTSIDE}, writes_per_page=2)
        vm.write(SLOT, *INSIDE)
        vm.assert_dirty("writes when all invalidations are over", {SLOT: INSIDE})


@pytest.mark.parametrize("backing", ["anonymous_thp", "shmem_thp", "shared_hugetlb_2mb"])
def test_hole_in_memory_mapped_huge(make_huge_vm: MakeHugeVm, backing: str) -> None:
    """A hole that ends within a huge page dirties no page, and pages around and in it that are written are reported."""
    layout = few_huge_pages(backing, 3)
    with make_huge_vm(layout) as vm:
        memslot = vm.vm.memslots[SLOT]
        first, second = huge_pages(memslot, HUGE_PAGE_SIZE)
        hole = range(inside(first), second.stop)
        pages = sorted(
            {*touched(vm, layout), hole.start - 1, hole.start + 1, second.start, second.stop - 1, second.stop}
        )

        def punch() -> None:
            start, size = memslot.memory.hva + hole.start * PAGE, len(hole) * PAGE
            call_at("madvise", start, size, way_to_discard(memslot.memory))

        for logged_first in (True, False):
            vm.write(SLOT, *pages)
            if not logged_first:
                punch()
            vm.enable_dirty_logging(SLOT)
            if logged_first:
                punch()
            vm.assert_dirty("a hole without writes", {})
            vm.write(SLOT, *pages)
            punch()
            vm.assert_dirty("writes before a hole", {SLOT: pages})
            vm.write(SLOT, *pages)
            vm.assert_dirty("writes after a hole", {SLOT: pages})
            vm.disable_dirty_logging(SLOT)


@pytest.mark.parametrize("invalidation", [discarded, protected, replaced], ids=lambda way: way.__name__)
def test_invalidation_of_two_slots(kvm: Kvm, log_mode: str, invalidation: Invalidation) -> None:
    """An MMU notifier invalidation zaps the SPTEs of both slots over the memory: later writes to either are logged."""
    with ScriptedVm(kvm, log_mode) as vm:
        memory = vm.add_slot(SLOT, FIRST_GPA, NPAGES).memory
        gpa = FIRST_GPA + NPAGES * PAGE
        vm.vm.set_user_memory_region(ALIAS, gpa, memory, uapi.KVM_MEM_LOG_DIRTY_PAGES)
        vm.map(gpa, NPAGES)
        for slot in (SLOT, ALIAS):
            vm.write(slot, *range(NPAGES))
        vm.collect()
        for first, second in ((SLOT, ALIAS), (ALIAS, SLOT)):
            vm.write(second, *OUTSIDE, INSIDE[0])
            with invalidation(memory):
                vm.assert_dirty("writes to one slot before an invalidation", {second: [*OUTSIDE, INSIDE[0]]})
                vm.write(first, *INSIDE, *OUTSIDE, value=first)
                vm.write(second, *INSIDE[1:], value=second)
                vm.assert_dirty("writes to both after it", {first: INSIDE + OUTSIDE, second: INSIDE[1:]})
            held = [memory.words[page * PAGE // 8] for page in INSIDE]
            assert held == [first, *[second] * (len(INSIDE) - 1)], "KVM maps memory that is not there any more"
