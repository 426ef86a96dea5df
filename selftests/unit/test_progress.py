# SPDX-License-Identifier: GPL-2.0-only
"""Progress display: status lines at the bottom of a terminal, plain lines elsewhere, and the progress of downloads."""

import fcntl
import io
import json
import os
import random
import re
import select
import struct
import sys
import termios
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TextIO, cast

import pytest

from dirty_tracking import progress
from dirty_tracking.progress import Meter, Step
from harness import progress as run_progress
from harness.interruption import Interruption
from harness.planned_tests import PlannedTests
from harness.progress import Progress, WorkerProgress
from harness.remote import RemoteSession
from harness.report_stream import ReportStream
from harness.run_report import Facts, RunReport
from runner import waiting
from runner.apt import Suite
from runner.live_lines import LiveLines, is_terminal
from runner.store import locked
from runner.target import Target
from runner.waiting import duration
from selftests.unit.commands import ONE_CELL, open_terminal, pytest_command, read, running

ROWS, COLUMNS = 24, 80
INTERRUPTED = 2
CELL = "dirty-log-48bit-4k-anonymous-forced-sparse-1vcpu"
CELL_TEST = f"selftests/matrix/test_dirty_log.py::test_dirty_log[{CELL}]"


# --- a terminal -------------------------------------------------------------------------------------------------------


class Screen:
    """A terminal emulator that knows the escape sequences used by the suite, and no others.

    Its lines are all that were ever there; the screen shows the last ones.
    """

    def __init__(self, rows: int = ROWS) -> None:
        self._rows = rows
        self._lines = [""] * rows
        self._row = self._column = 0
        self._saved = (0, 0)  # the row is that on the screen: it does not scroll

    def feed(self, text: str) -> None:
        """Process output."""
        for part in re.findall(r"\x1b\[[0-9;]*[A-Za-z]|\x1b.|[^\x1b]", text, re.DOTALL):
            if part == "\r":
                self._column = 0
            elif part in ("\n", "\x1bD"):
                self._down()
            elif part == "\x1b7":
                self._saved = (self._row - self._top, self._column)
            elif part == "\x1b8":
                self._row, self._column = self._saved[0] + self._top, self._saved[1]
            elif part in ("\x1b[K", "\x1b[J"):
                self._lines[self._row] = self._lines[self._row][: self._column]
                if part == "\x1b[J":
                    below = slice(self._row + 1, None)
                    self._lines[below] = [""] * len(self._lines[below])
            elif match := re.fullmatch(r"\x1b\[(\d+)A", part):
                self._row = max(self._row - int(match[1]), self._top)
                self._column = min(self._column, COLUMNS - 1)  # forgets a pending wrap
            elif match := re.fullmatch(r"\x1b\[(\d+)G", part):
                self._column = min(int(match[1]), COLUMNS) - 1
            elif not re.fullmatch(r"\x1b\[[0-9;]*m", part):
                assert len(part) == 1, f"unknown sequence {part!r}"
                self._put(part)

    @property
    def text(self) -> str:
        """All lines, beginning with those scrolled off, without empty lines at the end."""
        return "\n".join(line.rstrip() for line in self._lines).rstrip()

    @property
    def cursor_line(self) -> str:
        return self._lines[self._row]

    @property
    def _top(self) -> int:
        return len(self._lines) - self._rows

    def _put(self, character: str) -> None:
        if self._column == COLUMNS:
            self._column = 0
            self._down()
        line = self._lines[self._row].ljust(self._column)
        self._lines[self._row] = line[: self._column] + character + line[self._column + 1 :]
        self._column += 1

    def _down(self) -> None:
        self._row += 1
        if self._row == len(self._lines):
            self._lines.append("")


@dataclass
class Terminal:
    """A pseudo terminal.

    :ivar file: the side that programs print to
    """

    file: TextIO
    _master: int

    def printed(self) -> str:
        """The output since the last call."""
        self.file.flush()
        data = b""
        while select.select([self._master], [], [], 0)[0]:
            data += os.read(self._master, 1 << 16)
        return data.decode()


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Terminal]:
    master, slave = open_terminal()
    monkeypatch.setenv("TERM", "xterm")
    with open(slave, "w") as file:
        yield Terminal(file, master)
    os.close(master)


# --- status lines -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_status_lines_leave_no_trace(terminal: Terminal, seed: int) -> None:
    """Status lines stay below whatever is printed, anywhere on the screen, and leave no trace when they are closed."""
    draw = random.Random(seed)
    lines, screen, plain = LiveLines(terminal.file), Screen(), Screen()
    for _ in range(60):
        if draw.randrange(2):
            text = draw.choice(
                ["", "\n", "word ", "a line\n", "x" * 79, "\r", "wrapped " * 20, "\x1b[32mx\x1b[0m", "\x1b[0m"]
            )
            lines.write(text)
            plain.feed(text.replace("\n", "\r\n"))
            screen.feed(terminal.printed())
        else:
            shown = [f"live {number}".ljust(draw.randrange(6, COLUMNS), "=") for number in range(draw.randrange(6))]
            lines.show(shown)
            screen.feed(terminal.printed())
            assert screen.text.splitlines()[-len(shown) :] == shown or not shown
        assert screen.cursor_line == plain.cursor_line
    lines.close()
    screen.feed(terminal.printed())
    assert screen.text == plain.text


def test_no_status_lines_print_nothing(terminal: Terminal) -> None:
    """Showing no lines prints nothing, so that a full screen does not scroll."""
    lines = LiveLines(terminal.file)
    lines.write("printed\n" * ROWS)
    terminal.printed()
    lines.show([])
    lines.close()
    assert terminal.printed() == ""


def test_status_lines_on_a_low_terminal(terminal: Terminal) -> None:
    """There are at most as many status lines as fit below the cursor."""
    fcntl.ioctl(terminal.file, termios.TIOCSWINSZ, struct.pack("HHHH", 3, COLUMNS, 0, 0))
    lines, screen = LiveLines(terminal.file), Screen(rows=3)
    lines.write("printed\n" * 5 + "here")
    lines.show(["1", "2", "3", "4"])
    screen.feed(terminal.printed())
    assert screen.text.splitlines()[-3:] == ["here", "1", "2"]
    lines.close()


@pytest.mark.parametrize(("kind", "live"), [("xterm", True), ("dumb", False), (None, False)])
def test_terminal_detection(terminal: Terminal, monkeypatch: pytest.MonkeyPatch, kind: str | None, live: bool) -> None:
    """Status lines need a terminal whose TERM says that it can move its cursor."""
    monkeypatch.delenv("TERM") if kind is None else monkeypatch.setenv("TERM", kind)
    assert is_terminal(terminal.file) == live
    assert not is_terminal(io.StringIO())


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0 s"), (59.9, "59 s"), (60, "1 min 0 s"), (3599, "59 min 59 s"), (7500, "2 h 5 min")]
)
def test_duration_in_two_units(seconds: float, text: str) -> None:
    """A duration has at most two units and is rounded down."""
    assert duration(seconds) == text


# --- progress of tests ------------------------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A fake monotonic clock; set *now* to advance it."""
    clock = SimpleNamespace(now=100.0)
    for module in ("dirty_tracking.progress", "harness.progress", "harness.report_stream"):
        monkeypatch.setattr(f"{module}.time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


def test_remaining_time_of_a_cell(clock: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """The time left follows the slowest vCPU's share of the first iteration, later how long the last one took."""
    steps: list[Step] = []
    monkeypatch.setattr(progress, "listener", steps.append)
    meter = Meter(11, interval=1)

    def after(seconds: float, *writes: int) -> Step:
        clock.now += seconds
        meter.read(lambda: writes)
        return steps[-1]

    meter.begin([0, 0], [100, 100])
    meter.read(lambda: [0, 0])
    assert not steps  # no write yet
    assert after(2, 0, 1) == Step(1, 11, 1, None)
    assert after(2, 20, 50) == Step(1, 11, 70, 4 / 20 * 80 + 10)
    assert len(steps) == 2
    after(0.01, 21, 50)
    assert len(steps) == 2  # too soon after the last one
    meter.begin([100, 110], [200, 200])
    assert after(0.5, 101, 111) == Step(2, 11, 212, 0.5 + 9)
    clock.now += 3.5
    meter.begin([200, 200], [300, 300])
    assert after(1, 250, 250) == Step(3, 11, 500, 3 + 8 * 4)
    assert after(10, 260, 250).left == 8 * 4


def progress_of(total: int = 2) -> Any:
    """A Progress in a session with *total* tests."""
    plugin: Any = Progress(cast(pytest.Config, None))
    plugin._session = SimpleNamespace(testscollected=total)
    plugin._started = run_progress._Activity("").started
    return plugin


def test_running_tests_are_listed(clock: SimpleNamespace) -> None:
    """Running tests are listed oldest first with time and progress, a few of many, and clipped to the terminal's width."""
    plugin = progress_of(total=20)
    plugin.pytest_runtest_logstart(nodeid=CELL_TEST)
    clock.now += 5
    for number in range(5):
        plugin.pytest_runtest_logstart(nodeid=f"selftests/test_a.py::test_{number}")
    plugin.update(CELL_TEST, Step(12, 32, 1_234_567, 21.0))
    clock.now += 65
    assert plugin._live_lines(79) == [
        "[........................]  0 of 20 tests, 1 min 10 s",
        "1 min 10 s  dirty-log-48bit-..: iteration 12 of 32, 1.2M writes, about 1 s left",
        *(f" 1 min 5 s  test_{number}" for number in range(3)),
        "            and 2 more",
    ]
    assert all(len(line) <= 40 for line in plugin._live_lines(40))
    assert plugin._plain_line() == (
        f"after 1 min 10 s: 0 of 20 tests done, now: {CELL}"
        " (1 min 10 s, iteration 12 of 32, 1.2M writes, about 1 s left);"
        " test_0 (1 min 5 s); test_1 (1 min 5 s); test_2 (1 min 5 s); 2 more"
    )


def test_operation_between_tests(clock: SimpleNamespace) -> None:
    """An operation between tests, such as a boot, is shown until the next test begins."""
    plugin = progress_of(total=0)
    plugin.pytest_runtest_logstart(nodeid="a")
    plugin.announce("booting")
    clock.now += 12
    assert plugin._live_lines(79) == ["booting: 12 s"]
    assert plugin._plain_line() == "after 12 s: booting, for 12 s now"
    plugin.pytest_runtest_logstart(nodeid="b")
    assert plugin._live_lines(79) == ["0 of 0 tests, 12 s", "   0 s  b"]


def report(nodeid: str, when: Any, outcome: Any) -> pytest.TestReport:
    return pytest.TestReport(nodeid, ("", 0, ""), {}, outcome, None, when)


def test_finished_tests_are_counted() -> None:
    """A test is counted once, at its first verdict, also if its worker crashed."""
    plugin = progress_of(total=4)
    for nodeid in "abc":
        plugin.pytest_runtest_logstart(nodeid=nodeid)
    plugin.pytest_runtest_logreport(report("a", "setup", "passed"))
    assert plugin._count() == "0 of 4 tests"
    plugin.pytest_runtest_logreport(report("a", "call", "passed"))
    plugin.pytest_runtest_logreport(report("a", "teardown", "failed"))
    plugin.pytest_runtest_logreport(report("b", "setup", "skipped"))
    plugin.pytest_runtest_logreport(report("b", "teardown", "passed"))
    assert (plugin._count(), [test.name for test in plugin._running.values()]) == ("2 of 4 tests", ["c"])
    plugin.pytest_runtest_logreport(report("c", "???", "failed"))
    assert (plugin._count(), plugin._running, plugin._plain_line()) == ("3 of 4 tests", {}, None)


def test_progress_of_workers(restored_listener: None) -> None:
    """The controller reads each worker's newest step, and ignores incomplete records and tests that have ended."""
    plugin = progress_of()
    nodes = [SimpleNamespace(workerinput={}) for _ in range(2)]
    for node, nodeid in zip(nodes, "ab", strict=True):
        plugin.pytest_configure_node(node=node)
        plugin.pytest_runtest_logstart(nodeid=nodeid)
        worker = WorkerProgress(*node.workerinput["progress"])
        worker.pytest_runtest_logstart(nodeid=nodeid)
        assert progress.listener is not None
        progress.listener(Step(1, 9, 5, None))
        progress.listener(Step(2, 9, 10, None))
        plugin._read_records()
        worker.pytest_unconfigure()
    assert [test.step for test in plugin._running.values()] == [Step(2, 9, 10, None)] * 2
    os.pwrite(plugin._records, b'["b", 3, 9, 100, n', nodes[1].workerinput["progress"][1])
    plugin.pytest_runtest_logreport(report("a", "teardown", "passed"))
    plugin._read_records()
    assert [test.step for test in plugin._running.values()] == [Step(2, 9, 10, None)]
    plugin.pytest_unconfigure()


@pytest.fixture
def restored_listener(monkeypatch: pytest.MonkeyPatch) -> None:
    """Restore the progress listener of the surrounding run after a test that sets another one."""
    monkeypatch.setattr(progress, "listener", None)


def test_progress_from_a_booted_kernel(tmp_path: Path, clock: SimpleNamespace, restored_listener: None) -> None:
    """A session in another kernel sends the first step of each test at once, and later ones at intervals."""
    facts = Facts({}, {}, [])
    stream = ReportStream(cast(pytest.Config, None), str(tmp_path / "stream"), RunReport(tmp_path, facts))
    updates = []
    for test in ("a", "b"):
        stream.pytest_runtest_logstart(nodeid=test)
        for iteration in range(1, 5):
            assert progress.listener is not None
            progress.listener(Step(iteration, 4, 100, 1.5))
            clock.now += 1
    stream.pytest_unconfigure()
    messages = [json.loads(line) for line in (tmp_path / "stream").read_text().splitlines()]
    assert [message["step"][0] for message in messages if "step" in message] == [1, 3, 1, 3]

    report, planned = RunReport(tmp_path, facts), PlannedTests({}, Interruption())
    session: Any = RemoteSession(cast(Target, None), [], "", [], False, tmp_path, report, planned)
    boot: Any = SimpleNamespace(running="b")
    session._progress = SimpleNamespace(update=lambda *what: updates.append(what))
    session.handle_message(boot, messages[-1])
    assert updates == [("b", Step(3, 4, 100, 1.5))]


# --- downloads and other operations before pytest starts --------------------------------------------------------------

SLOW_APT = """#!/bin/sh
case "$*" in
*--print-uris*)
    echo "'http://mirror.test/a_1_amd64.deb' a_1_amd64.deb 1000000 SHA256:0"
    echo "'http://mirror.test/b%3a_1_amd64.deb' b_1_amd64.deb 1000000";;
*)
    head -c 1000000 /dev/zero >a_1_amd64.deb
    until [ -e "$0.seen" ]; do sleep 0.05; done
    head -c 1000000 /dev/zero >b_1_amd64.deb;;
esac
"""


@pytest.mark.parametrize(
    ("live", "output"),
    [
        (False, r"downloading 2 packages, 2\.0 MB\n(.*\n)*downloading 2 packages: 1\.0 of 2\.0 MB, \d s\n(.*\n)*"),
        (True, r"(.*\r)*downloading 2 packages: \[#{12}\.{12}\] 1\.0 of 2\.0 MB, \d s\x1b\[K(.*)\r\x1b\[K"),
    ],
)
def test_progress_of_a_download(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    terminal: Terminal, live: bool, output: str,
) -> None:  # fmt: skip
    """A download's progress is lines at intervals, or a bar that is erased at the end; then its duration is printed."""
    if live:
        monkeypatch.setattr(sys, "stderr", terminal.file)
    (tmp_path / "apt-get").write_text(SLOW_APT)
    (tmp_path / "apt-get").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("DEBIAN_MIRROR", "http://mirror.test/debian")
    monkeypatch.setattr("runner.apt.BUILD", tmp_path / "build")
    monkeypatch.setattr(waiting, "SILENCE", 0.1)
    monkeypatch.setattr(waiting, "_TICK", 0.1)
    real = waiting._print

    def shown(text: str) -> None:
        real(text)
        if "1.0 of 2.0 MB" in text:
            (tmp_path / "apt-get.seen").touch()  # now the second package arrives

    monkeypatch.setattr(waiting, "_print", shown)
    assert len(Suite("trixie").download(["a", "b"])) == 2
    printed = terminal.printed() if live else capsys.readouterr().err
    assert re.fullmatch(output + r"downloaded 2 packages, 2\.0 MB, in \d s\r?\n", printed)


def test_progress_bar_of_an_operation(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal, an operation has a bar, which vanishes at the end; a long name is clipped to leave room for it."""
    monkeypatch.setattr(sys, "stderr", terminal.file)
    monkeypatch.setattr(waiting, "_TICK", 0.05)
    calls = threading.Semaphore(0)

    def figure() -> tuple[float, str]:
        calls.release()
        return 0.5, "50 %"

    with waiting.waiting("kernel " * 20, figure):
        for _ in range(2):  # the first value has been shown when the second one is requested
            assert calls.acquire(timeout=30)
    printed, screen = terminal.printed(), Screen()
    assert f"{'kernel ' * 20}"[:39] + "..: [############............] 50 %, 0 s\x1b[K" in printed
    screen.feed(printed)
    assert screen.text == ""


def test_wait_for_another_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that has to wait for another one says so at once, and then for how long."""
    with locked(tmp_path):
        other = os.open(tmp_path / ".lock", os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    lines = []

    def shown(text: str) -> None:
        lines.append(text)
        if len(lines) == 2:
            os.close(other)

    monkeypatch.setattr(waiting, "SILENCE", 0.1)
    monkeypatch.setattr(waiting, "_print", shown)
    with locked(tmp_path):
        assert lines[0] == f"waiting for another run that writes to {tmp_path}\n"
        assert re.fullmatch(rf"{re.escape(lines[0].strip())}: \d s\n", lines[1])


# --- whole runs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [[], ["-n2"]], ids=["alone", "xdist"])
@pytest.mark.usefixtures("kvm")
@pytest.mark.slow
def test_status_lines_during_a_cell(tmp_path: Path, workers: list[str]) -> None:
    """A long cell is shown with iteration, writes and time left; after Ctrl-C no trace of that is left."""
    ours, theirs = open_terminal()
    command, environment = pytest_command(tmp_path)
    screen = Screen(rows=200)
    interrupted = False
    figures = r"^ +\d+ s  dirty-\S+\.\.: iteration \d+ of 9000, \d+k? writes, about \d.* left$"
    with running([*command, *ONE_CELL, "--test-mem=4M", "--iterations=9000", *workers], environment, theirs) as process:
        for text in read(ours):
            screen.feed(text)
            if not interrupted and re.search(rf"^\[\.+\]  0 of 1 test, \d+ s\n{figures}", screen.text, re.MULTILINE):
                os.write(ours, b"\x03")
                interrupted = True
        assert process.wait(10) == INTERRUPTED, screen.text
    assert interrupted, screen.text
    assert "^C" in screen.text
    assert "KeyboardInterrupt" in screen.text
    assert not re.search(r"iteration \d|\[\.+\]|of 1 test,", screen.text), screen.text


IMPATIENT = """
import harness.progress
harness.progress.SILENCE = harness.progress.MORE_SILENCE = 1.0
"""


@pytest.mark.usefixtures("kvm")
@pytest.mark.slow
def test_plain_lines_during_a_cell(tmp_path: Path) -> None:
    """Plain lines name a long cell repeatedly in a pipe, on a dumb terminal, and without capture."""
    cases: list[tuple[str, tuple[int, int], list[str], dict[str, str]]] = [
        ("pipe", os.pipe(), ["-n2"], {}),
        ("dumb", open_terminal(), [], {"TERM": "dumb"}),
        ("no-capture", open_terminal(), ["-s"], {}),
    ]
    with ExitStack() as stack:
        processes = []
        for name, (_, theirs), options, changes in cases:
            command, environment = pytest_command(tmp_path / name, IMPATIENT)
            command += [*ONE_CELL, "--test-mem=4M", "--iterations=17", "--interval=200", *options]
            processes.append(stack.enter_context(running(command, environment | changes, theirs)))
        for (name, (ours, _), _, _), process in zip(cases, processes, strict=True):
            text = "".join(read(ours)).replace("\r\n", "\n")
            assert process.wait(10) == 0, text
            named = rf"{CELL} \(\d+ s, iteration \d+ of 17, \d+k? writes, about \d s left\)"
            lines = re.findall(rf"(?m)^after \d+ s: 0 of 1 test done, now: {named}$", text)
            assert len(lines) >= 2, f"{name}: {text}"
            assert not re.search(r"\x1b[^\[]|\x1b\[[^\dm]", text), f"{name}: {text!r}"
