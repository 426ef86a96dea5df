# SPDX-License-Identifier: GPL-2.0-only
"""Reproducers of the kernel bugs in known_bugs.toml: each a plain test of the contract, which the bug breaks every time."""

from dataclasses import replace
from typing import Any

from lib.cell import Cell, Settings
from lib.dirty_log_run import DirtyLogRun
from lib.kvm import Kvm
from lib.log_modes import DirtyRing
from lib.memory import MIB
from lib.selection import smallest_ring


def test_dense_writer_never_overruns_a_small_ring(kvm: Kvm, settings: Settings, outcome: Any, lacks: Any) -> None:
    """A guest that writes a page every few instructions is stopped in time, each of the many times its ring fills."""
    if reason := DirtyRing.supported(kvm):
        lacks(reason)
    cell = Cell("dirty-ring", "48bit-4k", "anonymous", "cooperative", "dense-sequential", 1)
    small = replace(settings, ring_count=smallest_ring(kvm), test_mem=64 * MIB, iterations=3)
    with outcome.expected(cell, small), DirtyLogRun(kvm, cell, small) as run:
        figures = run.run()
        outcome.record(figures)
        assert figures.ring_full_exits >= 16384 // small.ring_count, "the ring never filled: nothing was tested"
