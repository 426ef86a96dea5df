# SPDX-License-Identifier: GPL-2.0-only
"""The kernel log as part of the verdict: a report (WARN, BUG, Oops ...) fails the test that was running, and the run."""

from collections.abc import Callable, Generator

import pytest

from harness.run_report import KernelReport, RunReport
from runner.kernel_log import KernelLog, Splat

# Returns the id of the known bug that explains a report, or None
Explain = Callable[[Splat], str | None]


class TestWatch:
    """A pytest plugin that fails a test during which an unexplained report appeared.

    With xdist, tests in other processes run on the same kernel: all tests that were running fail.
    """

    def __init__(self, log: KernelLog, explain: Explain) -> None:
        self._log = log
        self._explain = explain

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        splats = self._log.new_splats()
        for splat in splats:
            report.user_properties.append(("kernel_log", splat.title))
        unexplained = [splat for splat in splats if self._explain(splat) is None]
        if unexplained:
            text = "\n".join(
                ["the kernel reported while this test ran:", *(line for splat in unexplained for line in splat.lines)]
            )
            if report.failed:
                report.sections.append(("kernel log", text))
            else:
                report.outcome, report.longrepr = "failed", text
                vars(report).pop("wasxfail", None)  # the test's known bug does not explain this report
        return report


class RunWatch:
    """A pytest plugin that collects all kernel log reports of the run, also those between tests."""

    def __init__(self, log: KernelLog, explain: Explain, report: RunReport) -> None:
        self._log = log
        self._explain = explain
        self._report = report
        self._splats: list[Splat] = []

    def pytest_runtest_logreport(self) -> None:
        self._splats += self._log.new_splats()  # before the kernel overwrites them

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self) -> None:
        for splat in self._splats + self._log.new_splats():
            tests = self._report.tests_that_saw(splat.title)
            known_bug = self._explain(splat)
            self._report.kernel_reports.append(
                KernelReport(splat.kind.value, splat.title, splat.lines, known_bug, tests)
            )
