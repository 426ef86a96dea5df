# SPDX-License-Identifier: GPL-2.0-only
"""Workers that did not die of KVM: the host killed them for want of memory, or someone ended them. Else it is a failure."""

import signal
import subprocess
from typing import Any

import pytest

from harness.interruption import process_of
from harness.planned_tests import NOT_RUN, PlannedTests
from kvm_util import host_limits

# No kernel sends these by itself. SIGKILL is another matter: an Oops kills with it (page_fault_oops(), arch/x86/mm/fault.c).
_SENT = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_ENDS_WITHIN = 10  # seconds, after its pipe was closed


class WorkerCrashes:
    """Finds out what crashed a worker of xdist, in its controller.

    :param required: whether what the host lacks is a failure
    """

    def __init__(self, planned: PlannedTests, required: bool) -> None:
        self._planned = planned
        self._required = required
        self._explained = 0  # the kernel's kills up to this one explain nothing any more
        self._before: dict[str, int] = {}

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._before[nodeid] = host_limits.oom_kills()

    @pytest.hookimpl(optionalhook=True)
    def pytest_handlecrashitem(self, crashitem: str, report: pytest.TestReport) -> None:
        report.user_properties = self._planned.properties_of(crashitem)
        died_of = _signal_of(report.node)
        if died_of in _SENT:
            report.user_properties.append(NOT_RUN)
            self._excuse(report, f"not run: {signal.Signals(died_of).name} ended its process")
        elif died_of == signal.SIGKILL and self._killed_for_memory(crashitem):
            limit = min(host_limits.memory_limits(), key=lambda one: one.left)
            reason = f"the kernel killed the test for want of memory: {limit}"
            if self._required:
                report.longrepr = f"required by --require-kvm: {reason}"
            else:
                self._excuse(report, reason)

    def _excuse(self, report: pytest.TestReport, reason: str) -> None:
        report.outcome, report.longrepr = "skipped", (report.location[0], 0, f"Skipped: {reason}")

    def _killed_for_memory(self, test: str) -> bool:
        """Whether the kernel has killed since *test* began: one crash for each kill."""
        if test not in self._before:
            return False
        explained = max(self._explained, self._before[test])
        if host_limits.oom_kills() <= explained:
            return False
        self._explained = explained + 1
        return True


def _signal_of(worker: Any) -> int | None:
    """The signal that a worker died of; None when it cannot be known, as of one on another machine."""
    if getattr(worker, "workeroutput", {}).get("exitstatus") == pytest.ExitCode.INTERRUPTED:
        return signal.SIGINT
    process = process_of(worker)
    if process is None:
        return None
    try:
        return -process.wait(_ENDS_WITHIN)
    except subprocess.TimeoutExpired:
        return None
