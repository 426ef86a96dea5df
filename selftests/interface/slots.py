# SPDX-License-Identifier: GPL-2.0-only
"""What the tests of GET and CLEAR share: a VM with slots with and without dirty logging, side by side."""

from dirty_tracking.scripted_vm import ScriptedVm
from dirty_tracking.vm import FIRST_GPA, PAGE
from kvm_util.kvm import Kvm

SLOT, UNLOGGED, ABSENT, OTHER = 1, 2, 3, 4
# Three whole words of the bitmap and a partial one
NPAGES = 3 * 64 + 5


def bitmap_vm(kvm: Kvm, mode: str) -> ScriptedVm:
    """A VM with SLOT at FIRST_GPA, UNLOGGED (64 pages) after it, and OTHER after that; ABSENT is no slot."""
    vm = ScriptedVm(kvm, mode)
    vm.add_slot(SLOT, FIRST_GPA, NPAGES)
    vm.add_slot(UNLOGGED, FIRST_GPA + NPAGES * PAGE, 64, logged=False)
    vm.add_slot(OTHER, FIRST_GPA + (NPAGES + 64) * PAGE, NPAGES)
    return vm
