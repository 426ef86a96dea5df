# SPDX-License-Identifier: GPL-2.0-only
"""kernel_matrix.py FILE [options of pytest]: test each kernel of FILE with each set of parameters, and make one table.

Exit status: 0 when all are good, 1 when one is bad, 125 when one cannot be tested, 128 when FILE or an option is wrong,
130 when interrupted.
"""

import json
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    # Python puts the program's own folder there; and the user may have taken any Python.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    from runner.unmet import leave, unmet

    if reason := unmet():
        leave(reason, 128)

import pytest
from _pytest._io import TerminalWriter

from harness.kernel_options import MACHINE_OPTIONS, OWN_TESTS, VM_MEMORY
from harness.output_paths import new_folder
from harness.table import cross_table, cross_table_of_tests, skipped_everywhere
from harness.toml_file import TomlError, TomlFile
from kvm_util.host_limits import available_memory
from kvm_util.memory import MIB
from kvm_util.wording import counted
from runner import ROOT
from runner.check_kernel import STATUSES
from runner.errors import CANNOT_TEST, CannotTest
from runner.modules import parse_parameters
from runner.qemu import nested_vendor
from runner.store import shown
from runner.target import MOST_MACHINES
from runner.waiting import waiting

_USAGE = "usage: kernel_matrix.py FILE [options of pytest]"
_FIELDS = {"kernels": list, "parameters": list, "arguments": str}
_HOST = "host"  # in place of a kernel: the one that runs here, with the KVM that is loaded
_KVM_TESTS = sorted(
    {f"selftests/{file.parent.name}/" for file in (ROOT / "selftests").glob("*/test_*.py")} - {OWN_TESTS}
)
# pytest's exit statuses there: where no test ran, this host may have no KVM, and the other kernels may
_HOST_STATUSES = STATUSES | {pytest.ExitCode.NO_TESTS_COLLECTED: CANNOT_TEST}
_NOT_RUN, _USAGE_ERROR, _INTERRUPTED = -1, 128, 130
_POLL = 0.1  # seconds between looks at the runs
_VERDICTS = {
    0: "good",
    1: "BAD",
    CANNOT_TEST: "cannot be tested",
    _USAGE_ERROR: "cannot be run like this",
    _INTERRUPTED: "interrupted",
    _NOT_RUN: "not run",
}
_GREEN, _RED, _YELLOW = {"green": True}, {"red": True, "bold": True}, {"yellow": True}
# The words of verdicts and of the tables; F and k follow the number of a test's cases.
_COLOURS = {
    "good": _GREEN,
    "pass": _GREEN,
    "BAD": _RED,
    "FAIL": _RED,
    "F": _RED,
    "cannot be tested": _RED,
    "bug": _YELLOW,
    "bug?": _YELLOW,
    "k": _YELLOW,
}
_COLOURED = re.compile(r"(?<!\S)(?:good|BAD|cannot be tested|pass|FAIL|bug\??|[0-9]+[Fk])(?=[ :,;]|$)")
_OWN_FILES = "each run has files of its own, below the matrix's folder (--results)"
# Options that the matrix sets itself for each run, and where their values come from
_RESERVED = {
    "--kernel": "the file names the kernels",
    "--kvm-params": "the file names the parameters",
    "--junitxml": _OWN_FILES,
    "--junit-xml": _OWN_FILES,
}
# The lines in which a run gives its reason for testing nothing
_REASON = re.compile(r"(?:ERROR: (?!usage:)|(?:.*: )?cannot be tested: |.*: error: )(.+)")


class _UsageError(Exception):
    """The matrix cannot start; the text is one line that says why."""


@dataclass(frozen=True)
class RunResult:
    """The result of testing one kernel with one set of parameters.

    :ivar status: as check_kernel.py exits with it, or _NOT_RUN
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
        return _verdict(self.status) + (f": {self.reason}" if self.reason else "")


def load(path: Path) -> tuple[list[str], list[str], list[str]]:
    """Read the kernels, the sets of parameters and the arguments of a matrix file.

    :raises TomlError: it cannot be read, or has a mistake
    """
    file = TomlFile(path)
    for name, value in file.data.items():
        if name not in _FIELDS:
            raise file.error(f"no such field: {name} (there are {', '.join(_FIELDS)})", name)
        words = value if isinstance(value, list) else []
        if not isinstance(value, _FIELDS[name]) or not all(isinstance(word, str) for word in words):
            kind = "a list of strings" if _FIELDS[name] is list else "a string"
            raise file.error(f"{name} must be {kind}, not {value!r}", name)
    kernels, sets = file.data.get("kernels", []), file.data.get("parameters") or [""]
    if not all(kernels):
        raise file.error("kernels: a name is empty", "kernels")
    if not kernels:
        raise file.error("it names no kernels", "kernels")
    for text in sets:
        try:
            parse_parameters(text)
        except CannotTest as error:
            raise file.error(f"parameters: {error}", "parameters") from None
    try:
        arguments = shlex.split(file.data.get("arguments", ""))
    except ValueError as error:
        raise file.error(f"arguments: {error}", "arguments") from None
    return kernels, sets, arguments


@dataclass
class Run:
    """A kernel that is being tested, in a process of its own.

    :ivar label: its number and the kernel, in words
    :ivar folder: gets all its files
    """

    label: str
    kernel: str
    parameters: str
    folder: Path
    process: "subprocess.Popen[bytes]"
    started: float

    @classmethod
    def start(cls, label: str, kernel: str, parameters: str, folder: Path, arguments: list[str]) -> "Run":
        """Begin to test a kernel.

        :raises OSError: its folder cannot be written
        """
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "results.json").unlink(missing_ok=True)  # of an earlier matrix with the same --results
        options = [f"--results={folder}", *arguments]
        if kernel == _HOST:
            testpaths = f"testpaths={' '.join(_KVM_TESTS)}"
            here = _split_options(options, MACHINE_OPTIONS)[1]
            command = [sys.executable, "-m", "pytest", "-v", "-o", testpaths, *here]
        else:
            program = str(ROOT / "runner" / "check_kernel.py")
            command = [sys.executable, program, kernel, f"--kvm-params={parameters}", *options]
        with (folder / "output.txt").open("wb") as output:
            # Unbuffered, or pytest's errors, which go to standard error, would stand in the middle of another line.
            environment = os.environ | {"PYTHONUNBUFFERED": "1"}
            process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, env=environment)
        return cls(label, kernel, parameters, folder, process, time.monotonic())

    def result(self, interrupted: bool) -> "RunResult":
        """The result, once the process has ended."""
        status = _INTERRUPTED if interrupted else self.process.wait()
        return _read_result(self.kernel, self.parameters, status, self.folder)


class Runs:
    """Tests kernels, up to *at_once* at the same time, with the same *arguments*; their folders are below *folder*."""

    def __init__(self, folder: Path, arguments: list[str], at_once: int) -> None:
        self._folder = folder
        self._arguments = arguments
        self._at_once = at_once
        self._signals: list[int] = []  # that came, and are not passed on yet
        self._ended = False  # by a signal, or by an option that is wrong in each run
        self._interrupted = False
        self._running: dict[int, Run] = {}
        self._results: dict[int, RunResult] = {}

    def run(self, pairs: Sequence[tuple[str, str]]) -> list[RunResult]:
        """Test each kernel with its parameters, until all are done, or a signal or a wrong option ends the matrix."""
        left = deque(enumerate(pairs))
        with self._noting_signals():
            while self._running or (left and not self._ended):
                self._pass_signals_on()  # one that came between two runs
                while left and not self._ended and self._has_room(left[0][1][0]):
                    self._start(*left.popleft(), len(pairs))
                self._wait()
        return [
            self._results.get(number) or RunResult(*pair, _NOT_RUN, [], [], pair[0], "")
            for number, pair in enumerate(pairs)
        ]

    def _has_room(self, kernel: str) -> bool:
        """Whether *kernel* may be tested beside those that are; this host's own is tested alone."""
        kernels = [kernel, *(run.kernel for run in self._running.values())]
        return len(self._running) < (1 if _HOST in kernels else self._at_once)

    def _start(self, number: int, pair: tuple[str, str], count: int) -> None:
        kernel, parameters = pair
        label = f"[{number + 1}/{count}] {kernel} {parameters or 'defaults'}"
        try:
            run = Run.start(label, kernel, parameters, self._folder / f"{number + 1:02}", self._arguments)
        except OSError as error:
            reason = f"{error.filename}: {error.strerror}"
            self._finish(number, label, RunResult(kernel, parameters, CANNOT_TEST, [], [], kernel, reason), 0)
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
        self._ended |= result.status >= _USAGE_ERROR
        cells, tests = len(result.cells), len(result.tests)
        counts = f"{counted(cells, 'cell')}, {counted(tests, 'other test')}, {seconds:.0f} s"
        _print_line(f"{label} ... {result.verdict} ({counts})")

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


def _read_result(kernel: str, parameters: str, status: int, folder: Path) -> RunResult:
    """The result of a run that exited with *status*, from the files in *folder*."""
    killed = status < 0
    if killed:
        status = CANNOT_TEST
    elif kernel == _HOST:
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
    if killed:
        reason = "a signal ended it"
    elif status == 0 and unreadable:
        status, reason = _USAGE_ERROR, unreadable
    elif status in (0, _INTERRUPTED):
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
        found = re.findall(r"\[ *(\d+)%\]", output.read_text(errors="replace"))
    except OSError:
        found = []
    return (int(found[-1]) / 100, f"{found[-1]} %") if found else (None, "")


def _progress(runs: Sequence[Run]) -> tuple[float | None, str]:
    """The share of their tests that *runs* have done."""
    found = [_read_progress(run.folder / "output.txt") for run in runs]
    shares = [share or 0 for share, _ in found]
    return (sum(shares) / len(shares) if any(shares) else None), ", ".join(filter(None, (words for _, words in found)))


def _split_options(words: Sequence[str], names: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Split *words* into the options *names*, each with its value, and the other words."""
    found, rest, left = {}, [], iter(words)
    for word in left:
        name, equals, value = word.partition("=")
        if name in names:
            found[name] = value if equals else next(left, "")
        else:
            rest.append(word)
    return found, rest


def main(arguments: list[str]) -> int:
    """Run the matrix."""
    if arguments[:1] in (["-h"], ["--help"]):
        print(__doc__.strip())
        return 0
    try:
        pairs, options, folder = _prepare(arguments)
    except (TomlError, _UsageError) as error:
        print(f"matrix: {error}", file=sys.stderr)
        return _USAGE_ERROR
    results = Runs(folder, options, _at_once(options)).run(pairs)
    lines = _summary(results)
    try:
        (folder / "table.txt").write_text("\n".join(lines) + "\n")
    except OSError as error:
        lines.append(f"THE TABLE IS NOT KEPT: {error.filename}: {error.strerror}")
    verdicts = Counter(_verdict(result.status) for result in results)
    words = ", ".join(f"{number} {word}" for word, number in verdicts.items())
    lines += ["", f"{counted(len(results), 'run')}: {words}; files: {shown(folder)}"]
    _print_line("\n".join(["", *lines]))
    statuses = {result.status for result in results}
    if 1 in statuses:
        return 1
    return max(statuses) if max(statuses) >= _USAGE_ERROR or _NOT_RUN not in statuses else _INTERRUPTED


def _prepare(arguments: list[str]) -> tuple[list[tuple[str, str]], list[str], Path]:
    """The kernels with their parameters, the options of each run, and the folder of the matrix.

    :raises _UsageError, TomlError: *arguments* or the matrix file have a mistake
    """
    if not arguments or not arguments[0] or arguments[0].startswith("-"):
        raise _UsageError(f"no file is named ({_USAGE})")
    kernels, sets, options = load(Path(arguments[0]))
    # The same seed for all, so that they can be compared; the last --seed counts.
    options = [f"--seed={random.SystemRandom().randrange(1 << 32)}", *options, *arguments[1:]]
    set_here, options = _split_options(options, ["--results", *_RESERVED])
    for name, value in set_here.items():
        if name in _RESERVED or not value:
            raise _UsageError(f"{name}: {_RESERVED.get(name, 'no folder is named')}")
    pairs = [(kernel, parameters) for kernel in kernels for parameters in (sets if kernel != _HOST else [""])]
    try:
        return pairs, options, _make_folder(set_here.get("--results"))
    except OSError as error:
        raise _UsageError(f"{error.filename}: {error.strerror} (--results DIR puts the files elsewhere)") from None


def _at_once(options: Sequence[str]) -> int:
    """How many kernels are tested at once: more than one if its machines leave CPUs and memory of this host idle.

    With options of the machine, and where machines are virtualized, a kernel has the host to itself.
    """
    if _split_options(options, MACHINE_OPTIONS)[0] or nested_vendor():
        return 1
    machines = min(len(os.sched_getaffinity(0)), available_memory() // (VM_MEMORY * MIB))
    return max(1, machines // MOST_MACHINES)


def _make_folder(given: str | None) -> Path:
    """Make the folder of the matrix.

    :raises OSError: it cannot be written
    """
    folder = new_folder("matrix") if given is None else Path(given).expanduser().absolute()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "table.txt").write_text("")
    return folder


def _print_line(text: str) -> None:
    """Print *text* with verdicts in colour, if the terminal is still there."""
    with suppress(OSError):
        print(_colourize(text), flush=True)


def _colourize(text: str) -> str:
    """*text* with the verdicts in colour, if the terminal has some; the lines that explain the words have none."""
    writer = TerminalWriter()

    def coloured(found: re.Match[str]) -> str:
        return writer.markup(found[0], **_COLOURS[found[0].lstrip("0123456789")])

    return "\n".join(line if line.startswith("(") else _COLOURED.sub(coloured, line) for line in text.split("\n"))


def _verdict(status: int) -> str:
    return _VERDICTS.get(status, f"ended with status {status}")


def _summary(results: list[RunResult]) -> list[str]:
    """The tables of all runs, with a letter for each, and the verdict behind each letter."""
    names = [chr(ord("A") + index) if index < 26 else f"Z{index - 25}" for index in range(len(results))]
    legend = [
        f"{name}  {result.release}  {result.parameters or 'defaults'}: {result.verdict}"
        for name, result in zip(names, results, strict=True)
    ]
    columns = {name: result for name, result in zip(names, results, strict=True) if result.status != _NOT_RUN}
    cells, tests = [result.cells for result in columns.values()], [result.tests for result in columns.values()]
    lines = [*cross_table([*columns], cells), ""] if any(cells) else []
    lines += [*cross_table_of_tests([*columns], tests), ""] if any(tests) else []
    lines += legend
    if nowhere := skipped_everywhere(tests):
        lines += ["", f"{counted(len(nowhere), 'test')} ran in none of these runs:", *(f"  {test}" for test in nowhere)]
    return lines


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
