# SPDX-License-Identifier: GPL-2.0-only
"""Writes of a nested guest (L2), and of KVM on behalf of L1 and L2, dirty the gfns of L1.

With nested paging KVM shadows L1's nested page tables for L2, beside the tables for L1 itself: a page has several mappings
then, and each has to be write-protected. Without nested paging L2 runs on L1's tables (TDP), or KVM shadows L2's own page
tables.
"""

from collections.abc import Callable, Iterator
from itertools import pairwise

import pytest

from dirty_tracking.mapping_sizes import MappingSizes
from dirty_tracking.platform import uses_tdp
from dirty_tracking.scripted_vm import LIST_SIZE, Operation, ScriptedVm
from dirty_tracking.vm import FIRST_GPA, GVA_OFFSET, PAGE
from kvm_util import uapi as kvm_uapi
from kvm_util.arch import current as arch
from kvm_util.arch.x86_64 import msr, svm
from kvm_util.arch.x86_64.cpuid import has_nested_paging, has_svm
from kvm_util.arch.x86_64.paging import PageTables
from kvm_util.arch.x86_64.uapi import kvm_sregs
from kvm_util.binary_stats import BinaryStats
from kvm_util.guest import GuestError
from kvm_util.host import Host
from kvm_util.kvm import Kvm
from kvm_util.memory import BACKINGS, GIB, MIB
from kvm_util.vcpu import Vcpu

SLOT, OWN = 1, 2
NPAGES = 24
# A memslot for the pages of L1 that KVM writes on its behalf: nested page tables, and the VMCB
OWN_GPA = FIRST_GPA + 64 * MIB
# The nested tables need seven pages at most: two for the upper levels, three for slot 0 and the two windows, and two below
TABLES, VMCB = range(NPAGES - 1), NPAGES - 1
# Where L2 has the test memslot, twice: gpas of L2 with nested paging; without it L1 uses the same tables
WINDOW, ALIAS = 8 * GIB, 9 * GIB
STACK_SIZE = 4 * PAGE
RING = 512
# KVM pushes each of its own writes to a ring (mark_page_dirty_in_slot()), and a page once for each of its mappings
MANY = 1000


class NestedGuest:
    """The L2 guest of the only vCPU of *vm*, with or without nested page tables. It does operations in L1's address space.

    :param page_size: of the nested page tables' entries for the test memslot, in bytes
    """

    def __init__(self, vm: ScriptedVm, nested: bool, page_size: int = PAGE) -> None:
        self.vm = vm
        self.nested = nested
        self.own = vm.vm.memslots[OWN].memory
        guest = vm.guest
        self.tables: PageTables | None = None
        slot = vm.vm.memslots[SLOT]
        if nested:
            pages = iter(TABLES)
            self.tables = PageTables(guest.guest_mode.levels, lambda: OWN_GPA + next(pages) * PAGE, self._table, nested)
            self.tables.map(0, 0, guest.size, 2 * MIB)
        for window in (WINDOW, ALIAS):
            vm.map_at(window + GVA_OFFSET, window if nested else slot.gpa, slot.npages)
            if self.tables:
                self.tables.map(window, slot.gpa, slot.npages * PAGE, page_size)
        self._block, self._list = guest.allocate(PAGE), guest.allocate(LIST_SIZE)
        guest.memory(self._block, PAGE).cast("Q")[0] = self._list
        self._stack = guest.allocate(STACK_SIZE) + STACK_SIZE
        vm.run(
            Operation("wrmsr", msr.MSR_EFER, self._sregs().efer | msr.EFER_SVME),
            Operation("wrmsr", msr.MSR_VM_HSAVE_PA, guest.allocate(PAGE)),
        )

    def _table(self, gpa: int) -> memoryview:
        first = (gpa - OWN_GPA) // 8
        return self.own.words[first : first + PAGE // 8]

    def _sregs(self) -> kvm_sregs:
        return arch.get_sregs(self.vm.vm.vcpus[0].fd)

    def address(self, page: int, window: int = WINDOW) -> int:
        """The gva at which L2 has a page of the test memslot."""
        return window + page * PAGE + GVA_OFFSET

    def run(self, *operations: Operation, on_exit: Callable[[Vcpu], bool] | None = None) -> None:
        """Have L1 run L2, and L2 do *operations* and return to L1.

        :raises GuestError: L2 exited in another way
        """
        self.vm.write_list(self._list, operations, end="vmmcall")
        root = self.tables.root if self.tables else None
        with self.own.view[VMCB * PAGE : (VMCB + 1) * PAGE] as vmcb:
            svm.fill_vmcb(vmcb, self._sregs(), self.vm.guest.program.symbols["guest_main"], self._stack, root)
            self.vm.run(Operation("vmrun", OWN_GPA + VMCB * PAGE, self._block), on_exit=on_exit)
            if (code := svm.exit_code(vmcb)) != svm.VMEXIT_VMMCALL:
                raise GuestError(f"L2 ended with exit code {code:#x}")

    def write(self, *pages: int, window: int = WINDOW) -> None:
        """Have L2 write a word into each of *pages*."""
        self.run(*(Operation("store_8", self.address(page, window), 1) for page in pages))

    def load(self, *pages: int) -> None:
        """Have L2 read a word of each of *pages*."""
        self.run(*(Operation("load", self.address(page)) for page in pages))


@pytest.fixture(params=[True, False], ids=["nested-paging", "no-nested-paging"])
def nested(request: pytest.FixtureRequest, kvm: Kvm) -> bool:
    """Whether L2 has nested page tables; skips where KVM does not offer that."""
    cpuid = kvm.supported_cpuid
    if not has_svm(cpuid):
        pytest.skip("KVM offers its guests no SVM here (CPUID SVM)")
    if request.param and not has_nested_paging(cpuid):
        pytest.skip("KVM offers its guests no nested paging here (CPUID NP)")
    return bool(request.param)


@pytest.fixture
def l2(kvm: Kvm, log_mode: str, nested: bool) -> Iterator[NestedGuest]:
    """An L2 guest that has run once, and has not accessed the logged test memslot yet."""
    with ScriptedVm(kvm, log_mode, ring_count=RING) as vm:
        vm.add_slot(SLOT, FIRST_GPA, NPAGES)
        vm.add_slot(OWN, OWN_GPA, NPAGES, logged=False)
        guest = NestedGuest(vm, nested)
        guest.run()
        vm.assert_dirty("the start of L2", {})
        yield guest


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


def test_vmcb_and_nested_table_writes(l2: NestedGuest) -> None:
    """The VMCB is dirty after each exit of L2, and a nested page table after KVM set an accessed or dirty bit in it."""
    vm = l2.vm
    vm.enable_dirty_logging(OWN)
    l2.run()
    vm.collect()
    for name, page, sets_bits in (("load", 3, True), ("store_8", 3, True), ("store_8", 5, True), ("store_8", 5, False)):
        before = bytes(l2.own.view)
        l2.run(Operation(name, l2.address(page), 1))
        tables = [own for own in vm.changed_pages(OWN, before) if own in TABLES]
        assert bool(tables) == (l2.nested and sets_bits)
        stored = [page] if name == "store_8" else []
        report = vm.collect()
        assert (report.dirty(OWN), report.entries(SLOT)) == ({*tables, VMCB}, stored)


def test_vmsave_of_l1_is_logged(l2: NestedGuest) -> None:
    """VMSAVE of L1 dirties its gfn, done by the CPU or by KVM (vmload_vmsave_interception(), arch/x86/kvm/svm/svm.c)."""
    vm = l2.vm
    for value in (1, 2):
        before = bytes(vm.vm.memslots[SLOT].memory.view)
        vm.run(
            Operation("wrmsr", msr.MSR_KERNEL_GS_BASE, value),  # a part of what is saved
            Operation("vmsave", FIRST_GPA + 5 * PAGE),
        )
        assert vm.changed_pages(SLOT, before) == [5]
        vm.assert_dirty("vmsave", {SLOT: [5]})


def test_vmload_of_l1_writes_nothing(l2: NestedGuest) -> None:
    """VMLOAD of L1 changes no page; only its own page may be reported.

    KVM maps that page for VMLOAD as for VMSAVE, and marks it dirty when it unmaps it (vmload_vmsave_interception()).
    """
    vm = l2.vm
    page = FIRST_GPA + 5 * PAGE
    vm.run(Operation("vmsave", page))
    vm.collect()
    for _ in range(2):
        before = bytes(vm.vm.memslots[SLOT].memory.view)
        vm.run(Operation("vmload", page))
        assert vm.changed_pages(SLOT, before) == []
        assert vm.collect().dirty(SLOT) <= {5}
