# SPDX-License-Identifier: GPL-2.0-only
"""Reports tests that were planned but did not run, so that the run's table and files are complete."""

from collections.abc import Iterable, Mapping
from typing import Any

import pytest

from harness.interruption import Interruption
from harness.kernel_options import OWN_TESTS
from kvm_util.wording import counted

Properties = Iterable[tuple[str, Any]]
NOT_RUN = ("verdict", "not run")


class PlannedTests:
    """A pytest plugin that reports each planned test without a verdict as "not run" when the session ends.

    The terminal reporter does not get these reports.

    :param cells: properties of the planned cells, by test parameter id
    :ivar why: the reason, if the session itself does not show it
    """

    def __init__(self, cells: Mapping[str, Mapping[str, Any]], interruption: Interruption) -> None:
        self.why: str | None = None
        self._cells = cells
        self._interruption = interruption
        self._left: dict[str, list[tuple[str, Any]]] = {}
        self._started: set[str] = set()
        self._workers: dict[str, Any] = {}

    def plan(self, tests: Mapping[str, Properties]) -> None:
        """Add tests, with their properties by test id."""
        self._left |= {nodeid: list(properties) for nodeid, properties in tests.items()}

    def properties_of(self, nodeid: str) -> list[tuple[str, Any]]:
        """The properties of a test that only an xdist worker has collected."""
        cell = self._cells.get(nodeid.partition("[")[2].rstrip("]"), {})
        return [("kvm", not nodeid.startswith(OWN_TESTS)), *cell.items()]

    @pytest.hookimpl(trylast=True)
    def pytest_collection_finish(self, session: pytest.Session) -> None:
        if not session.config.option.collectonly:
            self.plan({item.nodeid: item.user_properties for item in session.items})

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, ids: list[str]) -> None:
        if not self._started:  # a worker that replaces a crashed one collects again
            self.plan({nodeid: self.properties_of(nodeid) for nodeid in ids})

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._started.add(nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or not report.passed:
            self._left.pop(report.nodeid, None)
        elif hasattr(report, "node"):
            self._workers[report.nodeid] = report.node

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        config = session.config
        # The terminal's counts, and the list for --lf, are about tests that ran.
        plugins = config.pluginmanager
        others = [plugins.get_plugin(name) for name in ("terminalreporter", "lfplugin")]
        hook = plugins.subset_hook_caller(
            "pytest_runtest_logreport", [plugin for plugin in others if plugin is not None]
        )
        why = self.why or self._why_ended(session)
        for nodeid, properties in list(self._left.items()):
            file, _, name = nodeid.partition("::")
            reason = f"Skipped: not run: {why}{', during the test' if nodeid in self._started else ''}"
            report = pytest.TestReport(
                nodeid,
                (file, 0, name),
                {},
                "skipped",
                (file, 0, reason),
                "setup",
                user_properties=[*properties, NOT_RUN],
            )
            if nodeid in self._workers:
                # junitxml matches the reports of a test by worker.
                report.node = self._workers[nodeid]  # type: ignore[attr-defined]
            hook(report=report)

    def _why_ended(self, session: pytest.Session) -> str:
        """Why the session ended early, in words."""
        most = session.config.option.maxfail
        if self._interruption.name is not None:
            return f"the run was interrupted ({self._interruption.name})"
        if most and session.testsfailed >= most:
            return f"the run stopped after {counted(most, 'failure')} (--maxfail)"
        if session.exitstatus == pytest.ExitCode.INTERNAL_ERROR:
            return "pytest failed"
        return "the run ended early"
