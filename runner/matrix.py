# SPDX-License-Identifier: GPL-2.0-only
"""matrix.py FILE [options of pytest]: test each kernel of FILE with each set of parameters, and put it all into one table.

Exit status: 0 when all are good, 1 when one is bad, 125 when one cannot be tested, 128 when FILE or an option is wrong,
130 when interrupted.
"""

import json
import random
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from lib.toml_file import TomlError, TomlFile
from runner.check_kernel import STATUSES
from runner.errors import CannotTest
from runner.kernel_options import without_machine_options
from runner.modules import parse_parameters
from runner.table import cross_table, cross_table_of_tests, skipped_everywhere

ROOT = Path(__file__).resolve().parent.parent
_FIELDS = {"kernels": list, "parameters": list, "arguments": str}
# In place of a kernel: the one that runs here, with its own KVM as it is loaded
_HOST = "host"
_CONTRACT = ["selftests", "--ignore=selftests/unit"]
# pytest's own exit statuses there; where nothing ran, this host may have no KVM, and another kernel may
_HOST_STATUSES = STATUSES | {pytest.ExitCode.NO_TESTS_COLLECTED: 125}
_VERDICTS = {0: "good", 1: "BAD", 125: "cannot be tested"}


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
    """Test one kernel, with all files in *folder*."""
    folder.mkdir(parents=True)
    options = [f"--results={folder}", *arguments]
    if kernel == _HOST:
        chosen = any((ROOT / word.partition("::")[0]).exists() for word in arguments if not word.startswith("-"))
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-v",
            *([] if chosen else _CONTRACT),
            *without_machine_options(options),
        ]
    else:
        program = str(ROOT / "runner" / "check_kernel.py")
        command = [sys.executable, program, kernel, f"--kvm-params={parameters}", *options]
    with (folder / "output.txt").open("wb") as output:
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
        try:
            status = process.wait()
        except KeyboardInterrupt:
            status = process.wait()  # it got the signal too, and ends in an orderly way
    killed = status < 0
    if killed:
        status = 125
    elif kernel == _HOST:
        status = _HOST_STATUSES.get(status, status)
    results = folder / "results.json"
    data = json.loads(results.read_text()) if results.exists() else {"cells": [], "tests": [], "host": {}, "end": {}}
    lines = (folder / "output.txt").read_text(errors="replace").strip().splitlines() or ["no output"]
    ended = data["end"].get("text", "finished")
    reason = "" if status == 0 else "tests failed" if status == 1 and ended == "finished" else ended
    if status not in (0, 1) and ended == "finished":
        reason = "a signal ended it" if killed else lines[-1].removeprefix("cannot be tested: ")
    release = data["host"].get("kernel", kernel)
    return Run(kernel, parameters, status, data["cells"], data["tests"], release, reason)


def main(arguments: list[str]) -> int:
    """Run the matrix."""
    if not arguments:
        print("usage: matrix.py FILE [options of pytest]", file=sys.stderr)
        return 128
    try:
        kernels, sets, options = load(Path(arguments[0]))
    except TomlError as error:
        print(f"matrix: {error}", file=sys.stderr)
        return 128
    # One seed for all, so that they can be compared; the last --seed counts.
    options = [f"--seed={random.SystemRandom().randrange(1 << 32)}", *options, *arguments[1:]]
    results = ROOT / "results" / f"matrix-{time.strftime('%Y%m%d-%H%M%S')}"
    pairs = [(kernel, parameters) for kernel in kernels for parameters in (sets if kernel != _HOST else [""])]
    runs = []
    for number, (kernel, parameters) in enumerate(pairs, 1):
        print(f"[{number}/{len(pairs)}] {kernel} {parameters} ... ", end="", flush=True)
        start = time.monotonic()
        done = run(kernel, parameters, results / f"{number:02}", options)
        print(
            f"{_verdict(done)} ({len(done.cells)} cells, {len(done.tests)} tests, {time.monotonic() - start:.0f} s)",
            flush=True,
        )
        runs.append(done)
        if done.status >= 128:
            break  # an option that is wrong for all of them, or Ctrl-C
    lines = _summary(runs)
    (results / "table.txt").write_text("\n".join(lines) + "\n")
    print("", *lines, f"files: {results.relative_to(ROOT)}", sep="\n")
    statuses = {done.status for done in runs}
    return 1 if 1 in statuses else max(statuses)


def _verdict(done: Run) -> str:
    return _VERDICTS.get(done.status, f"ended with status {done.status}") + (f": {done.reason}" if done.reason else "")


def _summary(runs: list[Run]) -> list[str]:
    names = [chr(ord("A") + index) if index < 26 else f"Z{index - 25}" for index in range(len(runs))]
    legend = [
        f"{name}  {done.release}  {done.parameters or 'defaults'}: {_verdict(done)}"
        for name, done in zip(names, runs, strict=True)
    ]
    tests = [done.tests for done in runs]
    cells = cross_table(names, [done.cells for done in runs]) if any(done.cells for done in runs) else []
    lines = [*cells, "", *cross_table_of_tests(names, tests), "", *legend]
    if nowhere := skipped_everywhere(tests):
        lines += ["", f"{len(nowhere)} tests were skipped everywhere:", *(f"  {test}" for test in nowhere)]
    return lines


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
