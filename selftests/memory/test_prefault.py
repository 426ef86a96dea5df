# SPDX-License-Identifier: GPL-2.0-only
"""Pages that KVM_PRE_FAULT_MEMORY maps are logged when they are written."""

import pytest

from dirty_tracking.modes import smallest_ring
from dirty_tracking.scripted_vm import ScriptedVm
from dirty_tracking.vm import FIRST_GPA, PAGE
from kvm_util.kvm import Kvm

pytestmark = pytest.mark.usefixtures("prefault")

SLOT = 1


def test_prefaulted_pages_are_logged(kvm: Kvm, log_mode: str) -> None:
    """Writes to pages that KVM_PRE_FAULT_MEMORY mapped are logged, be it before or after dirty logging was enabled."""
    npages = 64 + 9
    with ScriptedVm(kvm, log_mode) as vm:
        vm.add_slot(SLOT, FIRST_GPA, npages, logged=False)
        vm.vm.vcpus[0].pre_fault_memory(FIRST_GPA, npages * PAGE)
        vm.enable_dirty_logging(SLOT)
        vm.assert_dirty("nothing since dirty logging was enabled", {})
        vm.write(SLOT, *range(0, npages, 3))
        vm.assert_dirty(
            "writes to pages that were mapped before dirty logging was enabled", {SLOT: range(0, npages, 3)}
        )
        vm.remove_slot(SLOT)
        vm.add_slot(SLOT, FIRST_GPA, npages).memory.populate()
        # Makes the vCPU drop its obsolete root: with one the ioctl loops for ever before "KVM: x86/mmu: Check and free
        # obsolete roots in kvm_mmu_reload()", which 6.12 does not have.
        vm.run()
        first, count = 7, 60
        vm.vm.vcpus[0].pre_fault_memory(FIRST_GPA + first * PAGE, count * PAGE)
        # KVM maps these pages writable, and logs them at once, though nothing has written them (make_spte(), mmu/spte.c).
        report = vm.collect()
        may_be = report.dirty(SLOT).intersection(range(first, first + count))
        vm.assert_report(f"KVM_PRE_FAULT_MEMORY of pages {first} to {first + count - 1}", {SLOT: may_be}, report)
        vm.write(SLOT, *range(0, npages, 3))
        vm.assert_dirty("writes to pages that were mapped after that", {SLOT: range(0, npages, 3)})


@pytest.mark.disposable_kernel  # a ring that is overrun makes KVM warn
@pytest.mark.log_modes("dirty-ring")
def test_prefault_of_more_than_a_ring(kvm: Kvm, log_mode: str) -> None:
    """Pages that are pre-faulted with more of them than ring entries are logged when a vCPU writes them, and each vCPU runs.

    KVM logs pages that it pre-faults writable (make_spte(), mmu/spte.c), so it has to end the ioctl early when the ring is
    full, or not to map them writable. Another vCPU, which uses the same TDP page tables, writes them first.
    """
    entries = smallest_ring(kvm)
    npages = 2 * entries
    with ScriptedVm(kvm, log_mode, 2, entries) as vm:
        vm.add_slot(SLOT, FIRST_GPA, npages).memory.populate()
        vm.run()
        left = npages * PAGE
        while left:
            before, left = left, vm.vm.vcpus[0].pre_fault_some(FIRST_GPA + npages * PAGE - left, left)
            assert left < before, "KVM_PRE_FAULT_MEMORY succeeds, and has done nothing"
            vm.collect()
        written = range(0, npages, 16)
        for vcpu in (1, 0):
            vm.write(SLOT, *written, vcpu=vcpu)
            vm.assert_dirty(f"writes of vCPU {vcpu} to pages that vCPU 0 pre-faulted", {SLOT: written})
