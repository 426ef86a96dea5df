# SPDX-License-Identifier: GPL-2.0-only
"""Falsified answers of KVM, between the ioctl and the library."""

from collections.abc import Callable

import pytest

from kvm_util.vm import Vm


def falsify_bitmaps(patch: pytest.MonkeyPatch, fault: Callable[[Vm, int, bytearray], None]) -> None:
    """Have *fault*, which gets VM and slot, change each bitmap that KVM_GET_DIRTY_LOG filled, until *patch* is undone."""
    honest = Vm.get_dirty_log

    def falsified(vm: Vm, slot: int, bitmap: bytearray) -> None:
        honest(vm, slot, bitmap)
        fault(vm, slot, bitmap)

    patch.setattr(Vm, "get_dirty_log", falsified)


# The same as a plugin for a run in a process of its own: every written page is lost
LOSING_PLUGIN = """
from kvm_util.vm import Vm
honest = Vm.get_dirty_log
def losing(vm, slot, bitmap):
    honest(vm, slot, bitmap)
    bitmap[:] = bytes(len(bitmap))
Vm.get_dirty_log = losing
"""
