# SPDX-License-Identifier: GPL-2.0-only
"""A guest (L1) with a guest of its own (L2): what L2 writes is reported as pages of L1, and so is what KVM writes for both.

With nested paging KVM makes page tables of its own for L2 from L1's nested page tables, beside those for L1: a page has
several mappings then, and tracking has to be armed in each. Without it L2 has L1's where the CPU translates L1's addresses
(TDP), and else KVM shadows L2's own page tables.
"""

from collections.abc import Callable, Iterator
from itertools import pairwise

import pytest

from dirty_tracking.mapping_sizes import MappingSizes
from dirty_tracking.platform import uses_tdp
from dirty_tracking.tracked_vm import FIRST_GPA, GVA_OFFSET, LIST_SIZE, PAGE, Operation, TrackedVm
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
# A slot for the pages of L1's that KVM writes for it: nested page tables, and the VMCB
OWN_GPA = FIRST_GPA + 64 * MIB
# The nested tables need seven pages at most: two for the upper levels, three for slot 0 and the two windows, and two below
TABLES, VMCB = range(NPAGES - 1), NPAGES - 1
# Where L2 sees the test slot, at two addresses: guest-physical ones with nested paging; without it L1 uses the same tables
WINDOW, ALIAS = 8 * GIB, 9 * GIB
STACK_SIZE = 4 * PAGE
RING = 512
# KVM pushes each of its own writes to a ring (mark_page_dirty_in_slot()); and a page that is mapped in several page tables
# is pushed by each of them
MANY = 1000


class InnerGuest:
    """L2 of the only vCPU of *vm*, with or without nested page tables. It does operations, in the address space of L1's.

    :param page_size: of the nested page tables' entries for the test slot, in bytes
    """

    def __init__(self, vm: TrackedVm, nested: bool, page_size: int = PAGE) -> None:
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
        """Where L2 sees a page of the test slot."""
        return window + page * PAGE + GVA_OFFSET

    def run(self, *operations: Operation, on_exit: Callable[[Vcpu], bool] | None = None) -> None:
        """Have L1 run L2, and L2 do *operations* and come back.

        :raises GuestError: L2 ended otherwise
        """
        self.vm.write_list(self._list, operations, end="vmmcall")
        root = self.tables.root if self.tables else None
        with self.own.view[VMCB * PAGE : (VMCB + 1) * PAGE] as vmcb:
            svm.fill_vmcb(vmcb, self._sregs(), self.vm.guest.program.symbols["guest_main"], self._stack, root)
            self.vm.run(Operation("vmrun", OWN_GPA + VMCB * PAGE, self._block), on_exit=on_exit)
            if (code := svm.exit_code(vmcb)) != svm.VMEXIT_VMMCALL:
                raise GuestError(f"the guest's guest ended with exit code {code:#x}")

    def write(self, *pages: int, window: int = WINDOW) -> None:
        """Have L2 write a word into each of *pages*."""
        self.run(*(Operation("store_8", self.address(page, window), 1) for page in pages))

    def load(self, *pages: int) -> None:
        """Have L2 read a word of each of *pages*."""
        self.run(*(Operation("load", self.address(page)) for page in pages))


@pytest.fixture(params=[True, False], ids=["nested-paging", "no-nested-paging"])
def nested(request: pytest.FixtureRequest, kvm: Kvm) -> bool:
    """Whether L2 has nested page tables; skips where KVM has neither L2 nor those."""
    cpuid = arch.get_supported_cpuid(kvm.fd)
    if not has_svm(cpuid):
        pytest.skip("KVM offers its guests no SVM here (CPUID SVM)")
    if request.param and not has_nested_paging(cpuid):
        pytest.skip("KVM offers its guests no nested paging here (CPUID NP)")
    return bool(request.param)


@pytest.fixture
def inner(kvm: Kvm, log_mode: str, nested: bool) -> Iterator[InnerGuest]:
    """L2, which has run once; of the test slot nothing was accessed so far."""
    with TrackedVm(kvm, log_mode, ring_count=RING) as vm:
        vm.add_slot(SLOT, FIRST_GPA, NPAGES)
        vm.add_slot(OWN, OWN_GPA, NPAGES, tracked=False)
        guest = InnerGuest(vm, nested)
        guest.run()
        vm.assert_dirty("L2's start", {})
        yield guest


def test_a_store_of_l2_is_reported(inner: InnerGuest) -> None:
    """Each time, also where the page is mapped already."""
    for pages in ([3], [3, 4], [0, NPAGES - 1], [4]):
        inner.write(*pages)
        inner.vm.assert_dirty(f"L2's stores to pages {pages}", {SLOT: pages})


def test_a_load_of_l2_is_not_reported(inner: InnerGuest) -> None:
    inner.load(*range(NPAGES))
    inner.vm.assert_dirty("L2's loads", {})
    inner.write(5)
    inner.vm.assert_dirty("a store of L2 to a page that it has read", {SLOT: [5]})
    inner.load(*range(NPAGES))
    inner.vm.assert_dirty("L2's loads of pages, one of which it has written before", {})


def test_stores_of_both_guests_are_reported(inner: InnerGuest) -> None:
    """Both have the page mapped writable; then the one writes it, and then the other."""
    vm = inner.vm
    for _ in range(3):
        inner.write(7, 8)
        vm.write(SLOT, 7, 9)
        vm.assert_dirty("stores of both guests", {SLOT: [7, 8, 9]}, MANY)
        inner.write(7)
        vm.assert_dirty("a store of L2 after one of L1", {SLOT: [7]})
        vm.write(SLOT, 7)
        vm.assert_dirty("a store of L1 after one of L2", {SLOT: [7]})


def test_stores_through_two_addresses_are_reported(inner: InnerGuest) -> None:
    """L1's nested page tables, or its own, map a page twice: in what KVM makes of them it may have two mappings."""
    vm = inner.vm
    for _ in range(2):
        inner.write(6)
        inner.write(6, 7, window=ALIAS)
        vm.assert_dirty("stores of L2 through two addresses", {SLOT: [6, 7]}, MANY)
        for window in (WINDOW, ALIAS, WINDOW):
            inner.write(6, window=window)
            vm.assert_dirty(f"a store of L2 through {window:#x}", {SLOT: [6]})


def test_tracking_is_switched_on_under_l2(inner: InnerGuest) -> None:
    """Its pages are mapped writable by then, for both guests."""
    vm = inner.vm
    for _ in range(2):
        vm.disable_dirty_logging(SLOT)
        inner.write(*range(NPAGES))
        vm.write(SLOT, *range(NPAGES))
        vm.enable_dirty_logging(SLOT)
        inner.write(1, NPAGES - 1)
        vm.assert_dirty("stores of L2 after switching on", {SLOT: [1, NPAGES - 1]})
        vm.write(SLOT, 2)
        vm.assert_dirty("a store of L1 after that", {SLOT: [2]})


@pytest.mark.parametrize("page_size", [PAGE, 2 * MIB], ids=["4k", "2m"])
def test_huge_pages_of_l2_are_reported_page_by_page(
    kvm: Kvm,
    host: Host,
    log_mode: str,
    nested: bool,
    page_size: int,
) -> None:
    """KVM maps huge pages of the host for L2, where the tables that it shadows have them; with tracking it must not."""
    npages = 2 * 512
    if reason := BACKINGS["anonymous_thp"].missing(npages * PAGE):
        pytest.skip(reason)
    if not kvm.check_extension(kvm_uapi.KVM_CAP_BINARY_STATS_FD):
        pytest.skip("this KVM has no KVM_CAP_BINARY_STATS_FD, which tells whether a page is mapped huge")
    guest_mode = "48bit-4k" if page_size == PAGE and not nested else "48bit-2m"
    with TrackedVm(kvm, log_mode, guest_mode=guest_mode, ring_count=2 * npages) as vm:
        slot = vm.add_slot(SLOT, FIRST_GPA, npages, backing="anonymous_thp", tracked=False)
        vm.add_slot(OWN, OWN_GPA, NPAGES, tracked=False)
        slot.memory.populate()
        inner = InnerGuest(vm, nested, page_size)
        inner.write(*range(0, npages, 64))
        with BinaryStats(vm.vm.get_stats_fd()) as stats:
            assert (MappingSizes.read(stats).pages_2m > 0) == (page_size > PAGE or (uses_tdp(host) and not nested))
        vm.enable_dirty_logging(SLOT)
        for pages in ([0, 511], [512, 513, npages - 1], [0, 700]):
            inner.write(*pages)
            vm.assert_dirty(f"L2's stores to pages {pages}", {SLOT: pages})
        vm.write(SLOT, 1, 512)
        vm.assert_dirty("L1's stores", {SLOT: [1, 512]})


@pytest.mark.log_modes("ring")
def test_a_ring_that_fills_under_l2_stops_it(kvm: Kvm, log_mode: str, nested: bool) -> None:
    """And L2 goes on after the reset; every one of its stores is reported."""
    npages = 2 * RING
    with TrackedVm(kvm, log_mode, ring_count=RING) as vm:
        vm.add_slot(SLOT, FIRST_GPA, npages)
        vm.add_slot(OWN, OWN_GPA, NPAGES, tracked=False)
        inner = InnerGuest(vm, nested)
        harvests: list[list[int]] = []

        def full(vcpu: Vcpu) -> bool:
            if vcpu.exit_reason() != "KVM_EXIT_DIRTY_RING_FULL":
                return False
            harvests.append(vm.collect().entries(SLOT))
            return True

        inner.run(*(Operation("store_8", inner.address(page), 1) for page in range(npages)), on_exit=full)
        assert harvests, "the ring did not fill"
        harvests.append(vm.collect().entries(SLOT))
        # The store that filled the ring was not done yet: it faults, and is reported, once more.
        for last, following in pairwise(harvests):
            if following and following[:1] == last[-1:]:
                del following[0]
        assert [page for harvest in harvests for page in harvest] == list(range(npages))


def test_what_kvm_writes_for_l1_is_reported(inner: InnerGuest) -> None:
    """The VMCB, where L1 finds how L2 ended; and the accessed and dirty bits of the nested page tables."""
    vm = inner.vm
    vm.enable_dirty_logging(OWN)
    inner.run()
    vm.collect()
    for name, page, sets_bits in (("load", 3, True), ("store_8", 3, True), ("store_8", 5, True), ("store_8", 5, False)):
        before = bytes(inner.own.view)
        inner.run(Operation(name, inner.address(page), 1))
        tables = [own for own in vm.changed_pages(OWN, before) if own in TABLES]
        assert bool(tables) == (inner.nested and sets_bits)
        stored = [page] if name == "store_8" else []
        report = vm.collect()
        assert (report.dirty(OWN), report.entries(SLOT)) == ({*tables, VMCB}, stored)


def test_a_vmsave_of_l1_is_reported(inner: InnerGuest) -> None:
    """Whether the CPU saves L1's state to the page, or KVM does (vmload_vmsave_interception(), arch/x86/kvm/svm/svm.c)."""
    vm = inner.vm
    for value in (1, 2):
        before = bytes(vm.vm.memslots[SLOT].memory.view)
        vm.run(
            Operation("wrmsr", msr.MSR_KERNEL_GS_BASE, value),  # a part of what is saved
            Operation("vmsave", FIRST_GPA + 5 * PAGE),
        )
        assert vm.changed_pages(SLOT, before) == [5]
        vm.assert_dirty("vmsave", {SLOT: [5]})


def test_a_vmload_of_l1_writes_nothing(inner: InnerGuest) -> None:
    """Its page may be reported nevertheless: KVM maps it for VMLOAD as for VMSAVE, and marks it dirty as it unmaps it."""
    vm = inner.vm
    page = FIRST_GPA + 5 * PAGE
    vm.run(Operation("vmsave", page))
    vm.collect()
    for _ in range(2):
        before = bytes(vm.vm.memslots[SLOT].memory.view)
        vm.run(Operation("vmload", page))
        assert vm.changed_pages(SLOT, before) == []
        assert vm.collect().dirty(SLOT) <= {5}
