# SPDX-License-Identifier: GPL-2.0-only
"""The kernel's log as part of the verdict: what the kernel reports while a test runs fails that test, and the run."""

from collections.abc import Callable, Generator

import pytest

from harness.run_report import KernelReport, RunReport
from runner.kernel_log import KernelLog, Splat

# Gives the id of the known bug that explains a report, if one does.
Explain = Callable[[Splat], str | None]


class TestWatch:
    """Ties what the kernel reports to the test that this process was running.

    Other processes' tests run on the same kernel: with xdist, all that ran at the time fail.
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
                ["the kernel reported while this test ran:", *(line for one in unexplained for line in one.lines)]
            )
            if report.failed:
                report.sections.append(("kernel log", text))
            else:
                report.outcome, report.longrepr = "failed", text
                vars(report).pop("wasxfail", None)  # a known bug does not excuse what it does not explain
        return report

    def pytest_unconfigure(self) -> None:
        self._log.close()


class RunWatch:
    """Collects all that the kernel reported during the run, whichever test it was, or none."""

    def __init__(self, log: KernelLog, explain: Explain, report: RunReport) -> None:
        self._log = log
        self._explain = explain
        self._report = report
        self._splats: list[Splat] = []

    def pytest_runtest_logreport(self) -> None:
        self._splats += self._log.new_splats()  # before the log can run over

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self) -> None:
        for splat in self._splats + self._log.new_splats():
            tests = self._report.tests_blamed_for(splat.title)
            known_bug = self._explain(splat)
            self._report.kernel_reports.append(
                KernelReport(splat.kind.value, splat.title, splat.lines, known_bug, tests)
            )

    def pytest_unconfigure(self) -> None:
        self._log.close()
