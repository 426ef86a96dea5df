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
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

if __name__ == "__main__":
    # A program that is started by its path has only its own folder there; and any Python may have been named to start it.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    from runner.unmet import leave, unmet

    if reason := unmet():
        leave(reason, 128)

import pytest
from _pytest._io import TerminalWriter

from harness.kernel_options import MACHINE_OPTIONS
from harness.results import new_folder
from harness.table import cross_table, cross_table_of_tests, skipped_everywhere
from harness.toml_file import TomlError, TomlFile
from kvm_util.wording import counted
from runner import ROOT
from runner.check_kernel import STATUSES
from runner.errors import CANNOT_TEST, CannotTest
from runner.modules import parse_parameters
from runner.waiting import waiting

_USAGE = "usage: kernel_matrix.py FILE [options of pytest]"
_FIELDS = {"kernels": list, "parameters": list, "arguments": str}
# In place of a kernel: the one that runs here, with its own KVM as it is loaded
_HOST = "host"
_CONTRACT = ["-o", "testpaths=selftests/test_*.py selftests/x86_64"]
# pytest's own exit statuses there; where nothing ran, this host may have no KVM, and another kernel may
_HOST_STATUSES = STATUSES | {pytest.ExitCode.NO_TESTS_COLLECTED: CANNOT_TEST}
_NOT_RUN, _WRONG, _INTERRUPTED = -1, 128, 130
_VERDICTS = {
    0: "good",
    1: "BAD",
    CANNOT_TEST: "cannot be tested",
    _WRONG: "cannot be run like this",
    _INTERRUPTED: "interrupted",
    _NOT_RUN: "not run",
}
_GREEN, _RED, _YELLOW = {"green": True}, {"red": True, "bold": True}, {"yellow": True}
# In the tables too; the letters count a test's cases.
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
# Options that differ from run to run, and what decides them
_TAKEN = {
    "--kernel": "the file names the kernels",
    "--kvm-params": "the file names the parameters",
    "--junitxml": _OWN_FILES,
    "--junit-xml": _OWN_FILES,
}
# How a run says why it could test nothing
_REASON = re.compile(r"(?:ERROR: (?!usage:)|(?:.*: )?cannot be tested: |.*: error: )(.+)")


class _Ended(KeyboardInterrupt):
    """Signal *number* is to end the matrix, as Ctrl-C does."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


@dataclass(frozen=True)
class Run:
    """One kernel with one set of parameters, tested.

    :ivar cells: the rows of its results
    :ivar tests: those of the tests that are no cells
    :ivar reason: why it could not be tested, or how the kernel ended
    """

    kernel: str
    parameters: str
    status: int
    cells: list[dict[str, Any]]
    tests: list[dict[str, Any]]
    release: str
    reason: str


def load(path: Path) -> tuple[list[str], list[str], list[str]]:
    """The kernels, sets of parameters and arguments of a matrix file.

    :raises TomlError: it cannot be read, or says something that is not understood
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


def run(kernel: str, parameters: str, folder: Path, arguments: list[str]) -> Run:
    """Test one kernel, with all files in *folder*. A signal that ends the matrix reaches the run, which is waited for."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").unlink(missing_ok=True)  # of an earlier matrix with the same --results
    options = [f"--results={folder}", *arguments]
    if kernel == _HOST:
        command = [sys.executable, "-m", "pytest", "-v", *_CONTRACT, *_take(options, MACHINE_OPTIONS)[1]]
    else:
        program = str(ROOT / "runner" / "check_kernel.py")
        command = [sys.executable, program, kernel, f"--kvm-params={parameters}", *options]
    interrupted = False
    with (folder / "output.txt").open("wb") as output:
        # Unbuffered, or a mistake, which pytest prints to standard error, would stand in the middle of another line.
        environment = os.environ | {"PYTHONUNBUFFERED": "1"}
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, env=environment)
        while process.returncode is None:
            try:
                process.wait()
            except _Ended as ended:
                interrupted = True
                process.send_signal(ended.number)
            except KeyboardInterrupt:
                interrupted = True  # the terminal has sent it to the run too
    return _judge(kernel, parameters, _INTERRUPTED if interrupted else process.returncode, folder)


def _judge(kernel: str, parameters: str, status: int, folder: Path) -> Run:
    """The outcome of a run that ended with *status*, from the files that it left."""
    killed = status < 0
    if killed:
        status = CANNOT_TEST
    elif kernel == _HOST:
        status = _HOST_STATUSES.get(status, status)
    data: dict[str, Any] = {"cells": [], "tests": [], "host": {}, "end": {}}
    lacks = ""
    try:
        data |= json.loads((folder / "results.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        lacks = "it left no results: nothing was tested on KVM"
    except (OSError, ValueError) as error:
        lacks = f"its results cannot be read: {error}"
    ended = data["end"].get("text", "finished")
    if killed:
        reason = "a signal ended it"
    elif status == 0 and lacks:
        status, reason = _WRONG, lacks
    elif status in (0, _INTERRUPTED):
        reason = ""
    elif ended != "finished":
        reason = ended
    elif status == 1:
        reason = lacks or "tests failed"
    else:
        reason = _why(folder / "output.txt")
    return Run(kernel, parameters, status, data["cells"], data["tests"], data["host"].get("kernel", kernel), reason)


def _why(output: Path) -> str:
    """Why a run could test nothing, from its *output*; its last line where none says so."""
    lines = output.read_text(errors="replace").strip().splitlines() or ["no output"]
    reasons = [found[1] for line in lines if (found := _REASON.match(line))]
    return reasons[-1] if reasons else lines[-1]


def _take(words: Sequence[str], names: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """The options *names* in *words*, each with its value, and the rest of *words*."""
    found, rest, left = {}, [], iter(words)
    for word in left:
        name, equals, value = word.partition("=")
        if name in names:
            found[name] = value if equals else next(left, "")
        else:
            rest.append(word)
    return found, rest


def _results(given: str | None) -> Path:
    """The matrix's folder, made.

    :raises OSError: it cannot be written
    """
    folder = new_folder("matrix") if given is None else Path(given).expanduser().absolute()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "table.txt").write_text("")
    return folder


def main(arguments: list[str]) -> int:
    """Run the matrix."""
    if arguments[:1] in (["-h"], ["--help"]):
        print(__doc__.strip())
        return 0
    if not arguments or not arguments[0] or arguments[0].startswith("-"):
        print(f"{_USAGE}: no file is named", file=sys.stderr)
        return _WRONG
    try:
        kernels, sets, options = load(Path(arguments[0]))
    except TomlError as error:
        print(f"matrix: {error}", file=sys.stderr)
        return _WRONG
    # One seed for all, so that they can be compared; the last --seed counts.
    options = [f"--seed={random.SystemRandom().randrange(1 << 32)}", *options, *arguments[1:]]
    taken, options = _take(options, ["--results", *_TAKEN])
    for name in taken:
        if name in _TAKEN or not taken[name]:
            print(f"matrix: {name}: {_TAKEN.get(name, 'no folder is named')}", file=sys.stderr)
            return _WRONG
    try:
        results = _results(taken.get("--results"))
    except OSError as error:
        print(f"matrix: {error.filename}: {error.strerror} (--results DIR puts the files elsewhere)", file=sys.stderr)
        return _WRONG
    pairs = [(kernel, parameters) for kernel in kernels for parameters in (sets if kernel != _HOST else [""])]
    previous = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    for number, handler in previous.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, _end)
    try:
        runs = _run_all(pairs, results, options)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    runs += [Run(*pair, _NOT_RUN, [], [], pair[0], "") for pair in pairs[len(runs) :]]
    lines = _summary(runs)
    try:
        (results / "table.txt").write_text("\n".join(lines) + "\n")
    except OSError as error:
        lines.append(f"THE TABLE IS NOT KEPT: {error.filename}: {error.strerror}")
    shown = results.relative_to(ROOT) if results.is_relative_to(ROOT) else results
    verdicts = Counter(_word(done.status) for done in runs)
    words = ", ".join(f"{number} {word}" for word, number in verdicts.items())
    lines += ["", f"{counted(len(runs), 'run')}: {words}; files: {shown}"]
    _say(_in_colour("\n".join(["", *lines])), "\n")
    statuses = {done.status for done in runs}
    if 1 in statuses:
        return 1
    return max(statuses) if max(statuses) >= _WRONG or _NOT_RUN not in statuses else _INTERRUPTED


def _run_all(pairs: Sequence[tuple[str, str]], results: Path, options: list[str]) -> list[Run]:
    """Run one after the other, as far as it makes sense."""
    runs: list[Run] = []
    with suppress(KeyboardInterrupt):  # where it comes between two runs
        for number, (kernel, parameters) in enumerate(pairs, 1):
            label = f"[{number}/{len(pairs)}] {kernel} {parameters or 'defaults'}"
            folder = results / f"{number:02}"
            start = time.monotonic()
            try:
                with waiting(label, partial(_done, folder / "output.txt"), f"{label} ..."):
                    done = run(kernel, parameters, folder, options)
            except OSError as error:
                done = Run(kernel, parameters, CANNOT_TEST, [], [], kernel, f"{error.filename}: {error.strerror}")
            runs.append(done)
            cells, tests, seconds = len(done.cells), len(done.tests), time.monotonic() - start
            counts = f"{counted(cells, 'cell')}, {counted(tests, 'other test')}, {seconds:.0f} s"
            _say(_in_colour(f"{label} ... {_verdict(done)} ({counts})"), "\n")
            if done.status >= _WRONG:
                break  # an option that is wrong for all of them, or a signal
    return runs


def _done(output: Path) -> tuple[float | None, str]:
    """How much of a run's tests is done, from the percentage that pytest prints behind each."""
    try:
        found = re.findall(r"\[ *(\d+)%\]", output.read_text(errors="replace"))
    except OSError:
        found = []
    return (int(found[-1]) / 100, f"{found[-1]} %") if found else (None, "")


def _end(number: int, _frame: FrameType | None) -> None:
    raise _Ended(number)


def _say(text: str, end: str = "") -> None:
    """Print *text*; the terminal may be gone by now."""
    with suppress(OSError):
        print(text, end=end, flush=True)


def _in_colour(text: str) -> str:
    """*text* with the verdicts in colour, where there is a terminal that has some; not in the lines that explain the words."""
    writer = TerminalWriter()

    def coloured(found: re.Match[str]) -> str:
        return writer.markup(found[0], **_COLOURS[found[0].lstrip("0123456789")])

    return "\n".join(line if line.startswith("(") else _COLOURED.sub(coloured, line) for line in text.split("\n"))


def _word(status: int) -> str:
    return _VERDICTS.get(status, f"ended with status {status}")


def _verdict(done: Run) -> str:
    return _word(done.status) + (f": {done.reason}" if done.reason else "")


def _summary(runs: list[Run]) -> list[str]:
    names = [chr(ord("A") + index) if index < 26 else f"Z{index - 25}" for index in range(len(runs))]
    legend = [
        f"{name}  {done.release}  {done.parameters or 'defaults'}: {_verdict(done)}"
        for name, done in zip(names, runs, strict=True)
    ]
    columns = {name: done for name, done in zip(names, runs, strict=True) if done.status != _NOT_RUN}
    cells, tests = [done.cells for done in columns.values()], [done.tests for done in columns.values()]
    lines = [*cross_table([*columns], cells), ""] if any(cells) else []
    lines += [*cross_table_of_tests([*columns], tests), ""] if any(tests) else []
    lines += legend
    if nowhere := skipped_everywhere(tests):
        lines += ["", f"{counted(len(nowhere), 'test')} ran in none of these runs:", *(f"  {test}" for test in nowhere)]
    return lines


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
