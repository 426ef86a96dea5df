# SPDX-License-Identifier: GPL-2.0-only
"""Workers that the host killed: for want of memory, or because their CPU time was used up. Other crashes are failures."""

import os
import resource
import time
from collections.abc import Mapping
from typing import Any

import pytest

from lib import host_limits


class WorkerCrashes:
    """Tells what crashed a worker of xdist, in its controller.

    :param cells: the planned cells' properties, by the last part of their tests' names
    :param required: whether what the host lacks is a failure
    """

    def __init__(self, cells: Mapping[str, Mapping[str, Any]], required: bool) -> None:
        self._cells = cells
        self._required = required
        self._started = time.monotonic()
        self._kills = host_limits.oom_kills()

    @pytest.hookimpl(optionalhook=True)
    def pytest_handlecrashitem(self, crashitem: str, report: pytest.TestReport) -> None:
        report.user_properties = [("kvm", True), *self._cells.get(crashitem.partition("[")[2].rstrip("]"), {}).items()]
        if (limit := self._why_killed()) is None:
            return
        if self._required:
            report.longrepr = f"required by --require-kvm: {limit}"
        else:
            report.outcome, report.longrepr = "skipped", (report.location[0], 0, f"Skipped: {limit}")

    def _why_killed(self) -> str | None:
        if host_limits.oom_kills() > self._kills:
            self._kills += 1  # one crash each
            limit = min(host_limits.memory_limits(), key=lambda one: one.left)
            return f"the kernel killed the test for want of memory: {limit}"
        most = resource.getrlimit(resource.RLIMIT_CPU)[0]
        if 0 <= most <= (time.monotonic() - self._started) * (os.cpu_count() or 1):
            return f"the kernel killed the test: RLIMIT_CPU lets a process use {most} s (ulimit -t unlimited)"
        return None
