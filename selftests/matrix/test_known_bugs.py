# SPDX-License-Identifier: GPL-2.0-only
"""Reproducers of the kernel bugs in known_bugs.toml: each a plain test of the contract, which the bug breaks every time."""

from dataclasses import replace

import pytest

from dirty_tracking.cell import Cell, Settings
from dirty_tracking.dirty_log_run import DirtyLogRun
from kvm_util.kvm import Kvm
from kvm_util.memory import MIB

# pvm-ring-overflow: a batch of 1024 emulated instructions is 252 writes of the dense writer. 32 batches are 8064 entries, just
# below the soft limit of a ring of 8192 (8128), and the 33rd runs past the ring's end; so does almost every other phase.
PVM_OVERFLOW_RING = 8192
PVM_OVERFLOW_MEMORY = 256 * MIB  # 65536 pages: eight times around


@pytest.mark.log_modes("dirty-ring")
def test_dense_writer_never_overruns_its_ring(
    kvm: Kvm,
    settings: Settings,
) -> None:
    """A guest that writes a page every few instructions is stopped in time, each of the times its ring fills."""
    cell = Cell("dirty-ring", "48bit-4k", "anonymous", "cooperative", "dense-sequential", 1)
    flood = replace(settings, ring_count=PVM_OVERFLOW_RING, test_mem=PVM_OVERFLOW_MEMORY, iterations=3)
    with DirtyLogRun(kvm, cell, flood) as run:
        figures = run.run()
        assert figures.ring_full_exits >= 4, "the ring did not fill again and again: nothing was tested"
