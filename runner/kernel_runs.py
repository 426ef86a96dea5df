# SPDX-License-Identifier: GPL-2.0-only
"""Tests kernels, each in a process of its own, and reads what each run has left; for the commands that test several."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from harness.kernel_options import MACHINE_OPTIONS, OWN_TESTS
from kvm_util.wording import counted
from runner import ROOT
from runner.check_kernel import STATUSES
from runner.errors import CANNOT_TEST
from runner.run_verdicts import INTERRUPTED, NOT_RUN, USAGE_ERROR, print_line, verdict_of
from runner.waiting import waiting

HOST = "host"  # in place of a kernel: the one that runs here, with the KVM that is loaded
_KVM_TESTS = sorted(
    {f"selftests/{file.parent.name}/" for file in (ROOT / "selftests").glob("*/test_*.py")} - {OWN_TESTS}
)
# pytest's exit statuses there: where no test ran, this host may have no KVM, and the other kernels may
_HOST_STATUSES = STATUSES | {pytest.ExitCode.NO_TESTS_COLLECTED: CANNOT_TEST}
_POLL = 0.1  # seconds between looks at the runs
# What pytest prints behind each test that has ended
PERCENTAGE = re.compile(r"\[ *(\d+)%\]")
# The lines in which a run gives its reason for testing nothing
_REASON = re.compile(r"(?:ERROR: (?!usage:)|(?:.*: )?cannot be tested: |.*: error: )(.+)")


class Planned(NamedTuple):
    """A run to make.

    :ivar parameters: of the kernel's KVM modules
    :ivar folder: for all its files
    :ivar arguments: of pytest
    :ivar file: the one file of ``make standalone``, if *kernel* is another host's, by the name that ssh takes
    """

    kernel: str
    parameters: str
    folder: Path
    arguments: list[str]
    file: Path | None = None

    @property
    def command(self) -> list[str]:
        """What makes the run, with check_kernel.py's exit status, or pytest's for this host's kernel."""
        if self.file is not None:
            program = str(ROOT / "runner" / "ssh_run.py")
            return [sys.executable, program, self.kernel, str(self.file), str(self.folder), *self.arguments]
        options = [f"--results={self.folder}", *self.arguments]
        if self.kernel == HOST:
            testpaths = f"testpaths={' '.join(_KVM_TESTS)}"
            here = split_options(options, MACHINE_OPTIONS)[1]
            return [sys.executable, "-m", "pytest", "-v", "-o", testpaths, *here]
        program = str(ROOT / "runner" / "check_kernel.py")
        return [sys.executable, program, self.kernel, f"--kvm-params={self.parameters}", *options]

    @property
    def name(self) -> str:
        """What is tested, in words."""
        return self.kernel if self.file is not None else f"{self.kernel} {self.parameters or 'defaults'}"


@dataclass(frozen=True)
class RunResult:
    """The result of testing one kernel with one set of parameters.

    :ivar status: as check_kernel.py exits with it, or NOT_RUN
    :ivar cells: the rows of the cells in results.json
    :ivar tests: the rows of the other tests
    :ivar release: as ``uname -r`` has it, if the kernel booted
    :ivar reason: why it is not good, in a line
    """

    kernel: str
    parameters: str
    status: int
    cells: list[dict[str, Any]]
    tests: list[dict[str, Any]]
    release: str
    reason: str

    @property
    def verdict(self) -> str:
        """The verdict and its reason."""
        return verdict_of(self.status) + (f": {self.reason}" if self.reason else "")


@dataclass
class Run:
    """A kernel that is being tested, in a process of its own.

    :ivar label: its number and the kernel, in words
    """

    label: str
    planned: Planned
    process: "subprocess.Popen[bytes]"
    started: float

    @classmethod
    def start(cls, label: str, planned: Planned) -> "Run":
        """Begin to test a kernel.

        :raises OSError: its folder cannot be written
        """
        folder = planned.folder
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "results.json").unlink(missing_ok=True)  # of an earlier matrix with the same --results
        with (folder / "output.txt").open("wb") as output:
            # Unbuffered, or pytest's errors, which go to standard error, would stand in the middle of another line.
            environment = os.environ | {"PYTHONUNBUFFERED": "1"}
            process = subprocess.Popen(
                planned.command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, env=environment
            )
        return cls(label, planned, process, time.monotonic())

    def result(self, interrupted: bool) -> "RunResult":
        """The result, once the process has ended."""
        status = INTERRUPTED if interrupted else self.process.wait()
        return _read_result(self.planned, status)


class Runs:
    """Tests kernels, up to *at_once* at the same time.

    :param last_status: a run with this exit status or a higher one is the last that is begun
    """

    def __init__(self, at_once: int, last_status: int = USAGE_ERROR) -> None:
        self._at_once = at_once
        self._last_status = last_status
        self._signals: list[int] = []  # that came, and are not passed on yet
        self._ended = False  # by a signal, or by the status of a run
        self._interrupted = False
        self._running: dict[int, Run] = {}
        self._results: dict[int, RunResult] = {}

    def run(self, planned: Sequence[Planned]) -> list[RunResult]:
        """Test each kernel with its parameters, until all are done, or a signal or a run's status ends it."""
        left = deque(enumerate(planned))
        with self._noting_signals():
            while self._running or (left and not self._ended):
                self._pass_signals_on()  # one that came between two runs
                while left and not self._ended and self._has_room(left[0][1]):
                    self._start(*left.popleft(), len(planned))
                self._wait()
        return [
            self._results.get(number) or RunResult(run.kernel, run.parameters, NOT_RUN, [], [], run.kernel, "")
            for number, run in enumerate(planned)
        ]

    def _has_room(self, planned: Planned) -> bool:
        """Whether a run may be made beside those that are; that of this host's own kernel is made alone."""
        runs = [planned, *(run.planned for run in self._running.values())]
        alone = any(run.kernel == HOST and run.file is None for run in runs)
        return len(self._running) < (1 if alone else self._at_once)

    def _start(self, number: int, planned: Planned, count: int) -> None:
        label = f"[{number + 1}/{count}] {planned.name}"
        try:
            run = Run.start(label, planned)
        except OSError as error:
            reason = f"{error.filename}: {error.strerror}"
            failed = RunResult(planned.kernel, planned.parameters, CANNOT_TEST, [], [], planned.kernel, reason)
            self._finish(number, label, failed, 0)
        else:
            self._running[number] = run

    def _wait(self) -> None:
        """Wait for one of those that run, pass signals on to them, and print the verdict of each that has ended."""
        runs = [*self._running.values()]
        if not runs:
            return
        labels = ", ".join(run.label for run in runs)
        with waiting(labels, lambda: _progress(runs), f"{labels} ..."):
            while all(run.process.poll() is None for run in runs):
                self._pass_signals_on()
                time.sleep(_POLL)
        self._pass_signals_on()
        for number, run in [*self._running.items()]:
            if run.process.poll() is not None:
                del self._running[number]
                self._finish(number, run.label, run.result(self._interrupted), time.monotonic() - run.started)

    def _pass_signals_on(self) -> None:
        while self._signals:
            number = self._signals.pop(0)
            self._ended = self._interrupted = True
            for run in self._running.values():
                # A terminal has sent SIGINT to the runs too, if they had begun. A second one changes nothing there.
                run.process.send_signal(number)

    def _finish(self, number: int, label: str, result: RunResult, seconds: float) -> None:
        self._results[number] = result
        self._ended |= result.status >= self._last_status
        cells, tests = len(result.cells), len(result.tests)
        counts = f"{counted(cells, 'cell')}, {counted(tests, 'other test')}, {seconds:.0f} s"
        print_line(f"{label} ... {result.verdict} ({counts})")

    @contextmanager
    def _noting_signals(self) -> Iterator[None]:
        """Have signals noted that would end this process."""
        previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
        for number, handler in previous.items():
            if handler is not signal.SIG_IGN:
                signal.signal(number, lambda number, _: self._signals.append(number))
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


def _read_result(planned: Planned, status: int) -> RunResult:
    """The result of a run that exited with *status*, from the files in its folder."""
    kernel, parameters, folder, *_ = planned
    killed = status < 0
    if killed:
        status = CANNOT_TEST
    elif kernel == HOST and planned.file is None:
        status = _HOST_STATUSES.get(status, status)
    data: dict[str, Any] = {"cells": [], "tests": [], "host": {}, "end": {}}
    unreadable = ""
    try:
        data |= json.loads((folder / "results.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        unreadable = "it left no results: nothing was tested on KVM"
    except (OSError, ValueError) as error:
        unreadable = f"its results cannot be read: {error}"
    outcome = data["end"].get("text", "finished")
    if planned.file is not None and status == 1 and unreadable:  # what failed there says nothing about its kernel
        status = CANNOT_TEST
    if killed:
        reason = "a signal ended it"
    elif status == 0 and unreadable:
        status, reason = USAGE_ERROR, unreadable
    elif status in (0, INTERRUPTED):
        reason = ""
    elif outcome != "finished":
        reason = outcome
    elif status == 1:
        reason = unreadable or "tests failed"
    else:
        reason = _read_reason(folder / "output.txt")
    return RunResult(
        kernel, parameters, status, data["cells"], data["tests"], data["host"].get("kernel", kernel), reason
    )


def _read_reason(output: Path) -> str:
    """Why a run could test nothing: the last line of its *output* that gives a reason, or else its last line."""
    lines = output.read_text(errors="replace").strip().splitlines() or ["no output"]
    reasons = [found[1] for line in lines if (found := _REASON.match(line))]
    return reasons[-1] if reasons else lines[-1]


def _read_progress(output: Path) -> tuple[float | None, str]:
    """The share of a run's tests that is done, from the percentage that pytest prints behind each."""
    try:
        found = PERCENTAGE.findall(output.read_text(errors="replace"))
    except OSError:
        found = []
    return (int(found[-1]) / 100, f"{found[-1]} %") if found else (None, "")


def _progress(runs: Sequence[Run]) -> tuple[float | None, str]:
    """The share of their tests that *runs* have done."""
    found = [_read_progress(run.planned.folder / "output.txt") for run in runs]
    shares = [share or 0 for share, _ in found]
    return (sum(shares) / len(shares) if any(shares) else None), ", ".join(filter(None, (words for _, words in found)))


def split_options(words: Sequence[str], names: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Split *words* into the options *names*, each with its value, and the other words."""
    found, rest, left = {}, [], iter(words)
    for word in left:
        name, equals, value = word.partition("=")
        if name in names:
            found[name] = value if equals else next(left, "")
        else:
            rest.append(word)
    return found, rest
