# SPDX-License-Identifier: GPL-2.0-only
"""JUnit's file: pytest writes it at the end, and is kept from ending in a traceback when it cannot."""

from pathlib import Path

import pytest
from _pytest.junitxml import LogXML, xml_key

from harness.run_report import RunReport, not_kept


class JunitFile(LogXML):
    """pytest's writer; what keeps it from writing is said, and is no verdict on the kernel.

    :param writer: the one whose place it takes
    """

    def __init__(self, writer: LogXML, report: RunReport) -> None:
        vars(self).update(vars(writer))
        self._report = report
        self._kept = True

    def pytest_sessionfinish(self) -> None:
        try:
            super().pytest_sessionfinish()
        except OSError as error:
            self._kept = False
            self._report.remarks.append(not_kept(self.logfile, error, "--junitxml FILE"))

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
        # The run's folder is in its last line.
        if self._kept and not Path(self.logfile).is_relative_to(self._report.results):
            super().pytest_terminal_summary(terminalreporter, config)


def keep_errors_out(config: pytest.Config, report: RunReport) -> None:
    """Put a JunitFile in the place of pytest's writer, if there is one: as the session starts, before it has any reports."""
    writer = config.stash.get(xml_key, None)
    if writer is not None:
        config.pluginmanager.unregister(writer)
        guarded = config.stash[xml_key] = JunitFile(writer, report)
        config.pluginmanager.register(guarded)
        guarded.pytest_sessionstart()  # the hook of that name is being called already, for the plugins there were
