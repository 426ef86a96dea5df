# SPDX-License-Identifier: GPL-2.0-only
"""No false alarms in long runs on a busy machine."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace

import pytest

from dirty_tracking.cell import Cell, Settings
from dirty_tracking.dirty_log_run import DirtyLogRun
from kvm_util.kvm import Kvm
from kvm_util.memory import MIB

ITERATIONS = 100


@pytest.fixture
def cpu_hogs() -> Iterator[None]:
    """Run a busy loop on each CPU during the test."""
    with ExitStack() as stack:
        for _ in range(os.cpu_count() or 1):
            hog = stack.enter_context(subprocess.Popen([sys.executable, "-c", "while True: pass"]))
            stack.callback(hog.kill)
        yield


@pytest.mark.parametrize("stop", ["cooperative", "forced"])
@pytest.mark.usefixtures("cpu_hogs")
@pytest.mark.slow
def test_no_false_alarm_in_100_iterations(kvm: Kvm, settings: Settings, log_mode: str, stop: str) -> None:
    """A sound KVM passes 100 short iterations with two vCPUs, a small ring, and a busy process on each CPU."""
    cell = Cell(log_mode, "48bit-4k", "anonymous", stop, "sparse", 2)
    many = replace(
        settings, iterations=ITERATIONS, interval=1.0, ring_count=min(settings.ring_count, 2048), test_mem=8 * MIB
    )
    with DirtyLogRun(kvm, cell, many) as run:
        figures = run.run()
        assert figures.iterations == ITERATIONS
