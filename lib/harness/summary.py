# SPDX-License-Identifier: GPL-2.0-only
"""Plugin: the header of a run, and the verdict at its end."""

from collections.abc import Generator

import pytest
from _pytest.terminal import TerminalReporter

from harness import elsewhere
from harness.early_collection import no_test_matches
from harness.failure_report import column, environment_lines
from harness.kernel_options import other_kernel_options
from harness.run_report import RunReport
from harness.run_state import TARGET
from kvm_util.host import this_host


def pytest_report_header(config: pytest.Config) -> list[str]:
    if TARGET in config.stash:
        return elsewhere.header(config)
    report = _run_report(config)
    unwatched = report.facts.kernel_log if report is not None else None
    unused = other_kernel_options(config.option)
    return [
        *environment_lines(this_host()),
        f"seed     {config.option.seed}",
        *([f"kernel log {unwatched}"] if unwatched else []),
        *(column(f"tainted  {', '.join(report.facts.taint)}") if report is not None and report.facts.taint else []),
        *([f"not used {', '.join(unused)}: the tests run on this host"] if unused else []),
    ]


@pytest.hookimpl(tryfirst=True)
def pytest_sessionstart(session: pytest.Session) -> None:
    report = _run_report(session.config)
    if report is not None and getattr(session.config.option, "xmlpath", None):
        from harness.junit_file import (
            guard_junit_file,  # slow to import, and not needed in a booted kernel
        )

        guard_junit_file(session.config, report)


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """A selection that matches no test is a usage error, and no verdict."""
    report = _run_report(session.config)
    here = TARGET not in session.config.stash
    if report is not None and here and session.exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED:
        session.exitstatus = pytest.ExitCode.USAGE_ERROR
        report.notes.append(no_test_matches(session.config.option, session.config.args))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_terminal_summary(
    terminalreporter: TerminalReporter, exitstatus: int, config: pytest.Config
) -> Generator[None, None, None]:
    """The verdict on the kernel comes last."""
    yield
    report = _run_report(config)
    if report is not None and not config.option.collectonly:
        report.show_verdict(terminalreporter, exitstatus)


def _run_report(config: pytest.Config) -> RunReport | None:
    """The report of this run; None in a worker of xdist."""
    report: RunReport | None = config.pluginmanager.get_plugin("run-report")
    return report
