# SPDX-License-Identifier: GPL-2.0-only
"""Writes of a nested guest (L2), and of KVM on behalf of L1 and L2, dirty the gfns of L1.

With nested paging KVM shadows L1's nested page tables for L2, beside the tables for L1 itself: a page has several mappings
then, and each has to be write-protected. Without nested paging L2 runs on L1's tables (TDP), or KVM shadows L2's own page
tables.
"""

from itertools import pairwise

import pytest

from dirty_tracking.mapping_sizes import MappingSizes
from dirty_tracking.platform import uses_tdp
from dirty_tracking.scripted_vm import Operation, ScriptedVm
from dirty_tracking.vm import FIRST_GPA, PAGE
from kvm_util import uapi as kvm_uapi
from kvm_util.arch.x86_64 import msr
from kvm_util.binary_stats import BinaryStats
from kvm_util.host import Host
from kvm_util.kvm import Kvm
from kvm_util.memory import BACKINGS, MIB
from kvm_util.vcpu import Vcpu
from selftests.x86_64.hypervisors import Svm
from selftests.x86_64.nested import ALIAS, CONTROL, MANY, NPAGES, OWN, OWN_GPA, RING, SLOT, TABLES, WINDOW, NestedGuest


def test_l2_store_is_logged(l2: NestedGuest) -> None:
    """Each store of L2 dirties its gfn of L1, also where the page is mapped already."""
    for pages in ([3], [3, 4], [0, NPAGES - 1], [4]):
        l2.write(*pages)
        l2.vm.assert_dirty(f"stores of L2 to pages {pages}", {SLOT: pages})


def test_l2_load_is_not_logged(l2: NestedGuest) -> None:
    """Loads of L2 dirty no gfn, before and after a store to the same page."""
    l2.load(*range(NPAGES))
    l2.vm.assert_dirty("loads of L2", {})
    l2.write(5)
    l2.vm.assert_dirty("a store of L2 to a page that it has read", {SLOT: [5]})
    l2.load(*range(NPAGES))
    l2.vm.assert_dirty("loads of L2 from pages, one of which it has written before", {})


def test_l1_and_l2_stores_to_one_page(l2: NestedGuest) -> None:
    """In a page that L1 and L2 both have mapped writable, the next store of either is logged after a collection."""
    vm = l2.vm
    for _ in range(3):
        l2.write(7, 8)
        vm.write(SLOT, 7, 9)
        vm.assert_dirty("stores of L1 and L2", {SLOT: [7, 8, 9]}, MANY)
        l2.write(7)
        vm.assert_dirty("a store of L2 after one of L1", {SLOT: [7]})
        vm.write(SLOT, 7)
        vm.assert_dirty("a store of L1 after one of L2", {SLOT: [7]})


def test_l2_stores_through_aliases(l2: NestedGuest) -> None:
    """Stores of L2 to a page that L1's tables map twice, and KVM's tables perhaps too, are logged through either mapping."""
    vm = l2.vm
    for _ in range(2):
        l2.write(6)
        l2.write(6, 7, window=ALIAS)
        vm.assert_dirty("stores of L2 through both mappings", {SLOT: [6, 7]}, MANY)
        for window in (WINDOW, ALIAS, WINDOW):
            l2.write(6, window=window)
            vm.assert_dirty(f"a store of L2 through {window:#x}", {SLOT: [6]})


def test_logging_enabled_after_l2_wrote(l2: NestedGuest) -> None:
    """Pages that L1 and L2 have mapped writable when dirty logging is enabled are write-protected for both."""
    vm = l2.vm
    for _ in range(2):
        vm.disable_dirty_logging(SLOT)
        l2.write(*range(NPAGES))
        vm.write(SLOT, *range(NPAGES))
        vm.enable_dirty_logging(SLOT)
        l2.write(1, NPAGES - 1)
        vm.assert_dirty("stores of L2 after dirty logging was enabled", {SLOT: [1, NPAGES - 1]})
        vm.write(SLOT, 2)
        vm.assert_dirty("a store of L1 after that", {SLOT: [2]})


@pytest.mark.parametrize("page_size", [PAGE, 2 * MIB], ids=["4k", "2m"])
def test_l2_huge_pages_logged_by_4k_pages(kvm: Kvm, host: Host, log_mode: str, nested: bool, page_size: int) -> None:
    """Memory that KVM mapped huge for L2, as the tables that it shadows allow, is logged by 4 KiB pages."""
    npages = 2 * 512
    if reason := BACKINGS["anonymous_thp"].missing(npages * PAGE):
        pytest.skip(reason)
    if not kvm.check_extension(kvm_uapi.KVM_CAP_BINARY_STATS_FD):
        pytest.skip("this KVM has no KVM_CAP_BINARY_STATS_FD, which shows whether a page is mapped huge")
    guest_mode = "48bit-4k" if page_size == PAGE and not nested else "48bit-2m"
    with ScriptedVm(kvm, log_mode, guest_mode=guest_mode, ring_count=2 * npages) as vm:
        slot = vm.add_slot(SLOT, FIRST_GPA, npages, backing="anonymous_thp", logged=False)
        vm.add_slot(OWN, OWN_GPA, NPAGES, logged=False)
        slot.memory.populate()
        l2 = NestedGuest(vm, nested, page_size)
        l2.write(*range(0, npages, 64))
        with BinaryStats(vm.vm.get_stats_fd()) as stats:
            assert (MappingSizes.read(stats).counts[2 * MIB] > 0) == (
                page_size > PAGE or (uses_tdp(host) and not nested)
            )
        vm.enable_dirty_logging(SLOT)
        for pages in ([0, 511], [512, 513, npages - 1], [0, 700]):
            l2.write(*pages)
            vm.assert_dirty(f"stores of L2 to pages {pages}", {SLOT: pages})
        vm.write(SLOT, 1, 512)
        vm.assert_dirty("stores of L1", {SLOT: [1, 512]})


@pytest.mark.log_modes("ring")
def test_ring_full_exit_from_l2(kvm: Kvm, log_mode: str, nested: bool) -> None:
    """A ring that fills while L2 runs exits to user space, L2 continues after the reset, and each of its stores is logged."""
    npages = 2 * RING
    with ScriptedVm(kvm, log_mode, ring_count=RING) as vm:
        vm.add_slot(SLOT, FIRST_GPA, npages)
        vm.add_slot(OWN, OWN_GPA, NPAGES, logged=False)
        l2 = NestedGuest(vm, nested)
        harvests: list[list[int]] = []

        def full(vcpu: Vcpu) -> bool:
            if vcpu.exit_reason() != "KVM_EXIT_DIRTY_RING_FULL":
                return False
            harvests.append(vm.collect().entries(SLOT))
            return True

        l2.run(*(Operation("store_8", l2.address(page), 1) for page in range(npages)), on_exit=full)
        assert harvests, "the ring did not fill"
        harvests.append(vm.collect().entries(SLOT))
        # The store that filled the ring was still in flight: it faults again, and is logged again.
        for last, following in pairwise(harvests):
            if following and following[:1] == last[-1:]:
                del following[0]
        assert [page for harvest in harvests for page in harvest] == list(range(npages))


def test_writes_on_behalf_of_l1(l2: NestedGuest) -> None:
    """KVM's writes to the VMCB or VMCS are logged at each run of L2, and to nested page tables when it sets a bit in them."""
    vm = l2.vm
    vm.enable_dirty_logging(OWN)
    l2.run()
    vm.collect()
    for name, page, sets_bits in (("load", 3, True), ("store_8", 3, True), ("store_8", 5, True), ("store_8", 5, False)):
        before = bytes(l2.own.view)
        l2.run(Operation(name, l2.address(page), 1))
        tables = [own for own in vm.changed_pages(OWN, before) if own in TABLES]
        assert bool(tables) == (l2.nested and l2.hypervisor.marks_tables and sets_bits)
        stored = [page] if name == "store_8" else []
        report = vm.collect()
        assert (report.dirty(OWN), report.entries(SLOT)) == ({*tables, CONTROL}, stored)


@pytest.fixture
def svm_l2(l2: NestedGuest) -> NestedGuest:
    """*l2*, which L1 runs with SVM."""
    if not isinstance(l2.hypervisor, Svm):
        pytest.skip("only SVM has VMSAVE and VMLOAD")
    return l2


def test_vmsave_of_l1_is_logged(svm_l2: NestedGuest) -> None:
    """VMSAVE of L1 dirties its gfn, done by the CPU or by KVM (vmload_vmsave_interception(), arch/x86/kvm/svm/svm.c)."""
    vm = svm_l2.vm
    for value in (1, 2):
        before = bytes(vm.vm.memslots[SLOT].memory.view)
        vm.run(
            Operation("wrmsr", msr.MSR_KERNEL_GS_BASE, value),  # a part of what is saved
            Operation("vmsave", FIRST_GPA + 5 * PAGE),
        )
        assert vm.changed_pages(SLOT, before) == [5]
        vm.assert_dirty("vmsave", {SLOT: [5]})


def test_vmload_of_l1_writes_nothing(svm_l2: NestedGuest) -> None:
    """VMLOAD of L1 changes no page; only its own page may be reported.

    KVM maps that page for VMLOAD as for VMSAVE, and marks it dirty when it unmaps it (vmload_vmsave_interception()).
    """
    vm = svm_l2.vm
    page = FIRST_GPA + 5 * PAGE
    vm.run(Operation("vmsave", page))
    vm.collect()
    for _ in range(2):
        before = bytes(vm.vm.memslots[SLOT].memory.view)
        vm.run(Operation("vmload", page))
        assert vm.changed_pages(SLOT, before) == []
        assert vm.collect().dirty(SLOT) <= {5}
