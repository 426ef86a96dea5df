# SPDX-License-Identifier: GPL-2.0-only
"""A run as its results folder has it, with all that the report shows of it."""

import json
import re
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest

from dirty_tracking.cell import Cell, Settings
from dirty_tracking.run_evidence import SlotMap
from dirty_tracking.violations import Kind, Violation
from dirty_tracking.vm import PAGE
from harness.failure_report import cell_command, file_name
from harness.journal import NAME as JOURNAL
from harness.kernel_verdict import RunSummary, Verdict, describe_system, verdict_on_kernel
from harness.run_report import FILES_OF_A_RUN, KernelReport
from harness.saved_run import CompareError, Result, SavedRun
from harness.table import UNTESTED, VERDICTS

_RESULTS = FILES_OF_A_RUN[0]
_PYTEST = ".venv/bin/python -m pytest"
_REPRODUCE = re.compile(r"^reproduce (.*)$", re.MULTILINE)
# What data of another shape raises where it is used
_MALFORMED = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError)


class ReportError(Exception):
    """There can be no report; the message says why."""


@dataclass(frozen=True)
class CellRun:
    """A cell of the matrix as one run has it.

    :ivar command: what runs it again
    :ivar figures: the figures that are numbers, by name
    :ivar phases: of each phase the percentiles 50 and 99 and the longest time, in milliseconds: p50, p99, max
    :ivar dirty: pages reported, for each iteration
    :ivar ring_fill: how full the fullest ring was in each iteration, in percent; empty without rings
    """

    cell: Cell
    test: str
    result: Result
    command: str
    figures: Mapping[str, float]
    phases: Mapping[str, Mapping[str, float]]
    dirty: Sequence[float]
    ring_fill: Sequence[float]


@dataclass(frozen=True)
class Problem:
    """A test that failed, or that has a known bug.

    :ivar text: what was wrong, in lines
    :ivar maps: of each slot of which pages are wrong, by its number
    :ivar notes: the history of the first pages concerned
    :ivar reproduce: the command that runs the test again; empty if the results do not have it
    :ivar log: lines of the kernel's log while it ran
    :ivar file: the file in the run's folder with all pages; empty if there is none
    """

    test: str
    result: Result
    text: Sequence[str]
    maps: Mapping[int, SlotMap]
    notes: Sequence[str]
    reproduce: str
    log: Sequence[str]
    file: str


@dataclass(frozen=True)
class ReportedRun:
    """A run with all that the report shows of it.

    :ivar name: the folder, as the user wrote it
    :ivar saved: the run for comparisons; None if no test ran on KVM
    :ivar verdict: the verdict on the kernel, and the line that states it
    :ivar facts: what was tested and where: names and values
    :ivar tests: the result of each test on KVM, by its id, with the cells
    :ivar migrations: how many pages each round of a migration copied, by the migration's name
    :ivar console: the last lines of a kernel that died
    """

    name: str
    kernel: str
    saved: SavedRun | None
    verdict: tuple[Verdict, str]
    facts: Mapping[str, str]
    cells: Mapping[Cell, CellRun]
    tests: Mapping[str, Result]
    problems: Mapping[str, Problem]
    migrations: Mapping[str, Sequence[float]]
    kernel_reports: Sequence[KernelReport]
    console: Sequence[str]

    @classmethod
    def load(cls, folder: Path) -> "ReportedRun":
        """Load the run in *folder*.

        :raises ReportError: there is none, or its files are not those of a run
        """
        path = folder / _RESULTS
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            return cls._of(folder, data)
        except OSError as error:
            raise ReportError(f"{path}: {error.strerror}") from None
        except _MALFORMED:
            raise ReportError(f"{path} is no {_RESULTS} of a run") from None
        except CompareError as error:
            raise ReportError(str(error)) from None

    @classmethod
    def _of(cls, folder: Path, data: Mapping[str, Any]) -> "ReportedRun":
        cells = {run.cell: run for run in (_cell_run(row, data) for row in data["cells"])}
        tests = {run.test: run.result for run in cells.values()}
        tests |= {row["test"]: _result(row) for row in data["tests"]}
        logged = data["kernel_log"] if isinstance(data["kernel_log"], list) else []  # else it says why there are none
        reports = [KernelReport(**report | {"lines": list(map(str, report["lines"]))}) for report in logged]
        return cls(
            name=str(folder),
            kernel=data["host"]["kernel"],
            saved=SavedRun.load(folder) if any(result.ran for result in tests.values()) else None,
            verdict=_verdict(tests, reports, data["end"]),
            facts=_facts(data),
            cells=cells,
            tests=tests,
            problems={problem.test: problem for problem in _problems(folder, tests, reports)},
            migrations={
                row["name"]: [float(done["copied"]) for done in row["rounds"]] for row in data["migrations"].values()
            },
            kernel_reports=reports,
            console=list(map(str, data["end"].get("console", []))),
        )


def _cell_run(row: Mapping[str, Any], data: Mapping[str, Any]) -> CellRun:
    cell = Cell(**{field.name: row[field.name] for field in fields(Cell)})
    settings = _settings(data)
    phases: Mapping[str, Mapping[str, float]] = row.get("phases", {})
    return CellRun(
        cell,
        row["test"],
        _result(row),
        cell_command(_pytest_command(data["machine"]), cell, settings),
        {name: value for name, value in row.items() if type(value) in (int, float)},
        {phase: {name: float(times[name]) for name in ("p50", "p99", "max")} for phase, times in phases.items()},
        [float(count) for count in row.get("dirty_by_iteration", [])],
        [100 * fill / settings.ring_count for fill in row.get("ring_fill_by_iteration", [])],
    )


def _result(row: Mapping[str, Any]) -> Result:
    if row["verdict"] not in VERDICTS:
        raise ValueError("no verdict")
    return Result(row["verdict"], str(row["reason"] or ""))


def _settings(data: Mapping[str, Any]) -> Settings:
    """The run's settings; those that its version did not have are the defaults."""
    known = data["settings"]
    return Settings(**{field.name: known[field.name] for field in fields(Settings) if field.name in known})


def _pytest_command(machine: Mapping[str, Any]) -> str:
    """What runs pytest in the same kernel again."""
    if not machine:
        return _PYTEST
    parameters = " ".join(f"{name}={value}" for name, value in machine["parameters"].items())
    options = [f"--kernel={machine['image']}", *([f"--kvm-params={parameters}"] if parameters else [])]
    return f"{_PYTEST} {shlex.join(options)}"


def _facts(data: Mapping[str, Any]) -> dict[str, str]:
    host, settings = data["host"], data["settings"]
    return {
        "system": describe_system(host, data["machine"]),
        "suite": str(data["suite"]),
        "CPU": str(host.get("cpu", "")),
        "parameters": ", ".join(f"{name}={value}" for name, value in host.get("parameters", {}).items()),
        "settings": ", ".join(f"{name}={value}" for name, value in settings.items() if value is not None),
        "taint flags before": ", ".join(data["taint"]),
    }


def _verdict(
    tests: Mapping[str, Result], reports: Sequence[KernelReport], end: Mapping[str, Any]
) -> tuple[Verdict, str]:
    untested = Counter(result.reason for result in tests.values() if result.verdict in UNTESTED)
    summary = RunSummary(
        kernel=Counter(result.verdict for result in tests.values()),
        planned=len(tests),
        kernel_reports=sum(report.known_bug is None for report in reports),
        end=end,
        untested=None if any(result.ran for result in tests.values()) else untested,
    )
    return verdict_on_kernel(summary)


def _problems(folder: Path, tests: Mapping[str, Result], reports: Sequence[KernelReport]) -> Iterator[Problem]:
    failed = {test: result for test, result in tests.items() if result.verdict in ("FAIL", "known bug")}
    texts = dict(_texts(folder / JOURNAL)) if any(result.verdict == "FAIL" for result in failed.values()) else {}
    for test, result in failed.items():
        log = [line for report in reports if test in report.tests for line in report.lines]
        file = f"{file_name(test)}.json"
        try:
            data = json.loads((folder / file).read_text(encoding="utf-8"))
        except FileNotFoundError:
            text, reproduce = texts.get(test, ("", ""))
            yield Problem(test, result, text.splitlines(), {}, [], reproduce, log, "")
            continue
        except (OSError, ValueError) as error:
            raise ReportError(f"{folder / file} cannot be read: {error}") from None
        try:
            maps = _maps(data)
            text, reproduce = str(data["message"]), str(data["reproduce"])
            notes = list(map(str, data.get("history", [])))
        except _MALFORMED:
            raise ReportError(f"{folder / file} is no report of a failed test") from None
        yield Problem(test, result, text.splitlines(), maps, notes, reproduce, log, file)


def _maps(data: Mapping[str, Any]) -> dict[int, SlotMap]:
    """A map of each slot that has wrong pages; it ends with the last of them if the size of the slot is not known."""
    slots: dict[int, list[Violation]] = {}
    for finding in data["findings"]:
        if finding["slot"] is not None and finding["pages"]:
            violation = Violation(Kind[finding["kind"]], finding["detail"], finding["slot"], tuple(finding["pages"]))
            slots.setdefault(violation.slot or 0, []).append(violation)
    size = _settings(data).slot_size // PAGE if data["cell"] else 0
    return {
        slot: SlotMap.of(violations, size or 1 + max(max(violation.pages) for violation in violations))
        for slot, violations in slots.items()
    }


def _texts(journal: Path) -> Iterator[tuple[str, tuple[str, str]]]:
    """Of each test that failed, by its id, what the terminal showed, and the command that runs it again.

    A run that was resumed may have several of a test; the last one counts.
    """
    try:
        lines = journal.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:  # of a version without journals
        return
    for line in lines:
        if '"failed"' not in line:
            continue
        try:
            record = json.loads(line)
            failed = [report for report in record.get("reports", []) if report["outcome"] == "failed"]
            for report in (pytest.TestReport._from_json({"keywords": {}} | data) for data in failed):
                text = report.longreprtext
                found = _REPRODUCE.search("\n".join([text, *(more for _, more in report.sections)]))
                yield report.nodeid, (text, found[1] if found else "")
        except _MALFORMED:  # the last line of a host that died may be half a line
            continue
