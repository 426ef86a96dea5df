# SPDX-License-Identifier: GPL-2.0-only
"""Judges the results of a run anew by today's list of known bugs; nothing runs.

The verdict on a violation depends on the list only, and its kind and pages are in the failure's file. A failure without such
a file (an error, a call with another answer than expected) is one with any list.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from dirty_tracking.cell import Cell
from dirty_tracking.violations import Kind, Violation
from harness import known_bugs
from harness.failure_report import file_name
from harness.known_bugs import KnownBug
from harness.table import DIMENSIONS, UNTESTED
from kvm_util.host import Host
from runner.kernel_log import Kind as ReportKind
from runner.kernel_log import Splat


def judged_anew(folder: Path, data: Mapping[str, Any]) -> dict[str, Any]:
    """The results of a run with the verdicts and reasons that they have today.

    :param folder: the run's, with the files of its failures
    :param data: what results.json holds
    :raises TomlError: the list has a mistake
    :raises OSError, ValueError, KeyError, TypeError: a file is not what a run has written
    """
    known = {field.name for field in fields(Host)}
    bugs = known_bugs.on_host(Host(**{name: value for name, value in data["host"].items() if name in known}))
    log = data["kernel_log"]  # or why it was not watched
    reports = [_report(report, bugs) for report in log] if isinstance(log, list) else []
    blamed = {test: report["title"] for report in reports if report["known_bug"] is None for test in report["tests"]}
    unexplained = {report["title"] for report in log if report["known_bug"] is None} if reports else set()
    explained = {report["title"] for report in reports if report["known_bug"] is not None} & unexplained

    def judge(row: Mapping[str, Any]) -> dict[str, Any]:
        if row["verdict"] in UNTESTED:
            return {**row}
        if row["test"] in blamed:
            return {**row, "verdict": "FAIL", "reason": blamed[row["test"]]}
        verdict, reason = _verdict(folder, row, bugs, row["reason"] in explained)
        return {**row, "verdict": verdict, "reason": reason}

    rows = {name: [judge(row) for row in data[name]] for name in ("cells", "tests")}
    return {**data, "kernel_log": reports or log, **rows}


def _report(report: Mapping[str, Any], bugs: Sequence[KnownBug]) -> dict[str, Any]:
    splat = Splat(ReportKind(report["kind"]), report["lines"])
    if splat.kind is ReportKind.TAINT:  # whether a bug explains it depends on whether the log could be read
        explained = next((bug.id for bug in bugs if bug.id == report["known_bug"]), None)
    else:
        explained = next((bug.id for bug in bugs if bug.explains_log(splat.titles)), None)
    return {**report, "known_bug": explained}


def _violation(finding: Mapping[str, Any]) -> Violation:
    """What a known bug looks at in a violation. In older runs, which do not say so, the ring may have been lapped."""
    pages, lapped = tuple(finding["pages"]), finding.get("ring_lapped", True)
    return Violation(Kind[finding["kind"]], finding["detail"], pages=pages, ring_lapped=lapped)


def _verdict(folder: Path, row: Mapping[str, Any], bugs: Sequence[KnownBug], by_log: bool) -> tuple[str, str]:
    """The verdict on a test that ran, and its reason.

    :param by_log: whether it failed because of a report in the kernel's log that a bug explains today
    """
    verdict, reason = row["verdict"], row["reason"] or ""
    name = row["test"].partition("::")[2].partition("[")[0]
    cell = Cell(**{dimension: row[dimension] for dimension in DIMENSIONS}) if "log_mode" in row else None
    bugs = [bug for bug in bugs if bug.concerns(name, cell)]
    path = folder / f"{file_name(row['test'])}.json"
    if verdict in ("FAIL", "known bug") and not known_bugs.is_not_shown(reason):
        if path.exists():
            findings = json.loads(path.read_text(encoding="utf-8"))["findings"]
            violations = [_violation(one) for one in findings]
            explained = next((bug.id for bug in bugs if bug.explains(violations)), None)
            return ("known bug", explained) if explained is not None else ("FAIL", "")
        if not by_log:
            return verdict, reason
    if always := next((bug for bug in bugs if bug.always), None):
        return "FAIL", known_bugs.not_shown(always.id)
    return ("known bug, not seen" if bugs else "pass"), ""
