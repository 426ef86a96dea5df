# SPDX-License-Identifier: GPL-2.0-only
"""Excuses xdist workers that died through no fault of KVM: killed by the OOM killer, or ended by a signal from outside."""

import signal
import subprocess
from typing import Any

import pytest

from harness.interruption import process_of
from harness.planned_tests import NOT_RUN, PlannedTests
from kvm_util import host_limits

# Signals that the kernel never sends by itself. SIGKILL is not one: an Oops sends it (page_fault_oops(), arch/x86/mm/fault.c).
_SENT = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_ENDS_WITHIN = 10  # seconds from the end of a worker's pipe to the end of its process


class WorkerCrashes:
    """A pytest plugin for the xdist controller that turns crashes without a failure of KVM into skips."""

    def __init__(self, planned: PlannedTests, required: bool) -> None:
        self._planned = planned
        self._required = required
        self._explained = 0  # OOM kills up to this count have already explained a crash
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
            limit = min(host_limits.memory_limits(), key=lambda limit: limit.left)
            reason = f"the kernel killed the test for want of memory: {limit}"
            if self._required:
                report.longrepr = f"required by --require-kvm: {reason}"
            else:
                self._excuse(report, reason)

    def _excuse(self, report: pytest.TestReport, reason: str) -> None:
        report.outcome, report.longrepr = "skipped", (report.location[0], 0, f"Skipped: {reason}")

    def _killed_for_memory(self, test: str) -> bool:
        """Whether there was an OOM kill since *test* began; each kill explains one crash."""
        if test not in self._before:
            return False
        explained = max(self._explained, self._before[test])
        if host_limits.oom_kills() <= explained:
            return False
        self._explained = explained + 1
        return True


def _signal_of(worker: Any) -> int | None:
    """The number of the signal that killed a worker; None if unknown, as for a worker on another machine."""
    if getattr(worker, "workeroutput", {}).get("exitstatus") == pytest.ExitCode.INTERRUPTED:
        return signal.SIGINT
    process = process_of(worker)
    if process is None:
        return None
    try:
        return -process.wait(_ENDS_WITHIN)
    except subprocess.TimeoutExpired:
        return None
