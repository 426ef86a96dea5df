# SPDX-License-Identifier: GPL-2.0-only
"""runner/kernel_matrix.py: matrix files, usage errors, the results of its runs, and its tables."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from harness import output_paths
from harness.table import DIMENSIONS
from kvm_util.memory import GIB
from runner import ROOT, kernel_runs, run_verdicts
from runner import kernel_matrix as matrix
from runner.modules import parse_parameters

PROGRAM = ROOT / "runner" / "kernel_matrix.py"
CANNOT_TEST, WRONG, INTERRUPTED = 125, 128, 130
CELL = dict(zip(DIMENSIONS, ("dirty-log", "48bit-4k", "shmem", "forced", "sparse", 1), strict=True))

# A program in place of Python: it writes results.json, and then does what *end* says.
RUN = """#!{python}
import json, os, pathlib, signal, sys, time
(folder,) = [word[len("--results="):] for word in sys.argv if word.startswith("--results=")]
signal.signal(signal.SIGINT, lambda *_: sys.exit(2))
signal.signal(signal.SIGTERM, lambda *_: sys.exit(2))
data = {{"cells": [{cell} | {{"verdict": "pass"}}], "tests": [], "host": {{"kernel": "6.0"}}, "end": {{}}}}
pathlib.Path(folder, "results.json").write_text(json.dumps(data))
{end}
"""
DRIVER = """
import sys
from types import SimpleNamespace
from runner import kernel_matrix as matrix
from runner import kernel_runs
kernel_runs.sys = SimpleNamespace(executable={fake!r}, stderr=sys.stderr)
matrix._at_once = lambda _: {at_once}
sys.exit(matrix.main(sys.argv[1:]))
"""


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o755)
    return path


def fake_python(folder: Path, end: str) -> str:
    return str(write(folder / "python", RUN.format(python=sys.executable, cell=CELL, end=end)))


def run(kernel: str, folder: Path, arguments: list[str]) -> kernel_runs.RunResult:
    """Test one kernel."""
    one = kernel_runs.Run.start("", kernel_runs.Planned(kernel, "", folder, arguments))
    one.process.wait()
    return one.result(interrupted=False)


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        *[(words, WRONG, "matrix: no file is named (usage: kernel_matrix.py FILE [options of pytest])")
          for words in ([], [""], ["--nope"])],
        (["--help"], 0, "kernel_matrix.py FILE [options of pytest]: test each kernel of FILE"),
        (["FILE", "--kernel=debian:6.12"], WRONG, "matrix: --kernel: the file names the kernels"),
        (["FILE", "--kvm-params", "kvm.tdp_mmu=0"], WRONG, "matrix: --kvm-params: the file names the parameters"),
        (["FILE", "--junitxml=x.xml"], WRONG, "matrix: --junitxml: each run has files of its own, below the matrix's folder"),
        *[(["FILE", word], WRONG, "matrix: --results: no folder is named") for word in ("--results", "--results=")],
        (["FILE", "--results=/proc/x"], WRONG, "matrix: /proc/x: No such file or directory (--results DIR puts the files"),
        (["FILE", "--results", "FILE"], WRONG, "matrix.toml: File exists (--results DIR puts the files elsewhere)"),
    ],
)  # fmt: skip
def test_matrix_usage_errors(tmp_path: Path, arguments: list[str], status: int, message: str) -> None:
    """Started by its path from another folder, it finds its modules; a mistake is one line before any run."""
    file = write(tmp_path / "matrix.toml", 'kernels = ["host"]\n')
    words = [str(file) if word == "FILE" else word for word in arguments]
    done = subprocess.run([sys.executable, PROGRAM, *words], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stderr
    assert message in done.stdout + done.stderr
    assert status == 0 or len((done.stdout + done.stderr).splitlines()) == 1


@pytest.mark.parametrize(
    ("kernel", "arguments", "status", "reason"),
    [
        ("host", ["--no-such-option"], WRONG, "unrecognized arguments: --no-such-option"),
        ("host", ["--iterations=0"], WRONG, "--iterations: 0 is out of range, it must be from 1 to 1000000"),
        ("host", ["selftests/nope.py"], WRONG, "file or directory not found: selftests/nope.py"),
        ("host", ["-k=no_such_test"], WRONG, ""),
        ("host", ["--version"], WRONG, "it left no results: nothing was tested on KVM"),
        ("host", ["selftests/matrix", "--kvm-device=/nonexistent"], CANNOT_TEST, "no test ran on KVM: /nonexistent does"),
        ("/nonexistent/bzImage", [], CANNOT_TEST, "/nonexistent/bzImage|no qemu"),
    ],
)  # fmt: skip
def test_reason_of_a_failed_run(tmp_path: Path, kernel: str, arguments: list[str], status: int, reason: str) -> None:
    """The reason is the run's own, not pytest's last line; a run without results is not good."""
    done = run(kernel, tmp_path / "01", arguments)
    assert done.status == status
    assert {cell["verdict"] for cell in done.cells} <= {"skipped"}
    assert re.search(reason, done.reason)


def test_results_of_an_earlier_matrix(tmp_path: Path) -> None:
    """A run that leaves no results in a reused folder has none of an earlier matrix."""
    (tmp_path / "01").mkdir()
    old = {"cells": [CELL | {"verdict": "pass"}], "tests": [], "host": {}, "end": {}}
    (tmp_path / "01" / "results.json").write_text(json.dumps(old))
    assert run("host", tmp_path / "01", ["--version"]).cells == []


def test_truncated_results(tmp_path: Path) -> None:
    """A results file that was cut short fails the run, and the reason says that it cannot be read."""
    (tmp_path / "results.json").write_text('{"cells": [')
    done = kernel_runs._read_result(kernel_runs.Planned("a", "", tmp_path, []), 1)
    assert (done.status, done.cells) == (1, [])
    assert "its results cannot be read: " in done.reason


@pytest.mark.parametrize(
    ("words", "left"),
    [
        (["--vm-memory", "4096", "-k", "a or b", "--qemu=/x", "--append", "b=c", "--seed=1"], ["-k", "a or b", "--seed=1"]),
        (["--append", "--foo", "selftests/interface", "--full"], ["selftests/interface", "--full"]),
        (["-x", "--vm-memory"], ["-x"]),
    ],
)  # fmt: skip
def test_machine_options_of_a_matrix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], left: list[str]
) -> None:
    """Options of the machine reach only the booted kernels, and do not end the matrix, in either spelling."""
    python = write(tmp_path / "python", f"""#!/bin/sh\nprintf '%s\\n' "$@" > {tmp_path}/words\n""")
    monkeypatch.setattr(sys, "executable", str(python))
    for kernel, expected in (("host", left), ("debian:6.12", words)):
        run(kernel, tmp_path / "01", words)
        assert (tmp_path / "words").read_text().splitlines()[-len(expected) - 1 :] == [
            f"--results={tmp_path / '01'}", *expected,
        ]  # fmt: skip


@pytest.mark.parametrize("coloured", [True, False])
def test_colours_of_a_matrix(monkeypatch: pytest.MonkeyPatch, coloured: bool) -> None:
    """Verdicts and counts have colours if the terminal has, and nothing else of a line."""
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("FORCE_COLOR" if coloured else "NO_COLOR", "1")
    red, yellow, green, end = ("\x1b[31m\x1b[1m", "\x1b[33m", "\x1b[32m", "\x1b[0m") if coloured else [""] * 4
    text = "A  {red}FAIL{end}  {green}pass{end}\n{red}2F{end}  4 {yellow}1k{end} 2s  k2.py\nB: {red}BAD{end}: no\n(1F: 1 bug)"
    plain = text.format(red="", yellow="", green="", end="")
    assert run_verdicts.colourize(plain) == text.format(red=red, yellow=yellow, green=green, end=end)


def test_two_matrices_in_a_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each matrix has a folder of its own."""
    monkeypatch.setattr(output_paths, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(time, "strftime", lambda _: "now")
    assert [matrix._make_folder(None).name for _ in range(3)] == ["matrix-now", "matrix-now-2", "matrix-now-3"]


@pytest.mark.parametrize("at_once", [1, 2])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_interrupted_matrix(tmp_path: Path, number: signal.Signals, at_once: int) -> None:
    """A signal ends the current runs, which are waited for; the table has what was done and what was not."""
    fake = fake_python(tmp_path, "time.sleep(60)")
    driver = write(tmp_path / "driver.py", DRIVER.format(fake=fake, at_once=at_once))
    file = write(tmp_path / "matrix.toml", 'kernels = ["a", "b", "c"]\n')
    folder = tmp_path / "results"
    process = subprocess.Popen(
        [sys.executable, driver, file, f"--results={folder}"], stdout=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'lib'}"}, start_new_session=True,
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),  # a shell or nohup may have it ignored
    )  # fmt: skip
    deadline = time.monotonic() + 30
    while sum(bool(path.stat().st_size) for path in folder.glob("*/results.json")) < at_once:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(0.2)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # as a terminal does
    else:
        process.send_signal(number)
    output, _ = process.communicate(timeout=50)
    assert process.returncode == INTERRUPTED, output
    assert "[1/3] a defaults ... interrupted (1 cell, 0 other tests, " in output
    second = "B  6.0  defaults: interrupted" if at_once == 2 else "B  b  defaults: not run"
    assert f"\nA  6.0  defaults: interrupted\n{second}\nC  c  defaults: not run\n" in output
    assert f"dirty-log  48bit-4k  shmem    forced  sparse   1   {'  pass' * at_once}\n" in output
    assert (folder / "table.txt").read_text() in output
    assert "C  c  defaults: not run" in (folder / "table.txt").read_text()


@pytest.mark.parametrize(
    ("kernels", "most"), [("abcdef", [1, 2, 3, 3, 3, 3]), ("ab", [1, 2]), (["host", "a", "b"], [1, 1, 2])]
)
def test_kernels_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kernels: Sequence[str], most: list[int]
) -> None:
    """As many kernels as asked for are tested at the same time, the host's own alone; their order is the file's."""
    running = []
    runs = kernel_runs.Runs(3)

    def start(label: str, planned: kernel_runs.Planned) -> kernel_runs.Run:
        running.append(len(runs._running) + 1)
        looks = iter([None for _ in running])  # so often it still runs: each longer than the one before
        process: Any = SimpleNamespace(poll=lambda: next(looks, 0))
        return kernel_runs.Run(label, planned, process, 0)

    monkeypatch.setattr(kernel_runs.Run, "start", start)
    monkeypatch.setattr(
        kernel_runs.Run, "result", lambda run, _: kernel_runs.RunResult(run.planned.kernel, "", 0, [], [], "", "")
    )
    results = runs.run([kernel_runs.Planned(kernel, "", tmp_path, []) for kernel in kernels])
    assert [(result.kernel, result.status) for result in results] == [(kernel, 0) for kernel in kernels]
    assert running == most


@pytest.mark.parametrize(
    ("cpus", "memory", "options", "kernels"),
    [
        (2, 99, [], 1),
        (31, 99, [], 1),
        (32, 99, ["-k", "ring"], 2),
        (32, 99, ["--vm-memory=4096"], 1),
        (64, 500, [], 4),
        (64, 90, [], 1),
        (64, 99, [], 2),
    ],
)
def test_number_of_kernels_at_once(
    monkeypatch: pytest.MonkeyPatch, cpus: int, memory: int, options: list[str], kernels: int
) -> None:
    """One kernel is tested for every 16 CPUs, if as many machines fit into the memory (in GiB)."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(cpus))
    monkeypatch.setattr(matrix, "available_memory", lambda: memory * GIB)
    monkeypatch.setattr(matrix, "nested_vendor", lambda: None)
    assert matrix._at_once(options) == kernels
    monkeypatch.setattr(matrix, "nested_vendor", lambda: "kvm_amd")
    assert matrix._at_once(options) == 1


def test_killed_run_in_a_matrix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A killed run counts as one that could not be tested, its results are shown, and the next one runs."""
    monkeypatch.setattr(sys, "executable", fake_python(tmp_path, "os.kill(os.getpid(), signal.SIGKILL)"))
    file = write(tmp_path / "matrix.toml", 'kernels = ["host", "b"]\n')
    assert matrix.main([str(file), f"--results={tmp_path / 'results'}"]) == CANNOT_TEST
    table = (tmp_path / "results" / "table.txt").read_text()
    assert "1     pass  pass\n" in table
    assert table.endswith("".join(f"{run}  6.0  defaults: cannot be tested: a signal ended it\n" for run in "AB"))


@pytest.mark.parametrize(
    ("output", "done"),
    [
        (None, (None, "")),
        ("booting\n", (None, "")),
        ("a PASSED [  9%]\nb PASSED [ 45%]\nc", (0.45, "45 %")),
        ("a.py ....... [100%]\n", (1.0, "100 %")),
    ],
)
def test_progress_of_a_matrix_run(tmp_path: Path, output: str | None, done: tuple[float | None, str]) -> None:
    """The progress is the last percentage that pytest printed, and unknown before."""
    if output is not None:
        write(tmp_path / "output.txt", output)
    assert kernel_runs._read_progress(tmp_path / "output.txt") == done


def test_kernel_matrix_file(tmp_path: Path) -> None:
    """A matrix file has kernels, sets of parameters and arguments; the repository's own is valid."""
    path = write(tmp_path / "matrix.toml", 'kernels = ["debian:6.1"]\narguments = "-k \'a or b\'"\n')
    assert matrix.load(path) == (["debian:6.1"], [""], ["-k", "a or b"])
    kernels, parameters, _ = matrix.load(ROOT / "matrix.toml")
    assert kernels == ["host", "debian:6.1", "debian:6.12", "debian:7.2"]
    assert len(parameters) == 6
    assert all(parse_parameters(text) for text in parameters)


def test_host_runs_all_tests_on_kvm(tmp_path: Path) -> None:
    """The host's run has all tests that a booted kernel gets: those of each folder but the suite's own."""
    run("host", tmp_path / "01", ["--collect-only", "-qq"])
    collected = set(re.findall(r"^(selftests/.*\.py)(?:::|: )", (tmp_path / "01/output.txt").read_text(), re.MULTILINE))
    files = {str(path.relative_to(ROOT)) for path in (ROOT / "selftests").rglob("test_*.py")}
    assert collected == {name for name in files if not name.startswith("selftests/unit/")}


@pytest.fixture
def planned_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Have each run end with the status that its kernel's name is (the host's: 0); returns kernels and parameters as run."""
    runs = []

    def start(label: str, planned: kernel_runs.Planned) -> kernel_runs.Run:
        runs.append((planned.kernel, planned.parameters))
        planned.folder.mkdir(parents=True)
        process: Any = SimpleNamespace(poll=lambda: 0)
        return kernel_runs.Run(label, planned, process, 0)

    def result(run: kernel_runs.Run, _interrupted: bool) -> kernel_runs.RunResult:
        kernel = run.planned.kernel
        status = 0 if kernel == "host" else int(kernel)
        return kernel_runs.RunResult(
            kernel, run.planned.parameters, status, [CELL | {"verdict": "pass"}], [], kernel, ""
        )

    monkeypatch.setattr(kernel_runs.Run, "start", start)
    monkeypatch.setattr(kernel_runs.Run, "result", result)
    monkeypatch.setattr(output_paths, "RESULTS", tmp_path / "results")
    return runs


@pytest.mark.parametrize(
    ("kernels", "expected"),
    [("0 0", 0), ("0 1", 1), ("1 125", 1), ("0 125", 125), ("0 128", 128), ("130 0", 130)],
)
@pytest.mark.usefixtures("planned_runs")
def test_matrix_table_and_status(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kernels: str, expected: int
) -> None:
    """The matrix prints and writes a table; its status is 1 for a bad kernel, else that of what could not be tested."""
    assert matrix.main([str(write(tmp_path / "matrix.toml", f"kernels = {kernels.split()}"))]) == expected
    shown = capsys.readouterr().out
    assert "dirty-log  48bit-4k  shmem    forced  sparse   1     pass" in shown
    assert re.search(r"\n\n2 runs: .*; files: \S+\n$", shown)
    assert list(tmp_path.glob("results/matrix-*/table.txt"))


def test_host_runs_once_in_a_matrix(tmp_path: Path, planned_runs: list[tuple[str, str]]) -> None:
    """The host runs once, without parameters, which are for booted kernels."""
    parameters = ["kvm_amd.npt=0", "kvm_amd.npt=1"]
    file = write(tmp_path / "matrix.toml", f'kernels = ["host", "0"]\nparameters = {parameters}')
    matrix.main([str(file)])
    assert planned_runs == [("host", ""), ("0", "kvm_amd.npt=0"), ("0", "kvm_amd.npt=1")]
