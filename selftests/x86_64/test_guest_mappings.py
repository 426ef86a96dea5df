# SPDX-License-Identifier: GPL-2.0-only
"""What the guest's own page tables allow does not change what is logged, be it that KVM shadows them or not."""

import pytest

from dirty_tracking.platform import uses_tdp
from dirty_tracking.scripted_vm import Operation, ScriptedVm
from dirty_tracking.vm import FIRST_GPA, PAGE
from kvm_util.arch import current as arch
from kvm_util.arch.x86_64 import uapi
from kvm_util.guest import GuestError
from kvm_util.host import Host
from kvm_util.ioctl import ioctl
from kvm_util.kvm import Kvm
from kvm_util.memory import MIB
from selftests.stores import NPAGES, SLOT, SLOT_GPA, SPARE_GVA, WRITTEN

# Bits of a page table's entry, and of CR0
WRITABLE, ACCESSED_AND_DIRTY = 1 << 1, 1 << 5 | 1 << 6
WP = 1 << 16
FEWEST_MMU_PAGES = 64  # KVM_MIN_ALLOC_MMU_PAGES, arch/x86/include/asm/kvm_host.h

LOAD, STORE = Operation("load", SPARE_GVA), Operation("store_8", SPARE_GVA, 1)


def map_read_only(vm: ScriptedVm, page: int, npages: int = 1) -> int:
    """Map pages of the memslot at SPARE_GVA, read-only; returns the gpa of the first one's entry."""
    tables = vm.guest.page_tables
    tables.map(SPARE_GVA, SLOT_GPA + page * PAGE, npages * PAGE, writable=False)
    return tables.entry(SPARE_GVA)


@pytest.mark.parametrize("name", ["invlpg", "write_cr3"])
def test_guest_pte_turned_writable(logged_vm: ScriptedVm, name: str) -> None:
    """A store to a page whose entry in the guest's page table has just turned writable is logged, and loads before are not.

    The entry may be dirty already; then KVM may map the page writable, and log it, when it brings its shadow of the table
    up to date (FNAME(sync_spte)(), arch/x86/kvm/mmu/paging_tmpl.h; make_spte()).
    """
    vm = logged_vm
    flush = Operation(name, SPARE_GVA if name == "invlpg" else arch.get_sregs(vm.vm.vcpus[0].fd).cr3)
    entry = map_read_only(vm, WRITTEN)
    read_only = int.from_bytes(vm.guest.read(entry, 8), "little")
    for absent_first in (False, True):
        for bits in (WRITABLE, WRITABLE | ACCESSED_AND_DIRTY):
            vm.run(Operation("store_8", entry, read_only), flush)
            vm.collect()
            vm.run(LOAD)
            vm.assert_dirty("a load through an entry that is read-only", {})
            if absent_first:
                vm.run(Operation("store_8", entry, 0), flush)
            # An entry that was absent is in no TLB, and needs no flush.
            vm.run(Operation("store_8", entry, read_only | bits), *([] if absent_first else [flush]), STORE)
            vm.assert_dirty("a store through an entry that has turned writable", {SLOT: [WRITTEN]}, 2)
            vm.run(STORE)
            vm.assert_dirty("the next store", {SLOT: [WRITTEN]}, 2)


def test_loads_through_read_only_mapping(logged_vm: ScriptedVm, host: Host) -> None:
    """Loads of pages that the guest, and so KVM's shadow of its tables, maps read-only dirty no gfn."""
    vm = logged_vm
    map_read_only(vm, 0, NPAGES)
    vm.vm.memslots[SLOT].memory.populate()
    loads = [Operation("load", SPARE_GVA + page * PAGE) for page in range(NPAGES)]
    vm.run(*loads)
    report = vm.collect()
    # With TDP the loads map the pages writable, and KVM logs that: test_execution_is_not_logged() has what that means.
    vm.assert_report("loads that map the pages", {SLOT: report.dirty(SLOT) if uses_tdp(host) else ()}, report)
    vm.run(*loads)
    vm.assert_dirty("loads of mapped pages", {})
    vm.write(SLOT, WRITTEN)
    vm.run(*loads)
    vm.assert_dirty("loads, and a store through another mapping", {SLOT: [WRITTEN]})
    vm.run(*loads)
    vm.assert_dirty("loads of pages, one of which was written", {})


def test_stores_with_write_protect_off(logged_vm: ScriptedVm) -> None:
    """With CR0.WP clear, stores of the supervisor through read-only mappings are logged, also when WP was set in between."""
    vm = logged_vm
    map_read_only(vm, WRITTEN)
    cr0 = arch.get_sregs(vm.vm.vcpus[0].fd).cr0
    wp_on, wp_off = Operation("write_cr0", cr0 | WP), Operation("write_cr0", cr0 & ~WP)
    writable = Operation("store_8", vm.address(SLOT, WRITTEN), 2)
    for operations in ([wp_off, STORE], [STORE], [wp_on, LOAD, wp_off, STORE], [wp_on, writable], [wp_off, STORE]):
        vm.run(*operations)
        vm.assert_dirty(" ".join(operation.name for operation in operations), {SLOT: [WRITTEN]})
    with pytest.raises(GuestError, match="#PF"):
        vm.run(wp_on, STORE)
    vm.assert_dirty("a store that faults since WP is set", {})


def test_writes_with_few_mmu_pages(kvm: Kvm, host: Host, log_mode: str) -> None:
    """No write is forgotten when KVM has to drop shadow page tables, since KVM_SET_NR_MMU_PAGES has left it few."""
    if uses_tdp(host):
        pytest.skip("with TDP KVM shadows no page tables (kvm_amd.npt=0 or kvm_intel.ept=0 switches TDP off)")
    if not kvm.check_extension(uapi.KVM_CAP_MMU_SHADOW_CACHE_CONTROL):
        pytest.skip("no KVM_CAP_MMU_SHADOW_CACHE_CONTROL, for KVM_SET_NR_MMU_PAGES")
    npages = 2 * FEWEST_MMU_PAGES
    with ScriptedVm(kvm, log_mode) as vm:
        vm.add_slot(SLOT, FIRST_GPA, npages + NPAGES)
        stores = []
        for page in range(npages):
            gva = SPARE_GVA + page * 2 * MIB  # each in a page table of its own
            vm.map_at(gva, FIRST_GPA + page * PAGE, 1)
            stores.append(Operation("store_8", gva, page))
        vm.run(*stores[:-10])
        ioctl(vm.vm.fd, uapi.KVM_SET_NR_MMU_PAGES, "KVM_SET_NR_MMU_PAGES", FEWEST_MMU_PAGES)
        vm.run(*stores[-10:])
        vm.assert_dirty("stores before and after KVM_SET_NR_MMU_PAGES", {SLOT: range(npages)})
        for _ in range(2):
            vm.run(*stores)
            vm.assert_dirty("stores for which KVM has too few pages", {SLOT: range(npages)})
