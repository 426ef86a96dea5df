# SPDX-License-Identifier: GPL-2.0-only
"""Progress display: status lines at the bottom of a terminal; elsewhere plain lines after some time without output."""

import json
import os
import re
import threading
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import astuple, dataclass, field
from typing import Any

import pytest

from dirty_tracking import progress
from dirty_tracking.progress import Step
from kvm_util.wording import counted, short_number
from runner.live_lines import LiveLines, WatchedOutput, is_terminal
from runner.waiting import bar, clipped, duration

# Seconds without output before a plain line names the running tests, and before each further line
SILENCE, MORE_SILENCE = 30.0, 60.0
# Seconds between updates on a terminal, and before the first one, so that short runs show none
_TICK = 0.5
_FIRST_TICK = 1.0
_MOST_TESTS = 4
_FIGURES = 48  # minimum columns for a test's figures, so that the space for its name changes rarely
# Bytes for each xdist worker in the file that it shares with the controller
_RECORD = 1024


@dataclass
class _Activity:
    """A running test, or an operation between tests."""

    name: str
    started: float = field(default_factory=lambda: time.monotonic())
    step: Step | None = None
    stepped: float = 0.0

    def update(self, step: Step) -> None:
        """Record progress."""
        if step != self.step:
            self.step, self.stepped = step, time.monotonic()

    @property
    def age(self) -> float:
        """Seconds since it started."""
        return time.monotonic() - self.started

    @property
    def figures(self) -> str:
        """The last progress in words; empty if there is none."""
        if self.step is None:
            return ""
        text = f"iteration {self.step.iteration} of {self.step.iterations}, {short_number(self.step.writes)} writes"
        if self.step.left is None:
            return text
        return f"{text}, about {duration(max(self.step.left - (time.monotonic() - self.stepped), 1))} left"


class Progress:
    """A pytest plugin that displays progress, in the process that owns the terminal."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._running: dict[str, _Activity] = {}
        self._done: set[str] = set()
        self._between: _Activity | None = None
        self._started = 0.0
        self._workers = 0
        self._records = -1
        self._output: WatchedOutput | None = None
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def announce(self, text: str) -> None:
        """Show *text* as the current operation until the next test begins."""
        self._running.clear()
        self._between = _Activity(text)
        if self._output is not None and not isinstance(self._output, LiveLines):
            self._reporter.write_line(text)

    def update(self, nodeid: str, step: Step) -> None:
        """Record the progress of a running test; ignored if the test does not run."""
        if test := self._running.get(nodeid):
            test.update(step)

    def forget(self, nodeid: str) -> None:
        """Show a running test no longer: it ended with its kernel."""
        self._running.pop(nodeid, None)

    # --- hooks

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node: Any) -> None:
        if not self._workers:
            self._records = os.memfd_create("progress")
        # Workers are children of this process and may open its files through /proc.
        node.workerinput["progress"] = (f"/proc/{os.getpid()}/fd/{self._records}", self._workers * _RECORD)
        self._workers += 1

    def pytest_unconfigure(self) -> None:
        self._stop()  # again: a second Ctrl-C may have interrupted the first call
        if self._workers:
            os.close(self._records)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> Generator[None, object, object]:
        self._session = session
        with self._shown():
            return (yield)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._between = None
        self._running[nodeid] = _Activity(nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or not report.passed:
            self._done.add(report.nodeid)
        if report.when not in ("setup", "call"):  # "???" if the worker crashed
            self._running.pop(report.nodeid, None)

    def pytest_enter_pdb(self) -> None:
        """Stop the display: the debugger needs the terminal."""
        self._stop()

    # --- display

    @contextmanager
    def _shown(self) -> Iterator[None]:
        option = self._config.option
        self._reporter: Any = self._config.pluginmanager.get_plugin("terminalreporter")
        if self._reporter is None or option.usepdb or option.trace:
            yield
            return
        self._started = time.monotonic()
        writer = self._reporter._tw  # there is no public way to replace the writer's file
        file = writer._file
        # With weaker capture, child processes of tests print to the terminal directly, through the status lines.
        live = is_terminal(file) and option.capture == "fd"
        self._output = writer._file = LiveLines(file) if live else WatchedOutput(file)
        progress.listener = self._update_running
        self._thread = threading.Thread(target=self._follow, args=[self._output], name="progress", daemon=True)
        with suppress(RuntimeError):  # if no thread can be started, the tests report it
            self._thread.start()
        try:
            yield
        finally:
            self._stop()
            progress.listener = None

    def _stop(self) -> None:
        self._over.set()
        if self._output is not None and self._thread is not None:
            if self._thread.ident is not None:
                self._thread.join()
            self._reporter._tw._file = self._output.file
            self._output.close()
            self._output = None

    def _update_running(self, step: Step) -> None:
        """Record the progress of the test that runs in this process."""
        for test in self._running.values():
            test.update(step)

    def _follow(self, output: WatchedOutput) -> None:
        """The display thread: update the display until the run ends."""
        printed, since, patience = output.writes, time.monotonic(), SILENCE
        tick = _FIRST_TICK
        while not self._over.wait(tick):
            tick = _TICK
            self._read_records()
            if isinstance(output, LiveLines):
                output.show(self._live_lines(output.columns))
                continue
            now = time.monotonic()
            if output.writes != printed:
                printed, since, patience = output.writes, now, SILENCE
            elif now - since >= patience and (text := self._plain_line()):
                output.print_line(text)
                self._reporter.currentfspath, self._reporter._tw._current_line = None, ""
                since, patience = now, MORE_SILENCE

    def _read_records(self) -> None:
        """Read the progress of the workers' tests from the shared file."""
        for worker in range(self._workers):
            record = os.pread(self._records, _RECORD, worker * _RECORD).rstrip(b"\0 ")
            try:
                nodeid, *step = json.loads(record)
                self.update(nodeid, Step(*step))
            except (ValueError, TypeError):
                continue  # not written yet, or being written right now

    def _live_lines(self, columns: int) -> list[str]:
        if between := self._between:
            return [f"{between.name}: {duration(between.age)}"[:columns]]
        tests = [*self._running.values()]  # the oldest first
        if not tests:
            return []
        total = self._session.testscollected
        share = f"{bar(len(self._done) / total)}  " if total else ""
        lines = [f"{share}{self._count()}, {duration(time.monotonic() - self._started)}"]
        ages = [duration(test.age) for test in tests[:_MOST_TESTS]]
        width = max(6, *map(len, ages))
        for age, test in zip(ages, tests, strict=False):
            figures = f": {test.figures}" if test.figures else ""
            room = columns - width - 2 - (max(len(figures), _FIGURES) if figures else 0)
            lines.append(f"{age:>{width}}  {clipped(_short_name(test.name), room)}{figures}")
        if len(tests) > _MOST_TESTS:
            lines.append(f"{'':{width}}  and {len(tests) - _MOST_TESTS} more")
        return [line[:columns] for line in lines]

    def _plain_line(self) -> str | None:
        after = f"after {duration(time.monotonic() - self._started)}"
        if between := self._between:
            return f"{after}: {between.name}, for {duration(between.age)} now"
        tests = [*self._running.values()]  # the oldest first
        if not tests:
            return None
        named = [
            f"{_short_name(test.name)} ({duration(test.age)}{test.figures and f', {test.figures}'})"
            for test in tests[:_MOST_TESTS]
        ]
        named += [f"{len(tests) - _MOST_TESTS} more"] * (len(tests) > _MOST_TESTS)
        return f"{after}: {self._count()} done, now: {'; '.join(named)}"

    def _count(self) -> str:
        return f"{len(self._done)} of {counted(self._session.testscollected, 'test')}"


class WorkerProgress:
    """A pytest plugin for an xdist worker that reports the progress of its tests to the controller.

    :param path: the file shared with the controller
    :param offset: of this worker's record in the file, in bytes
    """

    def __init__(self, path: str, offset: int) -> None:
        self._file = os.open(path, os.O_WRONLY)
        self._offset = offset
        self._nodeid = ""
        progress.listener = self._write

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._nodeid = nodeid

    def pytest_unconfigure(self) -> None:
        progress.listener = None
        os.close(self._file)

    def _write(self, step: Step) -> None:
        text = json.dumps([self._nodeid, *astuple(step)])
        os.pwrite(self._file, text.encode().ljust(_RECORD), self._offset)


def _short_name(nodeid: str) -> str:
    """A test's id without its file; for the main test only the cell, which identifies it."""
    name = nodeid.rpartition("/")[2].partition("::")[2] or nodeid
    return re.sub(r"^test_dirty_log\[(.*)\]$", r"\1", name)
