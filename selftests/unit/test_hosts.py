# SPDX-License-Identifier: GPL-2.0-only
"""Runs on several hosts: what they are asked, and how each of them ends, without ssh."""

import json
from pathlib import Path

import pytest

from runner import hosts, kernel_runs
from runner.errors import CANNOT_TEST
from runner.run_verdicts import USAGE_ERROR


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no hosts are named: hosts.py 'HOST ...'"),
        ([""], "no hosts are named"),
        (["-v"], "no hosts are named"),
        (["a b a"], "a: named twice"),
        (["a", "--kernel=debian:6.12"], "--kernel: hosts run their own"),
        (["a", "--junitxml", "x.xml"], "--junitxml: each host's files are below the folder --results"),
        (["a", "--results="], "--results: its value is missing"),
        (["a", "--time-limit=0"], "--time-limit: 0 is no number of seconds from 1 on"),
        (["a", "--results=/proc/none"], "--results: /proc/none: No such file or directory"),
    ],
)
def test_wrong_arguments_for_hosts(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    """A mistake in the arguments is one line, and no host is asked."""
    assert hosts.main(arguments) == USAGE_ERROR
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"hosts.py: {message}")


@pytest.mark.parametrize(
    ("words", "command"),
    [
        ([], ["600", "run"]),
        (["-k", "x"], ["600", "run", "-k", "x"]),
        (["--time-limit", "5", "test", "a"], ["5", "test", "a"]),
    ],
)
def test_same_run_on_each_host(tmp_path: Path, words: list[str], command: list[str]) -> None:
    """Each host has a folder of its own, and the same command, with the same seed."""
    planned, folder = hosts._plan(["a root@b", f"--results={tmp_path}", *words], Path("file"))
    assert folder == tmp_path
    assert [(run.kernel, run.folder) for run in planned] == [("a", tmp_path / "01"), ("root@b", tmp_path / "02")]
    (first, second) = [run.command for run in planned]
    assert first[1].endswith("/runner/ssh_run.py")
    assert first[2:5] == ["a", "file", str(tmp_path / "01")]
    assert first[5:] == second[5:]
    assert [word for word in first[5:] if not word.startswith(("--seed=", "-v"))] == command


def test_failure_of_the_tool_is_no_verdict(tmp_path: Path) -> None:
    """A run that failed on a host without results says nothing about the host's kernel; one with results does."""
    (tmp_path / "output.txt").write_text("Traceback\nOSError: something\n")
    planned = kernel_runs.Planned("a", "", tmp_path, [], Path("file"))
    result = kernel_runs._read_result(planned, 1)
    assert (result.status, result.reason) == (CANNOT_TEST, "OSError: something")
    results = {"cells": [], "tests": [], "host": {"kernel": "6.12"}, "end": {}}
    (tmp_path / "results.json").write_text(json.dumps(results))
    result = kernel_runs._read_result(planned, 1)
    assert (result.status, result.reason, result.release) == (1, "tests failed", "6.12")
