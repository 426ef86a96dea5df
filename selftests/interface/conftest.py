# SPDX-License-Identifier: GPL-2.0-only
"""Fixtures for the tests of GET and CLEAR: the VM of slots.py."""

from collections.abc import Iterator

import pytest

from dirty_tracking.modes import LOG_MODES
from dirty_tracking.scripted_vm import ScriptedVm
from kvm_util.kvm import Kvm
from selftests.interface.slots import bitmap_vm


@pytest.fixture
def manual_vm(kvm: Kvm) -> Iterator[ScriptedVm]:
    """A VM with manual protection: GET only reports, CLEAR clears and write-protects."""
    if reason := LOG_MODES["clear-log-unset"].supported(kvm):
        pytest.skip(reason)
    with bitmap_vm(kvm, "clear-log-unset") as vm:
        yield vm


@pytest.fixture
def dirty_log_vm(kvm: Kvm) -> Iterator[ScriptedVm]:
    """A VM without manual protection: GET reports, clears and write-protects."""
    with bitmap_vm(kvm, "dirty-log") as vm:
        yield vm
