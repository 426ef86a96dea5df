# SPDX-License-Identifier: GPL-2.0-only
"""The kernel's own reports as part of the verdict: one in its log (WARN, BUG, Oops ...), or a new taint flag, fails the test
that was running, and the run.
"""

from collections.abc import Callable, Generator

import pytest

from harness.journal import Journal
from harness.run_report import KernelReport, RunReport
from runner.kernel_log import KernelLog, Kind, Splat
from runner.taint import TAINTED, TITLE, describe, new_faults, taint_flags, unreported

# Returns the id of the known bug that explains a report, or None
Explain = Callable[[Splat], str | None]


class KernelWatch:
    """What the kernel reports from now on.

    :param log: its log; None if this user may not read it
    """

    def __init__(self, log: KernelLog | None, tainted: str = TAINTED) -> None:
        self._log = log
        self._tainted = tainted
        self._flags = taint_flags(tainted)
        self._kinds: set[Kind] = set()  # of the reports in the log

    def new_reports(self) -> list[Splat]:
        """The reports since the last call: those in the log, and each taint flag that comes with none of them."""
        flags = taint_flags(self._tainted)  # first: the kernel sets a flag after it has logged why
        splats = self._log.new_splats() if self._log is not None else []
        self._kinds |= {splat.kind for splat in splats}
        new = new_faults(self._flags, flags)
        if not new:
            return splats
        self._flags = flags
        return splats + [Splat(Kind.TAINT, [f"{TITLE} {text}"]) for text in describe(unreported(new, self._kinds))]


class TestWatch:
    """A pytest plugin that fails a test during which an unexplained report appeared.

    With xdist, tests in other processes run on the same kernel: all tests that were running fail.
    """

    def __init__(self, watch: KernelWatch, explain: Explain) -> None:
        self._watch = watch
        self._explain = explain

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        splats = self._watch.new_reports()
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
    """A pytest plugin that collects all reports of the run, also those between tests.

    :param journal: gets them at once; None in a booted kernel
    :param earlier: the reports in the part of the run before it was resumed, to which ``resume.settle`` may add
    """

    def __init__(
        self,
        watch: KernelWatch,
        explain: Explain,
        report: RunReport,
        journal: Journal | None,
        earlier: list[Splat],
    ) -> None:
        self._watch = watch
        self._explain = explain
        self._report = report
        self._journal = journal
        self._splats = earlier

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "teardown":
            self._look()  # before the kernel overwrites them

    def _look(self) -> None:
        splats = self._watch.new_reports()
        for splat in splats:
            if self._journal is not None:
                self._journal.write(kernel=splat.kind.value, lines=splat.lines)
        self._splats += splats

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self) -> None:
        self._look()
        for splat in self._splats:
            tests = self._report.tests_that_saw(splat.title)
            known_bug = self._explain(splat)
            self._report.kernel_reports.append(
                KernelReport(splat.kind.value, splat.title, splat.lines, known_bug, tests)
            )
