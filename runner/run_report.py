# SPDX-License-Identifier: GPL-2.0-only
"""What a run leaves behind: the table, the results file, and a verdict on runs that tested nothing."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from runner import table

ROOT = Path(__file__).resolve().parent.parent
_DID_NOT_RUN = ("skipped", "not run")


@dataclass
class Facts:
    """What a run is about, as plain data.

    :ivar host: kernel, backend, parameters and CPU
    :ivar cells: the planned cells, in the order of the table
    :ivar place: where the kernel runs
    :ivar kernel_log: why the kernel's log is not watched; None when it is
    """

    host: dict[str, Any]
    settings: dict[str, Any]
    cells: list[dict[str, Any]]
    place: str = "this host's own"
    kernel_log: str | None = None
    machine: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class KernelReport:
    """A report in the kernel's log.

    :ivar known_bug: the id of the known bug that explains it
    :ivar tests: those that ran meanwhile
    """

    kind: str
    title: str
    lines: list[str]
    known_bug: str | None
    tests: list[str]


class RunReport:
    """Follows a run from its reports.

    :ivar kernel_reports: what the kernel's log had to say; to be set before the session ends
    :ivar remarks: lines that end the summary
    :ivar must_test: whether a run without a test on KVM is no success even if none asked for it
    :ivar nothing_ran_status: the exit status of such a run
    """

    def __init__(self, results: Path, facts: Facts) -> None:
        self.shown_results = results.relative_to(ROOT) if results.is_relative_to(ROOT) else results
        self.facts = facts
        self.kernel_reports: list[KernelReport] = []
        self.remarks: list[str] = []
        self.end: dict[str, Any] = {}
        self.must_test = False
        self.nothing_ran_status: int = pytest.ExitCode.NO_TESTS_COLLECTED
        self._results = results
        self._rows: dict[str, dict[str, Any]] = {}
        self._tests: dict[str, dict[str, str]] = {}
        self._on_kvm = 0
        self._not_on_kvm: list[str] = []
        self._not_run: dict[str, list[str]] = {}
        self._caught: dict[str, list[str]] = {}
        self._migrations: dict[str, dict[str, Any]] = {}
        self._tests_by_title: dict[str, list[str]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.outcome == "passed":
            return
        properties: dict[str, Any] = dict(report.user_properties)
        outcome, reason = verdict(report, properties)
        if outcome in _DID_NOT_RUN:
            self._not_run.setdefault(reason, []).append(report.nodeid)
        if properties.get("kvm"):
            if outcome in _DID_NOT_RUN:
                self._not_on_kvm.append(reason)
            else:
                self._on_kvm += 1
        for name, value in report.user_properties:
            if name == "kernel_log":
                self._tests_by_title.setdefault(str(value), []).append(report.nodeid)
        if "fault" in properties:
            within = f"{properties['fault_in']} {properties['caught_within']}"
            self._caught.setdefault(properties["fault"], []).append(within)
        if properties.get("kvm") and "log_mode" not in properties:
            before = self._tests.get(report.nodeid, {}).get("verdict")
            shown = "FAIL" if before == "FAIL" else outcome
            self._tests[report.nodeid] = {"test": report.nodeid, "verdict": shown, "reason": reason}
        if "rounds" in properties:
            name = properties["migration"]
            self._migrations[report.nodeid] = {"name": name, "rounds": properties["rounds"], "verdict": outcome}
        if "log_mode" in properties:
            row = properties | {"verdict": outcome, "reason": reason}
            if report.when == "call" or report.nodeid not in self._rows or outcome == "FAIL":
                self._rows[report.nodeid] = row

    def tests_blamed_for(self, title: str) -> list[str]:
        """The tests that saw a report of the kernel's log while they ran."""
        return self._tests_by_title.get(title, [])

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self._rows or self._tests or self.end:
            try:
                self._write()
            except OSError as error:  # that is no verdict on the kernel
                self.remarks.append(not_kept(self.shown_results, error))
        if session.exitstatus == pytest.ExitCode.OK:
            if self._nothing_ran:
                session.exitstatus = self.nothing_ran_status
            elif self._interrupted:
                session.exitstatus = pytest.ExitCode.INTERRUPTED
            elif self._unexplained:
                session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def _write(self) -> None:
        self._results.mkdir(parents=True, exist_ok=True)
        data = {
            "host": self.facts.host,
            "place": self.facts.place,
            "machine": self.facts.machine,
            "settings": self.facts.settings,
            "end": self.end,
            "kernel_log": self.facts.kernel_log or [vars(report) for report in self.kernel_reports],
            "cells": self._ordered_rows(),
            "tests": list(self._tests.values()),
            "migrations": self._migrations,
        }
        (self._results / "results.json").write_text(json.dumps(data, indent=1))

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        rows = self._ordered_rows()
        if rows:
            host = self.facts.host
            terminalreporter.section(
                f"dirty tracking on kernel {host['kernel']}, {host['backend']}: {self.facts.place}"
            )
            for line in table.format_table(rows):
                terminalreporter.line(line)
            terminalreporter.line("")
            for line in _known_bug_findings(rows):
                terminalreporter.line(line)
            terminalreporter.line(table.summary(rows))
            terminalreporter.line(f"files: {self.shown_results}")
        if self._migrations:
            terminalreporter.section("migrations: pages that each round copied, and milliseconds it took")
            for line in table.migration_lines([*self._migrations.values()]):
                terminalreporter.line(line)
        if self._caught:
            terminalreporter.section("planted faults: within how many iterations each was caught")
            for fault, within in sorted(self._caught.items()):
                terminalreporter.line(f"{fault}: {', '.join(sorted(within))}")
        if self.kernel_reports:
            self._show_kernel_reports(terminalreporter)
        if self._not_run:
            terminalreporter.section("not run: how many tests of which files, and why")
            for line in table.not_run_lines(self._not_run):
                terminalreporter.line(line)
            if self._not_on_kvm and not self.facts.machine:
                terminalreporter.line(
                    "a kernel of its own has what many of them need: make check-kernel KERNEL=debian:6.12"
                )
        if self._nothing_ran:
            reasons = "; ".join(dict.fromkeys(self._not_on_kvm)) or "none that was selected needs it"
            terminalreporter.line(f"NOTHING WAS TESTED: no test ran on KVM: {reasons}", red=True)
        for line in self.remarks:
            terminalreporter.line(line)

    def _show_kernel_reports(self, terminalreporter: pytest.TerminalReporter) -> None:
        terminalreporter.section("the kernel's log")
        for report in self.kernel_reports:
            while_running = f", while {' and '.join(report.tests)} ran" if report.tests else ", between tests"
            explained = f", known bug {report.known_bug}" if report.known_bug else ""
            terminalreporter.line(f"{report.kind}{explained}{while_running}:", red=not report.known_bug)
            # That of a test is in its own report.
            for line in report.lines[:1] if report.known_bug or report.tests else report.lines:
                terminalreporter.line(f"  {line}")

    @property
    def _unexplained(self) -> bool:
        return any(report.known_bug is None for report in self.kernel_reports)

    @property
    def _interrupted(self) -> bool:
        """Whether a planned test did not come to run."""
        return any(one["verdict"] == "not run" for one in (*self._rows.values(), *self._tests.values()))

    @property
    def _nothing_ran(self) -> bool:
        return not self._on_kvm and not self._interrupted and (bool(self._not_on_kvm) or self.must_test)

    def _ordered_rows(self) -> list[dict[str, Any]]:
        """The rows in the order of the plan: workers finish in any."""
        order = {tuple(cell.values()): index for index, cell in enumerate(self.facts.cells)}
        return sorted(
            self._rows.values(),
            key=lambda row: order.get(tuple(row[name] for name in table.DIMENSIONS), len(order)),
        )


def write_failure(results: Path, name: str, data: Any) -> None:
    """Keep all that is known of a failed test."""
    results.mkdir(parents=True, exist_ok=True)
    (results / f"{name}.json").write_text(json.dumps(data, indent=1))


def not_kept(results: Path | str, error: OSError) -> str:
    """What to say when *results* cannot be written."""
    return f"THE RESULTS ARE NOT KEPT: {results}: {error.strerror} (--results DIR puts them elsewhere)"


def _known_bug_findings(rows: Sequence[dict[str, Any]]) -> list[str]:
    lines = []
    for row in rows:
        if row["verdict"] == "known bug":
            lines.append(f"{row['reason']} in {' '.join(str(row[name]) for name in table.DIMENSIONS)}:")
            lines += [f"  {finding}" for finding in row.get("findings", "").splitlines()]
    return lines


def verdict(report: pytest.TestReport, properties: dict[str, Any]) -> tuple[str, str]:
    """A test's verdict as the table shows it, and the reason where there is one."""
    if hasattr(report, "wasxfail"):
        return "known bug", report.wasxfail.removeprefix("reason: ")
    if report.outcome == "skipped":
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        return properties.get("verdict", "skipped"), reason.removeprefix("Skipped: ").removeprefix("not run: ")
    if report.outcome == "failed":
        return "FAIL", properties.get("kernel_log", "")
    return properties.get("verdict", "pass"), ""
