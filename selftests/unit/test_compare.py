# SPDX-License-Identifier: GPL-2.0-only
"""``make compare``: how the verdicts of runs differ, and which times moved beyond noise."""

import json
import math
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from harness.compare import Change, Comparison, main
from harness.figure_changes import FEWEST_RUNS, LEVEL, moved_figures
from harness.saved_run import SavedRun
from selftests.unit.commands import ONE_CELL, QUICK, pytest_command
from selftests.unit.mutants.faults import LOSING_PLUGIN

HOST = {"kernel": "6.12", "backend": "kvm_amd", "parameters": {"kvm.a": "N"}, "cpu": "Z", "cpus": 2}
EMPTY: dict[str, Any] = {"host": HOST, "machine": {}, "cells": [], "tests": [], "kernel_log": [], "end": {}}
CELL = {
    "log_mode": "dirty-log",
    "guest_mode": "48bit-4k",
    "backing": "anonymous",
    "stop": "forced",
    "density": "sparse",
}


def save(folder: Path, verdicts: dict[str, str], **more: Any) -> SavedRun:
    """A run whose tests have these verdicts."""
    folder.mkdir(parents=True)
    tests = [{"test": test, "verdict": verdict, "reason": f"why {verdict}"} for test, verdict in verdicts.items()]
    data = EMPTY | {"tests": tests} | more
    (folder / "results.json").write_text(json.dumps(data))
    return SavedRun.load(folder)


@pytest.mark.parametrize(
    ("before", "now", "change"),
    [
        ("pass", "pass", None),
        ("pass", "FAIL", Change.FAILS),
        ("skipped", "FAIL", Change.FAILS),
        ("known bug", "FAIL", Change.FAILS),
        (None, "FAIL", Change.FAILS),
        ("FAIL", "FAIL", Change.STILL_FAILS),
        ("FAIL", "pass", Change.FIXED),
        ("FAIL", "known bug", Change.FIXED),
        ("pass", "known bug", Change.BUG),
        ("known bug", "pass", Change.BUG_GONE),
        ("known bug", "known bug, not seen", None),
        ("known bug, not seen", "known bug", None),
        ("pass", "skipped", Change.SKIPPED),
        ("FAIL", "not run", Change.SKIPPED),
        ("not run", "skipped", None),
        ("skipped", "pass", Change.RUNS),
        (None, "pass", Change.APPEARED),
        ("pass", None, Change.VANISHED),
        ("FAIL", None, Change.VANISHED),
    ],
)
def test_change_of_a_verdict(tmp_path: Path, before: str | None, now: str | None, change: Change | None) -> None:
    """Each pair of verdicts is one change, or none; only a failure that is new is a regression."""
    base = save(tmp_path / "a", {"other": "pass"} | ({"t[x]": before} if before else {}))
    new = save(tmp_path / "b", {"other": "pass"} | ({"t[x]": now} if now else {}))
    found = Comparison.of(base, new)
    assert {of: tests for of, tests in found.tests.items() if tests} == ({change: ["t[x]"]} if change else {})
    assert found.is_regression is (change is Change.FAILS)
    last = found.lines(all_tests=False)[-1]
    assert (last == "REGRESSION") is (change is Change.FAILS)
    assert last.startswith("no regression in what ran") is (now == "not run")


def test_comparison_in_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The worst changes come first, the cases of a test share a line unless all are asked for, and a reason is named."""
    cell = CELL | {"vcpus": 1, "verdict": "pass", "reason": ""}
    base = {"t[1]": "pass", "t[2]": "pass", "u": "skipped", "v": "known bug"}
    save(tmp_path / "a", base, cells=[cell])
    save(tmp_path / "b", {"t[1]": "FAIL", "t[2]": "FAIL", "u": "pass", "v": "pass"}, cells=[cell])
    folders = [str(tmp_path / name) for name in "ab"]
    assert main(folders) == 1
    assert capsys.readouterr().out.splitlines()[2:] == [
        "newly failing (2 tests):", "  t, 2 cases: why FAIL", "no longer with a known bug (1 test):", "  v: why known bug",
        "newly run (1 test):", "  u: why skipped", "1 test as before", "REGRESSION",
    ]  # fmt: skip
    assert main([*folders, "--all"]) == 1
    assert "  t[2]: why FAIL" in capsys.readouterr().out
    assert main([folders[1], folders[0]]) == 0
    assert "fixed (2 tests):" in capsys.readouterr().out


def test_report_in_the_log_is_a_regression(tmp_path: Path) -> None:
    """A report in the kernel's log that is not in the base's is a regression, unless a known bug explains it."""
    base = save(tmp_path / "a", {"t": "pass"})
    for name, bug, regression in (("b", None, True), ("c", "some-bug", False)):
        new = save(tmp_path / name, {"t": "pass"}, kernel_log=[{"title": WARNING.format(1, "f"), "known_bug": bug}])
        assert Comparison.of(base, new).is_regression is regression
        again = save(
            tmp_path / f"{name}2", {"t": "pass"}, kernel_log=[{"title": WARNING.format(22, "a"), "known_bug": bug}]
        )
        assert not Comparison.of(new, again).is_regression


WARNING = "WARNING: CPU: {0} PID: {0}00 at arch/x86/kvm/mmu/mmu.c:{0}0 foo+0x{1}/0x30"


def test_death_of_the_kernel_is_a_regression(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A kernel that dies is a regression although no test fails; a run that was cut short is no run without one."""
    save(tmp_path / "a", {"t": "pass", "u": "pass"})
    save(tmp_path / "b", {"t": "pass", "u": "not run"}, end={"ending": "PANIC", "text": "panic"})
    save(tmp_path / "c", {"t": "pass", "u": "not run"}, end={"ending": "EMULATOR_FAULT", "text": "fault"})
    for name, status, text in (("b", 1, "the kernel panicked\n"), ("c", 2, "no regression in what ran: 1 test of")):
        assert main([str(tmp_path / "a"), str(tmp_path / name)]) == status
        assert text in capsys.readouterr().out
    assert main([str(tmp_path / "b"), str(tmp_path / "b")]) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "results.json: No such file or directory"),
        ("{", "results.json is no results.json of a run"),
        ("[]", "results.json is no results.json of a run"),
        (json.dumps(EMPTY), "no test ran on KVM"),
    ],
)
def test_runs_that_cannot_be_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str | None, message: str
) -> None:
    """A folder without results, or in whose run nothing ran, is one line of error, and status 2."""
    save(tmp_path / "a", {"t": "pass"})
    (tmp_path / "b").mkdir()
    if text is not None:
        (tmp_path / "b/results.json").write_text(text)
    assert main([str(tmp_path / "a"), str(tmp_path / "b")]) == 2
    out, error = capsys.readouterr()
    assert not out
    assert len(error.splitlines()) == 1
    assert message in error


# --- several runs of a kernel ------------------------------------------------------------------------------------------


def save_runs(folder: Path, runs: list[dict[str, str]], **more: Any) -> Path:
    """Several runs with these verdicts, in the folders of *folder*."""
    for number, verdicts in enumerate(runs):
        save(folder / f"{number:02}", verdicts, **more)
    return folder


def test_worst_verdict_of_several_runs(tmp_path: Path) -> None:
    """Of several runs of a kernel a test has the worst verdict, and a test that only some of them have is there."""
    runs = [{"t": "pass", "u": "FAIL", "v": "skipped"}, {"t": "known bug", "u": "pass", "v": "pass"}, {"w": "pass"}]
    run = SavedRun.load(save_runs(tmp_path / "a", runs))
    assert {test: result.verdict for test, result in run.tests.items()} == {
        "t": "known bug", "u": "FAIL", "v": "pass", "w": "pass",
    }  # fmt: skip


def test_runs_of_different_kernels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Runs of another kernel, or with other parameters, in the same folder are one line of error."""
    save(tmp_path / "a/1", {"t": "pass"})
    save(tmp_path / "a/2", {"t": "pass"}, host=HOST | {"parameters": {"kvm.a": "Y"}})
    assert main([str(tmp_path / "a"), str(tmp_path / "a/1")]) == 2
    assert "a/1 and " in (error := capsys.readouterr().err)
    assert error.endswith("a/2 are not runs of the same kernel and parameters\n")


# --- times -------------------------------------------------------------------------------------------------------------


def draw_runs(
    draw: random.Random, count: int, longer: str = "", factor: float = 1, noise: float = 0.1
) -> list[dict[str, float]]:
    """The times of *count* runs, with *noise* of each; the time *longer* is so many times as long."""
    names = [f"{phase}, {mode}" for phase in ("get", "dirty", "enable", "disable") for mode in "abcd"]
    means = {name: factor if name == longer else 1 for name in names}
    return [{name: mean * math.exp(draw.gauss(0, noise)) for name, mean in means.items()} for _ in range(count)]


@pytest.mark.usefixtures("scipy")
def test_noise_is_no_change() -> None:
    """Of the comparisons of a kernel with itself no larger share than the level finds that anything has moved."""
    draw = random.Random(1)
    tries = [[draw_runs(draw, 5, noise=0.2) for _ in "ab"] for _ in range(60)]
    assert LEVEL == 0.01
    assert sum(bool(moved_figures(base, new)) for base, new in tries) <= 3  # more are less probable than 1 in 250


@pytest.mark.usefixtures("scipy")
@pytest.mark.parametrize("factor", [2.0, 0.5])
def test_moved_time_is_found(factor: float) -> None:
    """Of several times the one that is longer, or shorter, by more than noise is found each time, with its medians."""
    others = 0
    for seed in range(5):
        draw = random.Random(seed)
        found = moved_figures(draw_runs(draw, 6), draw_runs(draw, 6, "get, b", factor))
        (moved,) = (figure for figure in found if figure.name == "get, b")
        assert moved.rose is (factor > 1)
        assert moved.now / moved.before == pytest.approx(factor, rel=0.25)
        assert moved.p <= LEVEL
        others += len(found) - 1
    assert others <= 1


@pytest.mark.usefixtures("scipy")
def test_small_change_is_not_reported() -> None:
    """A change below a tenth is not reported, however certain it is."""
    base = [{"get": 1 + number / 1000} for number in range(6)]
    for factor, count in ((1.09, 0), (1.12, 1), (1 / 1.09, 0), (1 / 1.12, 1)):
        assert len(moved_figures(base, [{"get": run["get"] * factor} for run in base])) == count


@pytest.mark.usefixtures("scipy")
def test_chance_by_some_splits_only() -> None:
    """Of many runs only some splits are tried; that none of them is as extreme does not make a change certain."""
    draw = random.Random(1)
    base, new = ([{"get": factor * draw.uniform(1, 2)} for _ in range(12)] for factor in (1, 9))
    (moved,) = moved_figures(base, new)
    assert moved.p == 1 / 20_001


@pytest.mark.usefixtures("scipy")
def test_fewest_runs_can_differ() -> None:
    """So few runs as are accepted are enough to find a large change, and one run less is not."""
    for count, found in ((FEWEST_RUNS, 1), (FEWEST_RUNS - 1, 0)):
        assert 2 / math.comb(2 * count, count) <= LEVEL or not found
        assert (2 / math.comb(2 * count, count) <= LEVEL) is bool(found)
    draw = random.Random(1)
    assert moved_figures(draw_runs(draw, FEWEST_RUNS), draw_runs(draw, FEWEST_RUNS, "get, a", 4))


def costs(*times: float) -> dict[str, Any]:
    """What a run has measured: GET took so many milliseconds in each round."""
    return {"costs": {"dirty-log, 16 MiB": [{"get": time} for time in times]}}


@pytest.mark.usefixtures("scipy")
def test_slower_kernel_is_a_regression(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A time that is longer in several runs is named, with medians and p, and is a regression; a shorter one is none."""
    for name, factor in (("a", 1), ("b", 2)):
        for number in range(5):
            time = factor * (1 + number / 100)
            save(tmp_path / name / str(number), {"t": "pass"}, **costs(time, time, 99))
    a, b = (str(tmp_path / name) for name in "ab")
    assert main([a, b]) == 1
    assert capsys.readouterr().out.splitlines()[2:] == [
        "1 test as before", "slower (1 time; medians of 5 and 5 runs, in ms):",
        "  get, dirty-log, 16 MiB: 1.02 -> 2.04 (2.00 times as much, p = 0.0079)", "0 times as before (5 and 5 runs)",
        "REGRESSION",
    ]  # fmt: skip
    assert main([b, a]) == 0
    assert "faster (1 time; medians of 5 and 5 runs, in ms):\n" in capsys.readouterr().out
    assert main([a, a]) == 0
    assert "1 time as before (5 and 5 runs)\nno regression\n" in capsys.readouterr().out


@pytest.mark.parametrize(("runs", "status"), [(1, 0), (4, 2)])
def test_too_few_runs_for_times(tmp_path: Path, capsys: pytest.CaptureFixture[str], runs: int, status: int) -> None:
    """With too few runs a line says how many are needed; several runs are there to compare times, so that is no success."""
    for name in "ab":
        save_runs(tmp_path / name, [{"t": "pass"}] * runs, **costs(1))
    assert main([str(tmp_path / name) for name in "ab"]) == status
    assert (
        f"times are not compared: 5 runs of each are needed, and there are {runs} and {runs} ("
        in capsys.readouterr().out
    )


def test_times_of_different_machines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Times of runs on different CPUs are not compared."""
    save_runs(tmp_path / "a", [{"t": "pass"}] * 5, **costs(1))
    save_runs(tmp_path / "b", [{"t": "pass"}] * 5, **costs(1), host=HOST | {"cpu": "Y"})
    assert main([str(tmp_path / name) for name in "ab"]) == 2
    assert "not all runs were on the same machine: Y, 2 CPUs; Z, 2 CPUs\n" in capsys.readouterr().out


def test_times_without_scipy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without scipy, verdicts are compared, and runs whose times could be compared are a line that says what to install."""
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    for name, runs in (("a", 5), ("b", 5), ("c", 1)):
        save_runs(tmp_path / name, [{"t": "pass"}] * runs, **costs(1))
    a, b, c = (str(tmp_path / name) for name in "abc")
    assert main([c, c]) == 0
    assert main([a, b]) == 2
    error = capsys.readouterr().err
    assert error.startswith("compare: times are compared by scipy: ")
    assert error.endswith("(make .venv/analysis installs it)\n")


@pytest.mark.usefixtures("kvm")
def test_comparison_of_real_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run with a planted fault has a regression against one without, and a run has none against itself."""
    for name, plugin in (("a", ""), ("b", LOSING_PLUGIN)):
        command, environment = pytest_command(tmp_path / name, plugin)
        subprocess.run([*command, *ONE_CELL, *QUICK], env=environment, capture_output=True, check=False, timeout=60)
    a, b = (str(tmp_path / name / "results") for name in "ab")
    assert main([a, a]) == 0
    assert "1 test as before" in capsys.readouterr().out
    assert main([a, b]) == 1
    assert re.search(r"newly failing \(1 test\):\n  selftests/matrix/\S+::test_dirty_log\n", capsys.readouterr().out)


# A plugin with which each KVM_GET_DIRTY_LOG takes 5 ms longer
SLOW_PLUGIN = """
import time
from kvm_util import Vm
get_dirty_log = Vm.get_dirty_log
Vm.get_dirty_log = lambda *arguments: time.sleep(0.005) or get_dirty_log(*arguments)
"""


@pytest.mark.slow
@pytest.mark.usefixtures("kvm", "scipy")
def test_planted_delay_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Runs in which GET takes longer are a regression against runs in turn with them, and GET is named."""
    test = "selftests/scenarios/test_costs.py::test_each_write_is_reported_once[dirty-log]"
    for number in range(FEWEST_RUNS):
        for name, plugin in (("a", ""), ("b", SLOW_PLUGIN))[:: -1 if number % 2 else 1]:
            command, environment = pytest_command(tmp_path / name, plugin)
            done = [*command, f"--results={tmp_path / 'runs' / name / str(number)}", test]
            subprocess.run(done, env=environment, capture_output=True, check=True, timeout=60)
    assert main([str(tmp_path / "runs" / name) for name in "ab"]) == 1
    found = re.findall(r"^  (.*): .* -> .* times as much", capsys.readouterr().out, re.MULTILINE)
    assert "get, dirty-log, 64 MiB" in found
