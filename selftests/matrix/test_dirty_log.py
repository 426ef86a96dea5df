# SPDX-License-Identifier: GPL-2.0-only
"""The port of ``tools/testing/selftests/kvm/dirty_log_test.c``: random writes, random collections, an exact oracle.

The loop is :meth:`DirtyLogRun.run`.
"""

from collections.abc import Callable, Iterator

import pytest

from dirty_tracking.cell import Cell, Settings
from dirty_tracking.dirty_log_run import DirtyLogRun
from dirty_tracking.run_evidence import Figures
from kvm_util.kept_memory import KeptMemory
from kvm_util.kvm import Kvm

pytestmark = pytest.mark.threads


@pytest.fixture(scope="module")
def memory() -> Iterator[KeptMemory]:
    """The test memory of one cell after the other: the cells come by backing."""
    with KeptMemory() as memory:
        yield memory


def test_dirty_log(
    kvm: Kvm, cell: Cell, settings: Settings, memory: KeptMemory, record_figures: Callable[[Figures], None]
) -> None:
    """Every page that the guest writes is reported, no other page is, and the memory holds the values written."""
    with DirtyLogRun(kvm, cell, settings, memory) as run:
        record_figures(run.figures)
        run.run()
