# SPDX-License-Identifier: GPL-2.0-only
"""Reproducers of bugs in known_bugs.toml: tests of the contract that fail on each run on a kernel with the bug."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from dirty_tracking.cell import Cell, Settings
from dirty_tracking.dirty_log_run import DirtyLogRun
from dirty_tracking.run_evidence import Figures
from kvm_util.kvm import Kvm
from kvm_util.memory import MIB

pytestmark = pytest.mark.threads

# pvm-ring-overflow: a batch of 1024 emulated instructions has 252 writes of the dense writer. 32 batches push 8064 entries,
# just below the soft limit of a ring of 8192 (8128), and the 33rd overruns it; so do the batches of most other phases.
PVM_OVERFLOW_RING = 8192
PVM_OVERFLOW_MEMORY = 160 * MIB  # 40960 pages: the ring fills five times in the first iteration
# Where each exit pushes one entry, no ring overruns: that it fills is enough, and emulated CPUs take seconds for more.
MEMORY = 40 * MIB  # the ring fills once


@pytest.mark.log_modes("dirty-ring")
def test_dense_writer_never_overruns_its_ring(
    kvm: Kvm, settings: Settings, emulates: bool, record_figures: Callable[[Figures], None]
) -> None:
    """KVM stops a guest that writes a page every few instructions before it overruns its ring, each time the ring fills."""
    cell = Cell("dirty-ring", "48bit-4k", "anonymous", "cooperative", "dense-sequential", 1)
    flood = replace(
        settings, ring_count=PVM_OVERFLOW_RING, test_mem=PVM_OVERFLOW_MEMORY if emulates else MEMORY, iterations=1
    )
    with DirtyLogRun(kvm, cell, flood) as run:
        record_figures(run.figures)
        figures = run.run()
        times = 4 if emulates else 1
        assert figures.ring_full_exits >= times, f"the ring filled fewer than {times} times: nothing was tested"
