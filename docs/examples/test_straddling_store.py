# SPDX-License-Identifier: GPL-2.0-only
"""Stores that straddle two pages."""

from dirty_tracking.scripted_vm import Operation, ScriptedVm
from dirty_tracking.vm import FIRST_GPA
from kvm_util import Kvm


def test_store_across_page_boundary(kvm: Kvm, log_mode: str) -> None:
    """A store that straddles two pages makes both dirty, and no other page."""
    with ScriptedVm(kvm, log_mode) as vm:
        vm.add_slot(1, FIRST_GPA, 24)
        vm.run(Operation("store_8", vm.address(1, page=5, offset=4092)))
        vm.assert_dirty("a store to pages 5 and 6", {1: [5, 6]})
