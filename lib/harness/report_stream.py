# SPDX-License-Identifier: GPL-2.0-only
"""Sends a session's test reports as lines of JSON from a booted kernel to the pytest that has booted it (remote.py)."""

import json
import time
from dataclasses import astuple
from typing import Any

import pytest

from dirty_tracking import progress
from dirty_tracking.progress import Step
from harness.run_report import RunReport
from harness.stored_reports import to_data
from runner.gcov_counters import NoCounters, kvm_counters
from runner.guest_session import guest_session

_STEPS_EVERY = 2.0  # seconds between progress messages of a test


class ReportStream:
    """A pytest plugin that writes each event of the session to *path* at once."""

    def __init__(self, config: pytest.Config, path: str, report: RunReport) -> None:
        self._config = config
        self._report = report
        self._file = open(path, "w")  # noqa: SIM115 (closed at the end of the session)
        self.send(environment=vars(report.facts))
        self._next_step = 0.0
        progress.listener = self._send_step

    def send(self, **message: Any) -> None:
        """Write one message: a JSON object on a line."""
        self._file.write(json.dumps(message) + "\n")
        self._file.flush()

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        threads = [item.nodeid for item in session.items if item.get_closest_marker("threads")]
        items = {item.nodeid: [item.location, item.user_properties] for item in session.items}
        self.send(items=items, threads=threads)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.send(start=nodeid)
        self._next_step = 0.0

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        data = to_data(self._config, report)
        del data["nodeid"], data["location"]  # the host knows which test runs
        self.send(report=data)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.send(collect_report=to_data(self._config, report))

    def pytest_internalerror(self, excrepr: object) -> None:
        self.send(internal_error=str(excrepr))

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self) -> None:
        session = guest_session(self._config)
        if session is not None and session.gcov:
            try:
                for counters in kvm_counters():
                    self.send(gcov=counters)
            except NoCounters as error:
                self.send(internal_error=f"--gcov: {error}")
        self.send(kernel_log=[vars(report) for report in self._report.kernel_reports])

    def pytest_unconfigure(self) -> None:
        progress.listener = None
        self._file.close()

    def _send_step(self, step: Step) -> None:
        if (now := time.monotonic()) >= self._next_step:
            self._next_step = now + _STEPS_EVERY
            self.send(step=astuple(step))
