# SPDX-License-Identifier: GPL-2.0-only
"""A VM that is paused and resumed: KVM writes each vCPU's kvmclock when that vCPU runs again, and logs it then."""

import ctypes
from collections.abc import Iterator

import pytest

from dirty_tracking.scripted_vm import Operation, ScriptedVm
from dirty_tracking.vm import FIRST_GPA, PAGE
from kvm_util.arch.x86_64 import msr, uapi
from kvm_util.ioctl import ioctl
from kvm_util.kvm import Kvm

SLOT, NPAGES = 1, 128
# The page of each vCPU's clock, in a word of the bitmap of its own
CLOCKS = [3, 70]
# As often as KVM writes a clock, it pushes it to a ring (mark_page_dirty_in_slot()).
MANY = 1000


@pytest.fixture
def clocks_vm(kvm: Kvm, log_mode: str) -> Iterator[ScriptedVm]:
    """A VM whose vCPUs have kvmclocks, with nothing left to report."""
    if not kvm.check_extension(uapi.KVM_CAP_KVMCLOCK_CTRL):
        pytest.skip("no KVM_CAP_KVMCLOCK_CTRL")
    with ScriptedVm(kvm, log_mode, vcpus=len(CLOCKS)) as vm:
        vm.add_slot(SLOT, FIRST_GPA, NPAGES)
        for vcpu, page in enumerate(CLOCKS):
            vm.run(
                Operation("wrmsr", msr.MSR_KVM_SYSTEM_TIME_NEW, FIRST_GPA + page * PAGE | msr.KVM_MSR_ENABLED),
                vcpu=vcpu,
            )
            vm.run(vcpu=vcpu)
        vm.collect()
        yield vm


def test_clock_written_when_its_vcpu_runs(clocks_vm: ScriptedVm) -> None:
    """KVM_KVMCLOCK_CTRL and KVM_SET_CLOCK write and log nothing; the next run of each vCPU writes and logs its own clock."""
    vm = clocks_vm
    memory = vm.vm.memslots[SLOT].memory
    for turn, order in enumerate(([0, 1], [1, 0])):
        before = bytes(memory.view)
        for vcpu in vm.vm.vcpus:
            ioctl(vcpu.fd, uapi.KVM_KVMCLOCK_CTRL, "KVM_KVMCLOCK_CTRL")
        vm.assert_dirty("KVM_KVMCLOCK_CTRL, before any vCPU runs", {})
        clock = uapi.kvm_clock_data(clock=10**12 * (turn + 1))
        ioctl(vm.vm.fd, uapi.KVM_SET_CLOCK, "KVM_SET_CLOCK", ctypes.byref(clock))
        vm.assert_dirty("KVM_SET_CLOCK, before any vCPU runs", {})
        assert bytes(memory.view) == before
        for number in order:
            vm.run(vcpu=number)
            assert vm.changed_pages(SLOT, before) == [CLOCKS[number]]
            vm.assert_dirty(f"the next run of vCPU {number}", {SLOT: [CLOCKS[number]]}, MANY)
            before = bytes(memory.view)
