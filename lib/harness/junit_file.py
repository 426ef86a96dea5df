# SPDX-License-Identifier: GPL-2.0-only
"""The JUnit XML file: what was tested is in it too, and an error while writing it is a line in the summary."""

import json
from copy import copy
from pathlib import Path

import pytest
from _pytest.junitxml import LogXML, xml_key
from _pytest.terminal import TerminalReporter

from harness.run_report import RunReport, not_kept


class JunitFile(LogXML):
    """pytest's writer with properties of the run, and with its errors turned into notes of the run's report."""

    def __init__(self, writer: LogXML, report: RunReport) -> None:
        vars(self).update(vars(writer))
        self._report = report
        self._kept = True

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        report = copy(report)
        report.user_properties = [
            (name, json.dumps(value) if isinstance(value, dict | list) else value)
            for name, value in report.user_properties
        ]
        super().pytest_runtest_logreport(report)

    def pytest_sessionfinish(self) -> None:
        for name, value in self._report.facts.properties().items():
            self.add_global_property(name, value)
        try:
            super().pytest_sessionfinish()
        except OSError as error:
            self._kept = False
            self._report.notes.append(not_kept(self.logfile, error, "--junitxml FILE"))

    def pytest_terminal_summary(self, terminalreporter: TerminalReporter, config: pytest.Config) -> None:
        # The last line of the run names the folder anyway.
        if self._kept and not Path(self.logfile).is_relative_to(self._report.results):
            super().pytest_terminal_summary(terminalreporter, config)


def guard_junit_file(config: pytest.Config, report: RunReport) -> None:
    """Replace pytest's JUnit writer, if there is one, by a JunitFile; to be called when the session starts."""
    writer = config.stash.get(xml_key, None)
    if writer is not None:
        config.pluginmanager.unregister(writer)
        guarded = config.stash[xml_key] = JunitFile(writer, report)
        config.pluginmanager.register(guarded)
        guarded.pytest_sessionstart()  # this hook is running, and does not include plugins registered meanwhile
