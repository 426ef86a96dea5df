# SPDX-License-Identifier: GPL-2.0-only
"""Dirty logging, page tables and the vCPU's state change while L2 runs: its writes are logged all the same."""

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from dirty_tracking.report import DirtyReport
from dirty_tracking.scripted_vm import Operation, ScriptedVm
from dirty_tracking.vm import FIRST_GPA, GVA_OFFSET, PAGE
from kvm_util.arch import current as arch
from kvm_util.arch.x86_64 import uapi
from kvm_util.ioctl import ioctl
from kvm_util.kvm import Kvm
from kvm_util.vcpu import Vcpu
from selftests.pause import PAUSE, paused
from selftests.x86_64 import smram
from selftests.x86_64.nested import MANY, NPAGES, OWN, OWN_GPA, RING, SLOT, WINDOW, NestedGuest

# More than KVM_GET_NESTED_STATE needs: a header, and the VMCB of SVM or the VMCS of VMX
STATE_SIZE = 2 * PAGE


def store(l2: NestedGuest, page: int) -> Operation:
    return Operation("store_8", l2.address(page), 1)


@pytest.fixture(autouse=True)
def nested_state(kvm: Kvm, nested: bool) -> None:
    """Skips where KVM_GET_NESTED_STATE is missing, which shows whether the vCPU is in L2."""
    if not kvm.check_extension(uapi.KVM_CAP_NESTED_STATE):
        pytest.skip("no KVM_CAP_NESTED_STATE: it came with Linux 4.20, for SVM with 5.8")


@dataclass
class VcpuState:
    """What of a vCPU's state its progress in L2 changes."""

    regs: uapi.kvm_regs
    sregs: uapi.kvm_sregs
    nested: "ctypes.Array[ctypes.c_char]"

    @classmethod
    def read(cls, vcpu: Vcpu) -> "VcpuState":
        nested = ctypes.create_string_buffer(STATE_SIZE)
        uapi.kvm_nested_state.from_buffer(nested).size = STATE_SIZE
        ioctl(vcpu.fd, uapi.KVM_GET_NESTED_STATE, "KVM_GET_NESTED_STATE", nested)
        return cls(arch.get_regs(vcpu.fd), arch.get_sregs(vcpu.fd), nested)

    def restore(self, vcpu: Vcpu) -> None:
        ioctl(vcpu.fd, uapi.KVM_SET_SREGS, "KVM_SET_SREGS", ctypes.byref(self.sregs))
        ioctl(vcpu.fd, uapi.KVM_SET_NESTED_STATE, "KVM_SET_NESTED_STATE", self.nested)
        ioctl(vcpu.fd, uapi.KVM_SET_REGS, "KVM_SET_REGS", ctypes.byref(self.regs))

    @property
    def in_l2(self) -> bool:
        return bool(uapi.kvm_nested_state.from_buffer(self.nested).flags & uapi.KVM_STATE_NESTED_GUEST_MODE)


def test_logging_toggled_while_in_l2(kvm: Kvm, log_mode: str, nested: bool) -> None:
    """Writes of L2, of its L1 and of another vCPU are logged after dirty logging was enabled while a vCPU is in L2."""
    with ScriptedVm(kvm, log_mode, vcpus=2, ring_count=RING) as vm:
        vm.add_slot(SLOT, FIRST_GPA, NPAGES, logged=False)
        vm.add_slot(OWN, OWN_GPA, NPAGES, logged=False)
        l2 = NestedGuest(vm, nested)
        l2.write(*range(NPAGES))
        for vcpu in (0, 1):
            vm.write(SLOT, *range(NPAGES), vcpu=vcpu)

        def steps() -> Iterator[None]:
            for _ in range(2):
                assert VcpuState.read(vm.vm.vcpus[0]).in_l2
                vm.enable_dirty_logging(SLOT)
                vm.write(SLOT, 3, vcpu=1)
                yield
                vm.assert_dirty("stores of L2 and another vCPU", {SLOT: [3, 4]})
                vm.disable_dirty_logging(SLOT)
                vm.write(SLOT, 5, vcpu=1)
                yield
            vm.enable_dirty_logging(SLOT)
            vm.write(SLOT, 5, vcpu=1)
            yield
            vm.write(SLOT, 6)
            vm.assert_dirty("stores of L2, L1 and another vCPU", {SLOT: [4, 5, 6]})

        l2.run_in_steps(steps(), *[PAUSE, store(l2, 4)] * 5)


def test_restored_l2_is_logged(l2: NestedGuest) -> None:
    """L2's stores are logged after its vCPU's state was restored with KVM_SET_NESTED_STATE, and L2 repeats them."""
    vm = l2.vm
    (vcpu,) = vm.vm.vcpus

    def steps() -> Iterator[None]:
        saved = VcpuState.read(vcpu)
        assert saved.in_l2
        yield
        for _ in range(2):
            vm.assert_dirty("stores of L2", {SLOT: [3, 4]})
            saved.restore(vcpu)
            yield
        vm.assert_dirty("stores that L2 repeated", {SLOT: [3, 4]})
        yield
        vm.assert_dirty("a store after that", {SLOT: [5]})

    l2.run_in_steps(steps(), PAUSE, store(l2, 3), store(l2, 4), PAUSE, store(l2, 5))


def test_l2_mapping_changed_while_logging(l2: NestedGuest) -> None:
    """A store of L2 through a mapping that L2 or L1 has just changed is logged for the page that is mapped now.

    The other page may be reported too: when KVM brings its shadow of a table up to date, it maps writable what is writable and
    dirty by the table, and logs it (FNAME(sync_spte)(), arch/x86/kvm/mmu/paging_tmpl.h; make_spte()).
    """
    vm, here, there = l2.vm, 3, 10
    own = vm.guest.page_tables.entry(l2.address(here))

    def assert_logged(what: str, page: int) -> None:
        report = vm.collect()
        may_be = report.dirty(SLOT) & {here, there}
        vm.assert_report(what, {SLOT: {page} | may_be}, report, MANY)

    l2.write(here)
    assert_logged("a store of L2", here)
    word = int.from_bytes(vm.guest.read(own, 8), "little")
    for page in (there, here):
        change = Operation("store_8", own, word + (page - here) * PAGE)
        l2.run(change, Operation("invlpg", l2.address(here)), store(l2, here))
        assert_logged("a store of L2 after it has changed its own page table", page)
        l2.write(here)
        assert_logged("its next store", page)
    if l2.tables is None:
        return
    nested = l2.tables.entry(WINDOW + here * PAGE)
    word = l2.own.words[(nested - OWN_GPA) // 8]
    for page in (there, here):
        vm.run(Operation("store_8", nested + GVA_OFFSET, word + (page - here) * PAGE))
        l2.run(store(l2, here), flush_tlb=True)
        assert_logged("a store of L2 after L1 has changed the nested page table", page)
        l2.write(here)
        assert_logged("its next store", page)


def test_smi_while_l2_runs_is_logged(kvm: Kvm, log_mode: str, nested: bool) -> None:
    """When L2 takes an SMI, its stores before and after, the handler's, and the state that KVM saves in SMRAM are logged."""
    if reason := smram.missing(kvm):
        pytest.skip(reason)
    with ScriptedVm(kvm, log_mode, ring_count=RING, prepare=lambda vm: arch.create_irqchip(vm.fd)) as vm:
        vm.add_slot(SLOT, FIRST_GPA, NPAGES)
        vm.add_slot(OWN, OWN_GPA, NPAGES, logged=False)
        smram.add_smm_slots(vm, NPAGES)
        l2 = NestedGuest(vm, nested)
        reports: list[DirtyReport] = []

        def interrupt(vcpu: Vcpu) -> bool:
            if paused(vcpu):
                smram.send_smi(vcpu)
            elif smram.in_handler(vcpu):
                reports.append(vm.collect())
            else:
                return False
            return True

        for round_number in range(2):
            l2.run(store(l2, 4), PAUSE, store(l2, 5), on_exit=interrupt)
            report = reports.pop()
            reported = {slot: report.dirty(slot) for slot in (SLOT, smram.SMM_SLOT, smram.SMRAM_SLOT)}
            if round_number == 0:
                # The fetch of the handler maps its page writable, and KVM logs that (make_spte()).
                reported[smram.SMRAM_SLOT].discard(smram.HANDLER_PAGE)
            assert reported == {
                SLOT: {4},
                smram.SMM_SLOT: {smram.FIRST, smram.SECOND},
                smram.SMRAM_SLOT: {smram.STATE_PAGE},
            }
            vm.assert_dirty("a store of L2 after the SMI", {SLOT: [5]})
