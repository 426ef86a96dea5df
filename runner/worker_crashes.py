# SPDX-License-Identifier: GPL-2.0-only
"""Workers that the host killed for want of memory; other crashes are failures."""

import signal
import subprocess
from collections.abc import Mapping
from typing import Any

import pytest

from lib import host_limits

_ENDS_WITHIN = 10  # seconds, after its pipe was closed


class WorkerCrashes:
    """Finds out what crashed a worker of xdist, in its controller.

    :param cells: the planned cells' properties, by the last part of their tests' names
    :param required: whether what the host lacks is a failure
    """

    def __init__(self, cells: Mapping[str, Mapping[str, Any]], required: bool) -> None:
        self._cells = cells
        self._required = required
        self._explained = 0  # the kernel's kills up to this one explain nothing any more
        self._before: dict[str, int] = {}

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._before[nodeid] = host_limits.oom_kills()

    @pytest.hookimpl(optionalhook=True)
    def pytest_handlecrashitem(self, crashitem: str, report: pytest.TestReport) -> None:
        report.user_properties = [("kvm", True), *self._cells.get(crashitem.partition("[")[2].rstrip("]"), {}).items()]
        if not self._killed_for_memory(crashitem, report):
            return
        limit = min(host_limits.memory_limits(), key=lambda one: one.left)
        reason = f"the kernel killed the test for want of memory: {limit}"
        if self._required:
            report.longrepr = f"required by --require-kvm: {reason}"
        else:
            report.outcome, report.longrepr = "skipped", (report.location[0], 0, f"Skipped: {reason}")

    def _killed_for_memory(self, test: str, report: Any) -> bool:
        """Whether the worker died of SIGKILL, and the kernel has killed since the test began: one crash for each kill."""
        if test not in self._before or _signal_of(report.node) != signal.SIGKILL:
            return False
        explained = max(self._explained, self._before[test])
        if host_limits.oom_kills() <= explained:
            return False
        self._explained = explained + 1
        return True


def _signal_of(worker: Any) -> int | None:
    """The signal that a worker died of; None when it cannot be known, as of one on another machine."""
    # execnet keeps to itself how its child ended (Popen2IOMaster, execnet/gateway_io.py).
    process: subprocess.Popen[bytes] | None = getattr(worker.gateway._io, "popen", None)
    if process is None:
        return None
    try:
        return -process.wait(_ENDS_WITHIN)
    except subprocess.TimeoutExpired:
        return None
