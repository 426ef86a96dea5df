# SPDX-License-Identifier: GPL-2.0-only
"""The port of ``tools/testing/selftests/kvm/dirty_log_test.c``: random writes, random collections, an exact oracle.

The loop is :meth:`DirtyLogRun.run`.
"""

from collections.abc import Callable

from dirty_tracking.cell import Cell, Settings
from dirty_tracking.dirty_log_run import DirtyLogRun
from dirty_tracking.run_evidence import Figures
from kvm_util.kvm import Kvm


def test_dirty_log(kvm: Kvm, cell: Cell, settings: Settings, record_figures: Callable[[Figures], None]) -> None:
    """Every page that the guest writes is reported, no other page is, and the memory holds the values written."""
    with DirtyLogRun(kvm, cell, settings) as run:
        record_figures(run.figures)
        run.run()
