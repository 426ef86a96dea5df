# SPDX-License-Identifier: GPL-2.0-only
"""Every store of the guest dirties the gfns that it writes, and nothing else does.

The stores are the plain ones, which all architectures have, and those of this machine's selftests/<arch>/stores.py.
"""

from dataclasses import replace
from importlib import import_module

import pytest

from dirty_tracking.scripted_vm import Operation, ScriptedVm
from dirty_tracking.vm import FIRST_GPA, PAGE
from kvm_util import uapi
from kvm_util.arch import current as arch
from kvm_util.guest import GuestError
from kvm_util.kvm import Kvm
from kvm_util.vcpu import Vcpu
from selftests.stores import (
    NEIGHBOUR,
    NPAGES,
    SLOT,
    SLOT_GPA,
    SPARE_GVA,
    WRITTEN,
    MaxEntries,
    SkipUnemulated,
    Store,
    check_store_twice,
)

OWN = import_module(f"selftests.{arch.NAME}.stores")
STORES = [*(Store(f"store_{size}", size) for size in (1, 2, 4, 8, 16)), *OWN.STORES]
FAULTING = {"store": Operation("store_8", 0, 0xA5), **OWN.FAULTING}


@pytest.mark.parametrize("store", STORES, ids=str)
def test_store_is_logged(
    logged_vm: ScriptedVm, skip_unemulated: SkipUnemulated, max_entries: MaxEntries, store: Store
) -> None:
    """A store dirties its gfn, at the beginning and at the end of the page, and again after each collection."""
    for offset in (0, PAGE - store.size):
        with skip_unemulated(store.name):
            check_store_twice(logged_vm, store, offset, [WRITTEN], max_entries(store.writes))


@pytest.mark.parametrize("store", [store for store in STORES if store.straddles], ids=str)
def test_store_across_page_boundary(logged_vm: ScriptedVm, max_entries: MaxEntries, store: Store) -> None:
    """A store that straddles two pages dirties both gfns, also where they belong to different memslots."""
    vm, most = logged_vm, max_entries(store.writes)
    check_store_twice(vm, store, PAGE - store.size // 2, [WRITTEN, WRITTEN + 1], most)
    vm.run(Operation(store.name, vm.address(NEIGHBOUR, 0, -(store.size // 2)), store.value, store.count))
    vm.assert_dirty(f"{store} across the end of a memslot", {SLOT: [NPAGES - 1], NEIGHBOUR: [0]}, most)


@pytest.mark.parametrize("operation", FAULTING.values(), ids=list(FAULTING))
def test_faulting_store_is_not_logged(
    logged_vm: ScriptedVm, skip_unemulated: SkipUnemulated, operation: Operation
) -> None:
    """A store that faults in the guest's own page tables changes nothing and dirties no gfn."""
    vm = logged_vm
    vm.guest.page_tables.map(SPARE_GVA, SLOT_GPA, NPAGES * PAGE, writable=False)
    before = bytes(vm.vm.memslots[SLOT].memory.view)
    with skip_unemulated(operation.name), pytest.raises(GuestError, match="page fault"):
        vm.run(replace(operation, address=SPARE_GVA + WRITTEN * PAGE))
    vm.assert_dirty(f"{operation.name} to a page that is read-only in the guest", {})
    assert bytes(vm.vm.memslots[SLOT].memory.view) == before, "the store changed memory"


@pytest.mark.parametrize("operation", FAULTING.values(), ids=list(FAULTING))
def test_store_faulting_in_second_page(
    logged_vm: ScriptedVm, skip_unemulated: SkipUnemulated, emulates: bool, boundary_gva: int, operation: Operation
) -> None:
    """A store across two pages that faults in the second one writes neither; at most the first one is reported.

    KVM handles the CPU's attempt to write the first page before the guest takes the fault.
    """
    before = bytes(logged_vm.vm.memslots[SLOT].memory.view)
    with skip_unemulated(operation.name), pytest.raises(GuestError, match="page fault"):
        logged_vm.run(replace(operation, address=boundary_gva - 4))
    changed = logged_vm.changed_pages(SLOT, before)
    # KVM's emulator writes the first page before it looks at the second (emulator_read_write(), arch/x86/kvm/x86.c).
    assert emulates or not changed, f"a store that faulted changed pages {changed}"
    report = logged_vm.collect()
    dirty = report.dirty(SLOT)
    assert set(changed) <= dirty <= {WRITTEN}, f"pages {changed} changed, and KVM reports {sorted(dirty)}"
    assert not report.dirty(NEIGHBOUR), "KVM reports pages of the other memslot"


def test_store_to_readonly_memslot(kvm: Kvm, log_mode: str) -> None:
    """A store to a read-only memslot exits with KVM_EXIT_MMIO, leaves memory as it is and dirties no gfn."""
    if not kvm.check_extension(uapi.KVM_CAP_READONLY_MEM):
        pytest.skip("no KVM_CAP_READONLY_MEM")
    exits = []

    def write_exit(vcpu: Vcpu) -> bool:
        run = vcpu.run
        if run.exit_reason != uapi.KVM_EXIT_MMIO or not run.mmio.is_write:
            return False
        exits.append(run.mmio.phys_addr)
        return True

    with ScriptedVm(kvm, log_mode) as vm:
        vm.add_slot(SLOT, FIRST_GPA, NPAGES, readonly=True)
        vm.add_slot(NEIGHBOUR, FIRST_GPA + NPAGES * PAGE, NPAGES)
        vm.run(*(Operation("load", vm.address(SLOT, page)) for page in range(NPAGES)))
        stores = [Operation("store_8", vm.address(SLOT, page), 0xA5) for page in (0, WRITTEN, NPAGES - 1)]
        vm.run(*stores, on_exit=write_exit)
        assert exits == [FIRST_GPA + page * PAGE for page in (0, WRITTEN, NPAGES - 1)]
        vm.write(NEIGHBOUR, 0)
        vm.assert_dirty("stores to a read-only memslot, and one to its neighbour", {NEIGHBOUR: [0]})
        assert not any(vm.vm.memslots[SLOT].memory.view)


@pytest.mark.parametrize("name", ["load", "prefetch", *OWN.NON_WRITING])
def test_non_writing_access_is_not_logged(logged_vm: ScriptedVm, name: str) -> None:
    """Loads, prefetches and the like dirty no gfn, and a later store is still logged."""
    logged_vm.run(*(Operation(name, logged_vm.address(SLOT, page)) for page in range(NPAGES)))
    logged_vm.assert_dirty(name, {})
    logged_vm.write(SLOT, WRITTEN)
    logged_vm.assert_dirty(f"a store after {name}", {SLOT: [WRITTEN]})


def test_execution_is_not_logged(logged_vm: ScriptedVm) -> None:
    """Executing code dirties no gfn once its page is mapped.

    The host's write of the code unmaps the page. The first access of any kind maps it writable again, and KVM counts it as
    dirty from then on (make_spte(), arch/x86/kvm/mmu/spte.c).
    """
    code, start = arch.RETURN_INSTRUCTION, WRITTEN * PAGE
    logged_vm.vm.memslots[SLOT].memory.view[start : start + len(code)] = code
    call = Operation("execute", logged_vm.address(SLOT, WRITTEN))
    logged_vm.run(call)
    logged_vm.collect()
    logged_vm.run(call)
    logged_vm.assert_dirty("a call into the memslot", {})


def test_user_space_writes_are_not_logged(logged_vm: ScriptedVm) -> None:
    """Writes of user space through its own mapping are not logged: the dirty log is of the guest's writes (api.rst 4.8)."""
    memory = logged_vm.vm.memslots[SLOT].memory.view
    for page in range(NPAGES):
        memory[page * PAGE] = 1
    logged_vm.assert_dirty("writes through the host's mapping", {})


def test_memslot_without_dirty_logging(logged_vm: ScriptedVm) -> None:
    """Writes to a memslot whose dirty logging was disabled are not reported, and those to a logged one are."""
    logged_vm.disable_dirty_logging(NEIGHBOUR)
    logged_vm.write(NEIGHBOUR, 1, 2)
    logged_vm.write(SLOT, WRITTEN)
    logged_vm.assert_dirty("writes to a memslot without dirty logging, and one to a logged memslot", {SLOT: [WRITTEN]})
