# SPDX-License-Identifier: GPL-2.0-only
"""``make rejudge``, and ``--rejudge`` of compare: saved results with the verdicts by another list of known bugs."""

import json
from pathlib import Path
from typing import Any

import pytest

from dirty_tracking.violations import Kind
from harness import known_bugs
from harness.compare import main
from harness.failure_report import file_name
from harness.known_bugs import KnownBug, not_shown
from harness.saved_run import SavedRun

HOST = {"kernel": "6.12.1", "backend": "kvm_amd", "parameters": {"kvm.a": "N"}, "cpu": "Z", "cpus": 2, "memory": 1}
TEST = "selftests/memory/test_x.py::test_x[1]"
CELL = {
    "log_mode": "dirty-log", "guest_mode": "48bit-4k", "backing": "anonymous", "stop": "forced", "density": "sparse",
    "vcpus": 1, "test": "selftests/matrix/test_dirty_log.py::test_dirty_log[dirty-log-48bit-4k-anonymous-forced-sparse-1vcpu]",
}  # fmt: skip
WARNING = {"kind": "WARN", "title": "WARNING: at foo", "lines": ["WARNING: at foo"], "known_bug": None, "tests": [TEST]}


def bug(always: bool = False, **more: Any) -> KnownBug:
    """A known bug of test_x that loses writes."""
    fields = {"backend": ("kvm_amd",), "findings": frozenset({Kind.LOST}), "tests": ("test_x",)} | more
    return KnownBug(id="a-bug", summary="", evidence="", always=always, **fields)


def save(folder: Path, verdict: str, kinds: str, row: dict[str, Any], reason: str = "", **more: Any) -> None:
    """A run of one test with a verdict, and a file of its failure with violations of these kinds, if there are any."""
    folder.mkdir()
    row = row | {"verdict": verdict, "reason": reason}
    data = {"host": HOST, "machine": {}, "cells": [], "tests": [], "kernel_log": [], "end": {}} | more
    data["cells" if "log_mode" in row else "tests"] = [row]
    (folder / "results.json").write_text(json.dumps(data))
    if kinds:
        findings = [{"kind": kind, "detail": "", "pages": [1, 2]} for kind in kinds.split()]
        (folder / f"{file_name(row['test'])}.json").write_text(json.dumps({"findings": findings}))


LIST = {
    "none": [],
    "sometimes": [bug()],
    "always": [bug(always=True)],
    "fewer pages": [bug(most_pages=1)],
    "other kernels": [bug(kernels=("6.18", ""))],
    "other parameters": [bug(parameters={"kvm.a": "Y"})],
    "cells": [bug(tests=(), cells={"log_mode": ["dirty-log"]})],
    "other cells": [bug(tests=(), cells={"log_mode": ["dirty-ring"]})],
    "log": [bug(tests=("test_y",), log=("foo",))],
}


@pytest.mark.parametrize(
    ("bugs", "row", "before", "kinds", "now"),
    [
        ("none", {"test": TEST}, "FAIL", "LOST", ("FAIL", "")),
        ("sometimes", {"test": TEST}, "FAIL", "LOST", ("known bug", "a-bug")),
        ("sometimes", {"test": TEST}, "FAIL", "LOST SPURIOUS", ("FAIL", "")),
        ("sometimes", {"test": TEST}, "FAIL", "", ("FAIL", "")),
        ("fewer pages", {"test": TEST}, "FAIL", "LOST", ("FAIL", "")),
        ("other kernels", {"test": TEST}, "FAIL", "LOST", ("FAIL", "")),
        ("other parameters", {"test": TEST}, "FAIL", "LOST", ("FAIL", "")),
        ("cells", CELL, "FAIL", "LOST", ("known bug", "a-bug")),
        ("other cells", CELL, "FAIL", "LOST", ("FAIL", "")),
        ("none", {"test": TEST}, "known bug", "LOST", ("FAIL", "")),
        ("sometimes", {"test": TEST}, "pass", "", ("known bug, not seen", "")),
        ("always", {"test": TEST}, "pass", "", ("FAIL", not_shown("a-bug"))),
        ("none", {"test": TEST}, "known bug, not seen", "", ("pass", "")),
        ("always", {"test": TEST}, "skipped", "", ("skipped", "")),
    ],
)
def test_verdict_by_another_list(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bugs: str, row: dict[str, Any], before: str, kinds: str,
    now: tuple[str, str],
) -> None:  # fmt: skip
    """A test's verdict is the one that its run would have had with this list, by kinds, kernel, parameters and cell."""
    monkeypatch.setattr(known_bugs, "load", lambda: LIST[bugs])
    save(tmp_path / "a", before, kinds, row)
    data = json.loads((tmp_path / "a/results.json").read_text())
    data["tests"].append({"test": "other", "verdict": "pass", "reason": ""})
    (tmp_path / "a/results.json").write_text(json.dumps(data))
    assert SavedRun.load(tmp_path / "a", rejudge=True).tests[row["test"]] == now
    assert SavedRun.load(tmp_path / "a").tests[row["test"]].verdict == before


def test_bug_that_did_not_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A test that failed because a bug did not show passes once the bug is not in the list any more."""
    save(tmp_path / "a", "FAIL", "", {"test": TEST}, not_shown("a-bug"))
    for bugs, verdict in (("always", "FAIL"), ("none", "pass")):
        monkeypatch.setattr(known_bugs, "load", lambda bugs=bugs: LIST[bugs])
        assert SavedRun.load(tmp_path / "a", rejudge=True).tests[TEST].verdict == verdict


@pytest.mark.parametrize(("bugs", "verdict"), [("none", "FAIL"), ("log", "pass")])
def test_report_in_the_log_by_another_list(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bugs: str, verdict: str
) -> None:
    """A report in the kernel's log, and the test that failed by it, are judged by the list too."""
    monkeypatch.setattr(known_bugs, "load", lambda: LIST[bugs])
    for name, explained, before in (("a", None, "FAIL"), ("b", "a-bug", "pass")):
        log = [WARNING | {"known_bug": explained}]
        save(
            tmp_path / name,
            before,
            "",
            {"test": TEST},
            str(WARNING["title"]) if before == "FAIL" else "",
            kernel_log=log,
        )
        run = SavedRun.load(tmp_path / name, rejudge=True)
        assert run.tests[TEST].verdict == verdict
        assert run.is_bad is bool(run.log_reports) is (verdict == "FAIL")


@pytest.mark.parametrize(
    ("lapped", "verdict"), [({"ring_lapped": False}, "FAIL"), ({"ring_lapped": True}, "known bug"), ({}, "known bug")]
)
def test_rejudged_run_with_a_ring(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lapped: dict[str, bool], verdict: str
) -> None:
    """A bug of lapped rings does not explain violations of a run whose ring was not lapped, unless the run does not say."""
    monkeypatch.setattr(known_bugs, "load", lambda: [bug(ring_lapped=True)])
    save(tmp_path / "a", "FAIL", "", {"test": TEST})
    findings = [{"kind": "LOST", "detail": "", "pages": [1]} | lapped]
    (tmp_path / "a" / f"{file_name(TEST)}.json").write_text(json.dumps({"findings": findings}))
    assert SavedRun.load(tmp_path / "a", rejudge=True).tests[TEST].verdict == verdict


def test_rejudged_run_in_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run alone is compared with itself as it was judged; with others, all are judged anew; nothing is written."""
    save(tmp_path / "a", "FAIL", "LOST", {"test": TEST})
    save(tmp_path / "b", "known bug", "LOST", {"test": TEST}, "a-bug")
    a, b = (str(tmp_path / name) for name in "ab")
    before = (tmp_path / "a/results.json").read_bytes()
    monkeypatch.setattr(known_bugs, "load", lambda: LIST["sometimes"])
    assert main(["--rejudge", a]) == 0
    assert capsys.readouterr().out.splitlines()[1:] == [
        f"new  {a}, judged by today's known_bugs.toml: 6.12.1, kvm_amd on this host", "fixed (1 test):",
        "  selftests/memory/test_x.py::test_x", "0 tests as before", "good",
    ]  # fmt: skip
    assert main(["--rejudge", a, b]) == 0
    assert "1 test as before" in capsys.readouterr().out
    monkeypatch.setattr(known_bugs, "load", lambda: LIST["none"])
    assert main(["--rejudge", b]) == 1
    assert capsys.readouterr().out.endswith(
        "newly failing (1 test):\n  selftests/memory/test_x.py::test_x\n0 tests as before\nbad\n"
    )
    assert main([b, a]) == 1
    assert main(["--rejudge", b, a]) == 0
    assert (tmp_path / "a/results.json").read_bytes() == before


def test_damaged_file_of_a_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A failure's file that was cut short is one line of error, and status 2."""
    save(tmp_path / "a", "FAIL", "LOST", {"test": TEST})
    (tmp_path / "a" / f"{file_name(TEST)}.json").write_text("{")
    assert main(["--rejudge", str(tmp_path / "a")]) == 2
    assert capsys.readouterr().err.endswith("or a file of a failure beside it is damaged\n")


def test_failure_beside_a_known_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A test that failed although a bug explained the report in the kernel's log fails with the same list, too."""
    monkeypatch.setattr(known_bugs, "load", lambda: LIST["log"])
    log = [WARNING | {"known_bug": "a-bug"}]
    save(tmp_path / "a", "FAIL", "", {"test": TEST}, str(WARNING["title"]), kernel_log=log)
    assert SavedRun.load(tmp_path / "a", rejudge=True).tests[TEST].verdict == "FAIL"


def test_rejudged_run_that_ended_early(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run whose tests did not all run is no good one, judged anew or not."""
    save(tmp_path / "a", "pass", "", {"test": TEST})
    data = json.loads((tmp_path / "a/results.json").read_text())
    data["tests"].append({"test": "other", "verdict": "not run", "reason": "interrupted"})
    (tmp_path / "a/results.json").write_text(json.dumps(data))
    assert main(["--rejudge", str(tmp_path / "a")]) == 2
    assert capsys.readouterr().out.endswith("no verdict: 1 test did not run\n")
