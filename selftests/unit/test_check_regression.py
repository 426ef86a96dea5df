# SPDX-License-Identifier: GPL-2.0-only
"""runner/check_regression.py: usage errors, the order of its runs, and what it makes of their ends."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from runner import ROOT
from runner import check_regression as regression

PYTHON = sys.executable
SLOWER, CANNOT_TEST, WRONG, INTERRUPTED = 1, 125, 128, 130

# A program in place of Python: it appends its kernel to a file, and writes results.json with times that depend on the kernel.
RUN = """#!{python}
import json, os, pathlib, signal, sys, time
signal.signal(signal.SIGINT, lambda *_: sys.exit(130))
kernel = sys.argv[2]
(folder,) = [pathlib.Path(word[len("--results="):]) for word in sys.argv if word.startswith("--results=")]
with open("{log}", "a") as log:
    print(kernel, folder.parent.name, folder.name, *sys.argv[3:], file=log)
if kernel == "no-kernel":
    sys.exit(125)
host = dict(kernel=kernel, backend="kvm_amd", parameters=dict(), cpu="Z", cpus=2)
data = dict(host=host, machine=dict(), cells=[], kernel_log=[], end=dict(), tests=[dict(test="t", verdict="pass", reason="")])
if folder.name != "tests":
    data["costs"] = dict(mode=[dict(get=dict(slow=2).get(kernel, 1) + int(folder.name) / 100)])
(folder / "results.json").write_text(json.dumps(data))
if kernel == "endless" and folder.name == "02":
    time.sleep(60)
"""


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Have a program run in place of each kernel; returns the file in which each leaves a line."""
    program = tmp_path / "python"
    program.write_text(RUN.format(python=sys.executable, log=tmp_path / "log"))
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    return tmp_path / "log"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "two kernels are to be named: check_regression.py BASE NEW [options of pytest]; see --help"),
        (["a", ""], "two kernels are to be named: "),
        (["a", "--rounds=5"], "two kernels are to be named: "),
        (["a", "b c"], "b c: 'c' is no parameter: write it as module.parameter=value"),
        (["a", "'b"], "'b: No closing quotation"),
        (["host", "a"], "host is no kernel to boot: name two (debian:6.12, a build tree, ...)"),
        (["a", "b", "--rounds", "4"], "--rounds: 4 is not a number from 5 on; fewer could show no difference"),
        (["a", "b", "--rounds=x"], "--rounds: x is not a number from 5 on"),
        (["a", "b", "--results="], "--results: its value is missing"),
        (["a", "b", "--results=/proc/x"], "--results: /proc/x: No such file or directory"),
        (["a", "b", "--kvm-params", "kvm.tdp_mmu=0"], "--kvm-params: they stand behind BASE and NEW"),
    ],
    ids=" ".join,
)
def test_regression_usage_errors(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A mistake is one line, before any kernel is booted."""
    assert regression.main(words) == WRONG
    out, error = capsys.readouterr()
    assert not out
    assert len(error.splitlines()) == 1
    assert error.startswith(f"check_regression.py: {message}")


@pytest.mark.usefixtures("scipy")
@pytest.mark.parametrize(("new", "status"), [("slow kvm.tdp_mmu=0", SLOWER), ("same", 0)])
def test_order_of_regression_runs(
    tmp_path: Path, runs: Path, capfd: pytest.CaptureFixture[str], new: str, status: int
) -> None:
    """After the tests the kernels are booted in the order A B B A, one machine each; a slower kernel is a regression."""
    words = ["old", new, "--rounds=5", f"--results={tmp_path / 'r'}", "--vm-memory", "4096", "-k", "ring"]
    assert regression.main(words) == status
    kernel, *parameters = new.split()
    lines = [line.split() for line in runs.read_text().splitlines()]
    pairs = [("old", "base"), (kernel, "new")]
    order = [(*pair, f"0{number}") for number in range(1, 6) for pair in (pairs if number % 2 else pairs[::-1])]
    assert [tuple(line[:3]) for line in lines] == [*((*pair, "tests") for pair in pairs), *order]
    testing, measuring = lines[1], lines[3]
    assert f"--kvm-params={''.join(parameters)}" in measuring
    assert {"--machines=1", "--vm-memory=4096", "--thorough", "selftests/scenarios/test_costs.py"} <= {*measuring}
    assert "ring" not in measuring
    assert testing[-4:] == ["--vm-memory", "4096", "-k", "ring"]
    assert "--deselect=selftests/scenarios/test_costs.py" in testing
    assert ("  get, mode: 1.03 -> 2.03 (1.97 times as much" in capfd.readouterr().out) is bool(status)
    assert regression.main(words) == WRONG
    assert f"--results: {tmp_path / 'r'} has the results of other runs" in capfd.readouterr().err


def test_kernel_that_cannot_be_compared(tmp_path: Path, runs: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A kernel that cannot be tested ends it at once, with the status that says so; its line has the reason."""
    assert regression.main(["old", "no-kernel", f"--results={tmp_path / 'r'}"]) == CANNOT_TEST
    assert len(runs.read_text().splitlines()) == 2
    assert "[2/14] no-kernel defaults ... cannot be tested: " in capfd.readouterr().out


def test_interrupted_regression_check(tmp_path: Path, runs: Path) -> None:
    """Ctrl-C ends the run that is being made, and what was measured is compared as far as it goes, and kept."""
    driver = f"""
import sys
from runner.check_regression import main
sys.executable = {sys.executable!r}
sys.exit(main(sys.argv[1:]))
"""
    process = subprocess.Popen(
        [PYTHON, "-c", driver, "old", "endless", f"--results={tmp_path / 'r'}"],
        stdout=subprocess.PIPE, text=True, start_new_session=True,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'lib'}"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # nohup may have it ignored
    )  # fmt: skip
    deadline = time.monotonic() + 30
    while not (tmp_path / "r/new/02/results.json").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(0.2)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    output, _ = process.communicate(timeout=50)
    assert process.returncode == INTERRUPTED
    assert "times are not compared: 5 runs of each are needed, and there are 1 and 2 (" in output
    data = json.loads((tmp_path / "r/new/01/results.json").read_text())
    assert data["costs"]["mode"] == [{"get": 1.01}]
