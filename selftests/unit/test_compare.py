# SPDX-License-Identifier: GPL-2.0-only
"""``make compare``: how the verdicts of runs differ."""

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from harness.compare import Change, SavedRun, changes, is_regression, lines, main
from selftests.unit.commands import ONE_CELL, QUICK, pytest_command
from selftests.unit.mutants.faults import LOSING_PLUGIN

HOST = {"kernel": "6.12", "backend": "kvm_amd"}
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
    folder.mkdir()
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
    found = changes(base, new)
    assert {of: tests for of, tests in found.items() if tests} == ({change: ["t[x]"]} if change else {})
    assert is_regression(base, new, found) is (change is Change.FAILS)
    last = lines(base, new, found, all_tests=False)[-1]
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
        assert is_regression(base, new, changes(base, new)) is regression
        again = save(
            tmp_path / f"{name}2", {"t": "pass"}, kernel_log=[{"title": WARNING.format(22, "a"), "known_bug": bug}]
        )
        assert not is_regression(new, again, changes(new, again))


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
