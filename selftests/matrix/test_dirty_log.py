# SPDX-License-Identifier: GPL-2.0-only
"""The port of ``tools/testing/selftests/kvm/dirty_log_test.c``: random writes, random collections, an exact oracle."""

from typing import Any

from dirty_tracking.cell import Cell, Settings
from dirty_tracking.dirty_log_run import DirtyLogRun
from kvm_util.kvm import Kvm


def test_dirty_log(kvm: Kvm, cell: Cell, settings: Settings, outcome: Any) -> None:
    """Each page that the guest writes is reported, and no other, and the memory holds what was written."""
    with outcome.expected(cell), DirtyLogRun(kvm, cell, settings) as run:
        outcome.record(run.run())
