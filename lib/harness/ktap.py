# SPDX-License-Identifier: GPL-2.0-only
"""The run as KTAP on standard output (--ktap), in place of pytest's own report.

KTAP is the kernel's format for results of tests: Documentation/dev-tools/ktap.rst in its source. Each test is a result, and
the last one is of the run itself: a run that ends early, or with a report in the kernel's log, is "not ok" there.
"""

import os
import sys
from collections.abc import Generator, Iterable
from typing import TYPE_CHECKING, Any

import pytest
from _pytest.terminal import TerminalReporter

from harness.run_report import verdict
from runner.errors import CANNOT_TEST
from runner.live_lines import WatchedOutput

if TYPE_CHECKING:
    from harness.remote import RemoteSession

_THE_RUN = "the run"
# The kinds of results, as kselftest.h counts them
_KINDS = ("pass", "fail", "xfail", "xpass", "skip", "error")
_FAILED = ("fail", "error")
_DIRECTIVES = {"xfail": "XFAIL ", "skip": "SKIP ", "error": "ERROR "}
# What failed in a test's phase; a failure of the test itself needs no words. xdist calls a worker's death "???".
_PHASES = {"setup": "its set-up failed", "teardown": "its tear-down failed", "???": "its process died"}
# What the run's own result says, by pytest's exit status
_ENDS: dict[int, tuple[str, str]] = {
    pytest.ExitCode.OK: ("pass", ""),
    pytest.ExitCode.TESTS_FAILED: ("fail", ""),
    pytest.ExitCode.INTERRUPTED: ("error", "it ended before all tests had run"),
    pytest.ExitCode.INTERNAL_ERROR: ("error", "an error of the suite"),
    pytest.ExitCode.USAGE_ERROR: ("error", "it cannot run as it was called"),
    pytest.ExitCode.NO_TESTS_COLLECTED: ("skip", "no test ran on KVM"),
    CANNOT_TEST: ("skip", "the kernel cannot be tested"),
}


class KtapStream:
    """Writes KTAP to *descriptor*; for pytest's reporter it is a text file, each line of which is a comment.

    The plan has to follow the version line, and is known late: all lines before it wait.
    """

    encoding = "utf-8"

    def __init__(self, descriptor: int) -> None:
        # WatchedOutput, for it survives a terminal that closes.
        self._output = WatchedOutput(os.fdopen(descriptor, "w", encoding=self.encoding, errors="backslashreplace"))
        self._comment = ""  # a comment's begin, until its end of line comes
        self._waiting: list[str] | None = []

    def begin(self, results: int) -> None:
        """Write the version and the plan, and what has waited for them."""
        waiting, self._waiting = self._waiting or [], None
        self.lines(["KTAP version 1", f"1..{results}", *waiting])

    @property
    def begun(self) -> bool:
        """Whether the plan is written."""
        return self._waiting is None

    def lines(self, lines: Iterable[str]) -> None:
        """Write *lines* as they are."""
        if self._waiting is None:
            self._output.write("".join(f"{line}\n" for line in lines))
        else:
            self._waiting += lines

    def write(self, text: str) -> int:
        """Add to the comments."""
        *lines, self._comment = (self._comment + text).split("\n")
        self.lines(_comments(lines))
        return len(text)

    def flush(self) -> None:
        """Nothing waits but a comment without its end, and what waits for the plan."""

    def close(self) -> None:
        """Close the descriptor."""
        self._output.close()
        self._output.file.close()

    def isatty(self) -> bool:
        """A terminal, too, gets nothing but lines."""
        return False

    def fileno(self) -> int:
        """The descriptor for lines that have no place in the stream, such as the progress."""
        return sys.stderr.fileno()


class KtapReporter(TerminalReporter):  # type: ignore[misc] # final; plugins replace it like this nevertheless
    """pytest's reporter for comments, without what the results say."""

    def __init__(self, config: pytest.Config, stream: KtapStream) -> None:
        super().__init__(config, stream)  # type: ignore[arg-type] # it needs no more of a file
        self.hasmarkup = self._tw.hasmarkup = False

    def pytest_runtest_logstart(self, nodeid: str, location: tuple[str, int | None, str]) -> None:
        """Name no test."""

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Only count, for the summary."""
        category, _, _ = self.config.hook.pytest_report_teststatus(report=report, config=self.config)
        self._add_stats(category, [report])

    def pytest_runtest_logfinish(self) -> None:
        """Show no percentage."""

    def summary_errors(self) -> None:
        """Each error came before its result."""

    def summary_failures(self) -> None:
        """Each failure came before its result."""

    def short_test_summary(self) -> None:
        """The results are it."""


class _Result:
    """What the reports of a test say."""

    def __init__(self) -> None:
        self.kind = ""
        self.text = ""
        self.diagnostics: list[str] = []
        self.nested: list[list[str]] = []

    def add(self, report: pytest.TestReport, started: bool) -> None:
        """Add a report, as run_report.py does: what comes first is the verdict, unless something fails later."""
        if hasattr(report, "context"):  # of pytest's fixture subtests
            part = _Result()
            part.add_verdict(report, started)
            self.nested.append(part.lines(len(self.nested) + 1, report.head_line or "a part"))
        elif report.when == "call" or not report.passed:
            self.add_verdict(report, started)

    def add_verdict(self, report: pytest.TestReport, started: bool) -> None:
        """Add a report that says how the test ended."""
        kind, text = _kind(report, started)
        if not self.kind or (kind in _FAILED and self.kind not in _FAILED):
            self.kind, self.text = kind, text
        self.diagnostics += _comments(_diagnostics(report))

    def lines(self, number: int, name: str) -> list[str]:
        """The lines of the result: nested results, diagnostics, and its own."""
        nested = ["KTAP version 1", f"1..{len(self.nested)}"] if self.nested else []
        nested += [line for lines in self.nested for line in lines]
        return [*(f"  {line}" for line in nested), *self.diagnostics, _result_line(self.kind, number, name, self.text)]


class Ktap:
    """A pytest plugin that writes a run's results to standard output as KTAP; all other output goes to standard error."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._stream = KtapStream(_take_stdout(config))
        config.add_cleanup(self._stream.close)
        self._session: pytest.Session | None = None
        self._started: set[str] = set()
        self._open: dict[str, _Result] = {}  # of the tests whose last report has not come
        self._uncollected = 0
        self._counts = dict.fromkeys(_KINDS, 0)

    def pytest_plugin_registered(self, plugin: object, plugin_name: str, manager: pytest.PytestPluginManager) -> None:
        """Replace pytest's reporter as soon as it is there: xdist keeps the one that it finds."""
        if isinstance(plugin, TerminalReporter) and not isinstance(plugin, KtapReporter):
            manager.unregister(plugin)
            manager.register(KtapReporter(self._config, self._stream), plugin_name)

    def pytest_sessionstart(self, session: pytest.Session) -> None:
        self._session = session

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if not report.failed:
            return
        self._stream.lines(_comments(report.longreprtext.splitlines()))
        if not self._stream.begun:
            self._uncollected += 1
            self._write("error", report.nodeid or "a file", "its tests cannot be collected")

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._started.add(nodeid)
        self._begin_if_known()

    @pytest.hookimpl(trylast=True)  # RunReport and others may add to it
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._open.setdefault(report.nodeid, _Result()).add(report, report.nodeid in self._started)
        if report.when not in ("setup", "call"):
            self._end_test(report.nodeid)

    @pytest.hookimpl(wrapper=True, tryfirst=True)  # around all that decides on the exit status, and the summary
    def pytest_sessionfinish(self, session: pytest.Session) -> Generator[None, object, object]:
        done = yield
        for nodeid in [*self._open]:
            self._end_test(nodeid)
        if not self._stream.begun:
            self._stream.begin(self._written + 1)
        kind, text = _ENDS.get(session.exitstatus, ("error", f"exit status {session.exitstatus}"))
        self._write(kind, _THE_RUN, text)
        counts = " ".join(f"{kind}:{count}" for kind, count in self._counts.items())
        self._stream.lines([f"# Totals: {counts}"])
        return done

    @property
    def _written(self) -> int:
        return sum(self._counts.values())

    def _end_test(self, nodeid: str) -> None:
        result = self._open.pop(nodeid)
        if not result.kind:
            return  # it was interrupted, and is reported as not run
        self._begin_if_known()
        self._counts[result.kind] += 1
        self._stream.lines(result.lines(self._written, _clean(nodeid)))

    def _write(self, kind: str, name: str, text: str) -> None:
        self._counts[kind] += 1
        self._stream.lines([_result_line(kind, self._written, name, text)])

    def _begin_if_known(self) -> None:
        """Write the plan, once: tests on this host may run before another kernel has collected its own."""
        remote: RemoteSession | None = self._config.pluginmanager.get_plugin("remote-session")
        if not self._stream.begun and (remote is None or remote.collected):
            assert self._session is not None
            self._stream.begin(self._session.testscollected + self._uncollected + 1)


def _take_stdout(config: pytest.Config) -> int:
    """A descriptor of standard output; what others print there goes to standard error from now on."""
    sys.stdout.flush()
    descriptor = os.dup(sys.stdout.fileno())
    capture: Any = config.pluginmanager.get_plugin("capturemanager")
    if capture is not None:  # as it is with -p no:capture
        capture.stop_global_capturing()  # it would restore the standard output that it has found
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    if capture is not None:
        capture.start_global_capturing()
        capture.suspend_global_capture()
    return descriptor


def _kind(report: pytest.TestReport, started: bool) -> tuple[str, str]:
    """The kind of a test's result, and what its line says about it."""
    word, reason = verdict(report, dict(report.user_properties))
    if word == "FAIL":
        return ("fail", reason) if reason or report.when == "call" else ("error", _PHASES[str(report.when)])
    if word == "not run":  # what was interrupted may be what has hung
        return "error" if started else "skip", f"not run: {reason}"
    kinds = {"pass": "pass", "skipped": "skip", "known bug": "xfail", "known bug, not seen": "xpass"}
    return kinds[word], reason or ("a known bug did not show" if word == "known bug, not seen" else "")


def _diagnostics(report: pytest.TestReport) -> list[str]:
    """All that is known of a failure or a known bug."""
    if report.failed:
        sections = [line for title, text in report.sections for line in (f"--- {title}", *text.splitlines())]
        return [*report.longreprtext.splitlines(), *sections]
    return str(dict(report.user_properties).get("findings", "")).splitlines()


def _result_line(kind: str, number: int, name: str, text: str) -> str:
    about = f" # {_DIRECTIVES.get(kind, '')}{_clean(text)}" if text else ""
    return f"{'not ok' if kind in _FAILED else 'ok'} {number} {_clean(name)}{about}"


def _clean(text: str) -> str:
    """*text* on one line and without the sign that begins a directive."""
    return " ".join(text.split()).replace("#", "_")


def _comments(lines: Iterable[str]) -> list[str]:
    return [f"# {line}".rstrip() for line in lines]
