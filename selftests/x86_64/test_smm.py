# SPDX-License-Identifier: GPL-2.0-only
"""The address space of system management mode has a dirty log of its own, which never mixes with the other one's."""

from collections.abc import Iterator

import pytest

from dirty_tracking.scripted_vm import ScriptedVm
from dirty_tracking.vm import FIRST_GPA, PAGE
from kvm_util import uapi as kvm_uapi
from kvm_util.arch import current as arch
from kvm_util.kvm import Kvm
from kvm_util.vcpu import Vcpu
from selftests.x86_64 import smram
from selftests.x86_64.smram import FIRST, HANDLER_PAGE, SECOND, SLOT, SMM_SLOT, SMRAM_SLOT, STATE_PAGE

NPAGES = 16


@pytest.fixture
def smm_vm(kvm: Kvm, log_mode: str) -> Iterator[ScriptedVm]:
    """A VM with a logged memslot in each address space, at the same gpa and with the same id, and SMRAM."""
    if reason := smram.missing(kvm):
        pytest.skip(reason)
    assert kvm.check_extension(kvm_uapi.KVM_CAP_MULTI_ADDRESS_SPACE) == 2
    # KVM delivers an SMI through its own local APIC.
    with ScriptedVm(kvm, log_mode, prepare=lambda vm: arch.create_irqchip(vm.fd)) as vm:
        vm.add_slot(SLOT, FIRST_GPA, NPAGES)
        smram.add_smm_slots(vm, NPAGES)
        yield vm


def smi(vm: ScriptedVm) -> None:
    """Have the vCPU take a system management interrupt, and return from it."""
    smram.send_smi(vm.vm.vcpus[0])
    calls = []

    def called(vcpu: Vcpu) -> bool:
        if smram.in_handler(vcpu):
            calls.append(vcpu.run.flags)
            return True
        return False

    vm.run(on_exit=called)
    assert len(calls) == 1, "the handler did not run"


@pytest.mark.parametrize("logged", [SLOT, SMM_SLOT], ids=["outside", "smm"])
def test_logging_in_one_address_space(smm_vm: ScriptedVm, logged: int) -> None:
    """With dirty logging in one address space only, writes to the same gfns in the other one are not reported."""
    vm, other = smm_vm, SLOT + SMM_SLOT - logged
    vm.disable_dirty_logging(SMRAM_SLOT)
    vm.disable_dirty_logging(other)
    written = {SLOT: [FIRST, 9], SMM_SLOT: [FIRST, SECOND]}
    for _ in range(2):
        smi(vm)
        vm.write(SLOT, FIRST, 9)
        vm.assert_dirty("writes in both address spaces", {logged: written[logged]})
    vm.disable_dirty_logging(logged)
    vm.enable_dirty_logging(other)
    smi(vm)
    vm.write(SLOT, FIRST, 9)
    vm.assert_dirty("writes in both address spaces, with dirty logging in the other one", {other: written[other]})


def test_smm_writes_in_smm_address_space(smm_vm: ScriptedVm) -> None:
    """Stores of the SMM handler, and the state that KVM saves for it, are logged in the address space of SMM only."""
    vm = smm_vm
    for round_number in range(3):
        smi(vm)
        report = vm.collect()
        reported = {slot: report.dirty(slot) for slot in {SLOT, SMM_SLOT, SMRAM_SLOT} | report.slots}
        if round_number == 0:
            # The fetch of the handler maps its page writable, and KVM logs that (make_spte()).
            reported[SMRAM_SLOT].discard(HANDLER_PAGE)
        assert reported == {SLOT: set(), SMM_SLOT: {FIRST, SECOND}, SMRAM_SLOT: {STATE_PAGE}}
    assert vm.vm.memslots[SMM_SLOT].memory.view[FIRST * PAGE] == 0x5A
    assert vm.vm.memslots[SLOT].memory.view[FIRST * PAGE] == 0


def test_writes_outside_smm_stay_outside(smm_vm: ScriptedVm) -> None:
    """Stores outside of SMM are logged in the normal address space only."""
    smm_vm.write(SLOT, 1, FIRST)
    smm_vm.assert_dirty("stores outside of SMM", {SLOT: [1, FIRST]})


def test_address_spaces_have_separate_logs(smm_vm: ScriptedVm) -> None:
    """Writes to the same offset of the same slot id in both address spaces are reported once for each of them."""
    vm = smm_vm
    vm.write(SLOT, FIRST, 9)
    smi(vm)
    report = vm.collect()
    assert {slot: report.dirty(slot) for slot in report.slots - {SMRAM_SLOT}} == {
        SLOT: {FIRST, 9},
        SMM_SLOT: {FIRST, SECOND},
    }
