# SPDX-License-Identifier: GPL-2.0-only
"""Collects the test reports of a run and produces the summary, the results files, the verdict and the exit status."""

import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import pytest
from _pytest.terminal import TerminalReporter

from harness import table
from harness.interruption import Interruption
from harness.kernel_options import OWN_TESTS
from harness.kernel_verdict import RunSummary, Verdict, describe_system, verdict_on_kernel
from harness.screen import Screen
from harness.version import suite_version
from kvm_util.wording import counted
from runner import ROOT

_RESULTS, _TABLE = FILES_OF_A_RUN = ("results.json", "table.txt")
# Why pytest stopped before all tests had run, by its exit status
_STOPPED: dict[int, str] = {
    pytest.ExitCode.INTERRUPTED: "interrupted",
    pytest.ExitCode.INTERNAL_ERROR: "ended by an error of the suite",
}


@dataclass
class Facts:
    """What a run tests and where, as plain data for JSON.

    :ivar host: the fields of ``kvm_util.host.Host``
    :ivar cells: the planned cells, in the order of the table
    :ivar place: where the kernel runs, in words
    :ivar kernel_log: why the kernel log is not watched; None if it is
    :ivar taint: the taint flags that were set before the run, in words, or that they are not watched
    :ivar machine: the QEMU machine; empty on this host
    """

    host: dict[str, Any]
    settings: dict[str, Any]
    cells: list[dict[str, Any]]
    place: str = "this host's own"
    kernel_log: str | None = None
    taint: list[str] = field(default_factory=list)
    machine: dict[str, Any] = field(default_factory=dict)

    def properties(self) -> dict[str, str]:
        """What tells one run from another, by name, for a JUnit file; of a kernel that has not booted less is known."""
        machine = {name: str(self.machine[name]) for name in ("qemu", "accel") if self.machine}
        return {
            "suite": suite_version(),
            **{name: str(self.host[name]) for name in ("kernel", "backend", "cpu") if name in self.host},
            **self.host["parameters"],
            **{name: str(self.settings[name]) for name in ("seed", "iterations", "test_mem", "ring_count")},
            "place": self.place,
            **machine,
        }


@dataclass(frozen=True)
class KernelReport:
    """A report of the kernel (``runner.kernel_log.Splat``) with what is known about it.

    :ivar known_bug: id of the known bug that explains it; None if none does
    :ivar tests: ids of the tests that were running
    :ivar log: the file in the results folder with this kernel's log; empty on this host
    """

    kind: str
    title: str
    lines: list[str]
    known_bug: str | None
    tests: list[str]
    log: str = ""


class RunReport:
    """A pytest plugin that follows a run through its test reports.

    :ivar results: the run's folder
    :ivar kernel_reports: reports of the kernel; to be filled before the session ends
    :ivar notes: lines to print at the end of the summary
    :ivar end: how the booted kernel ended, for the results file; empty on this host
    :ivar kept: whether the run's folder contains files
    :ivar requires_kvm_tests: whether a run in which no test ran on KVM is unsuccessful even if no selected test needs KVM
    :ivar nothing_ran_status: the exit status of a run in which no test ran on KVM
    """

    def __init__(self, results: Path, facts: Facts) -> None:
        self.shown_results = results.relative_to(ROOT) if results.is_relative_to(ROOT) else results
        self.facts = facts
        self.kernel_reports: list[KernelReport] = []
        self.notes: list[str] = []
        self.end: dict[str, Any] = {}
        self.kept = False
        self.requires_kvm_tests = False
        self.nothing_ran_status: int = pytest.ExitCode.NO_TESTS_COLLECTED
        self.results = results
        self._session: pytest.Session | None = None
        self._uncollected: set[str] = set()
        self._tests: dict[str, dict[str, Any]] = {}  # properties, verdict and reason of each test, by its id
        self._tests_by_title: dict[str, list[str]] = {}

    def pytest_sessionstart(self, session: pytest.Session) -> None:
        self._session = session

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.outcome == "passed":
            return
        properties: dict[str, Any] = dict(report.user_properties)
        outcome, reason = verdict(report, properties)
        # What comes first is the verdict, unless something fails later.
        if outcome == "FAIL" or report.nodeid not in self._tests:
            self._tests[report.nodeid] = properties | {"test": report.nodeid, "verdict": outcome, "reason": reason}
        for name, value in report.user_properties:
            if name == "kernel_log":
                self._tests_by_title.setdefault(str(value), []).append(report.nodeid)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._uncollected.add(report.nodeid)

    def tests_that_saw(self, title: str) -> list[str]:
        """Ids of the tests during which the kernel log report *title* appeared."""
        return self._tests_by_title.get(title, [])

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if any(test.get("kvm") for test in self._tests.values()) or self.end:
            try:
                self._write()
            except OSError as error:  # says nothing about the kernel
                self.notes.append(not_kept(self.shown_results, error))
        if session.exitstatus == pytest.ExitCode.OK:
            if self._nothing_ran:
                session.exitstatus = self.nothing_ran_status
            elif self._interrupted:
                session.exitstatus = pytest.ExitCode.INTERRUPTED
            elif any(report.known_bug is None for report in self.kernel_reports):
                session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def _write(self) -> None:
        self.results.mkdir(parents=True, exist_ok=True)
        data = {
            "suite": suite_version(),
            "host": self.facts.host,
            "place": self.facts.place,
            "machine": self.facts.machine,
            "settings": self.facts.settings,
            "end": self.end,
            "kernel_log": [vars(report) for report in self.kernel_reports] or self.facts.kernel_log or [],
            "taint": self.facts.taint,
            "cells": self._cells(),
            "tests": [{name: test[name] for name in ("test", "verdict", "reason")} for test in self._others()],
            "migrations": {
                test["test"]: {"name": test["migration"], "rounds": test["rounds"], "verdict": test["verdict"]}
                for test in self._migrations()
            },
            "costs": {test["cost"]: test["cost_rounds"] for test in self._tests.values() if "cost" in test},
        }
        write_to_disk(self.results / _RESULTS, json.dumps(data, indent=1))
        write_to_disk(self.results / _TABLE, "".join(f"{line}\n" for line in table.long_table(self._cells())))
        self.kept = True

    def pytest_terminal_summary(self, terminalreporter: TerminalReporter) -> None:
        screen = Screen(terminalreporter)
        verbose = terminalreporter.config.get_verbosity() > 0
        tests, cells = self._tests.values(), self._cells()
        if cells:
            self._show_cells(screen, cells, verbose)
        if bugs := _known_bugs(self._others()):
            screen.section("known bugs in the other tests" if cells else "known bugs")
            for bug, those in bugs.items():
                screen.line(f"{bug} (described in known_bugs.toml):")
                for test, cases in Counter(row["test"].partition("[")[0] for row in those).items():
                    screen.line(f"  {test}" + (f", {cases} cases" if cases > 1 else ""))
        if migrations := self._migrations():
            screen.section("migrations: pages that each round copied (times: results.json)")
            for line in table.migration_lines(migrations):
                screen.line(line)
        faulty = [test for test in tests if "fault" in test]
        if caught := sorted((test["fault"], f"{test['fault_in']} {test['caught_within']}") for test in faulty):
            screen.section("planted faults: within how many iterations each was caught")
            for fault, within in groupby(caught, key=itemgetter(0)):
                screen.line(f"{fault}: {', '.join(where for _, where in within)}")
        if self.kernel_reports:
            self._show_kernel_reports(screen)
        self._show_untested(screen)
        if self.facts.machine and self.facts.taint:  # on this host, the header has them
            screen.line(f"taint flags before the tests: {', '.join(self.facts.taint)}")
        for note in self.notes:
            if note.startswith(" "):
                screen.verbatim(note)
            else:
                screen.line(note)

    def show_verdict(self, terminalreporter: TerminalReporter, exit_status: int) -> None:
        """Print the run's last line: kernel, where it ran, verdict, counts, and where the files are."""
        if exit_status == pytest.ExitCode.USAGE_ERROR:
            return  # pytest has printed what is wrong with the command line
        judges, own = Counter[str](), Counter[str]()
        for test in self._tests.values():
            of_kernel = self.requires_kvm_tests or (test.get("kvm") and not test["test"].startswith(OWN_TESTS))
            (judges if of_kernel else own)[test["verdict"]] += 1
        summary = RunSummary(
            kernel=judges,
            own=own,
            planned=self._session.testscollected if self._session is not None else 0,
            uncollected=len(self._uncollected),
            stopped=self._stopped(terminalreporter.config, exit_status),
            kernel_reports=sum(report.known_bug is None for report in self.kernel_reports),
            end=self.end,
            untested=Counter(self._untested_on_kvm()) if self._nothing_ran else None,
        )
        word, text = verdict_on_kernel(summary)
        files = f"; files: {self.shown_results}" if self.kept else ""
        failed = word in (Verdict.BAD, Verdict.CANNOT) or bool(summary.own["FAIL"])
        green = word is Verdict.GOOD and not failed
        screen = Screen(terminalreporter)
        screen.line()
        screen.line(
            f"{describe_system(self.facts.host, self.facts.machine)}: {text}{files}",
            bold=True,
            red=failed,
            green=green,
        )

    def _stopped(self, config: pytest.Config, exit_status: int) -> str:
        """Why the run stopped early, in a word; empty if it did not.

        With xdist, pytest uses INTERRUPTED for --maxfail too.
        """
        interruption: Interruption | None = config.pluginmanager.get_plugin("interruption")
        by_signal = interruption is not None and interruption.name is not None
        if exit_status == pytest.ExitCode.INTERRUPTED and not by_signal:
            return "stopped"
        return _STOPPED.get(exit_status, "")

    def _show_cells(self, screen: Screen, rows: list[dict[str, Any]], verbose: bool) -> None:
        screen.section("dirty tracking, cell by cell")
        host = self.facts.host
        screen.line(f"kernel {host['kernel']}, {host['backend']}: {self.facts.place}")
        if any(row["verdict"] not in table.UNTESTED for row in rows):
            screen.line()
            for line in table.table_for(rows, screen.width, verbose):
                screen.row(line)
            screen.line()
        screen.line(table.summary(rows))
        for bug, cells in _known_bugs(rows).items():
            screen.line()
            screen.line(f"known bug {bug} (described in known_bugs.toml):")
            for row in cells:
                names = " ".join(str(row[name]) for name in table.DIMENSIONS[:-1])
                screen.line(f"  {names}, {counted(row['vcpus'], 'vCPU')}:")
                findings = str(row.get("findings", "")).splitlines()
                for finding in findings if verbose else findings[:1]:
                    screen.line(f"    {finding}")

    def _show_untested(self, screen: Screen) -> None:
        """List the tests that were skipped or not run, a line per reason."""
        untested: dict[str, dict[str, list[str]]] = {verdict: {} for verdict in reversed(table.UNTESTED)}
        for test in self._tests.values():
            if test["verdict"] in untested:
                untested[test["verdict"]].setdefault(test["reason"], []).append(test["test"])
        if not any(untested.values()):
            return
        screen.section("what did not run: how many tests, of which files, and why")
        for verdict, tests in untested.items():
            for line in table.untested_lines(tests, verdict):
                screen.line(line, indent="    ")
        if untested["skipped"] and self._untested_on_kvm() and not self.facts.machine:
            screen.line("many of them run in a booted kernel: make check-kernel KERNEL=debian:6.12")

    def _show_kernel_reports(self, screen: Screen) -> None:
        screen.section("the kernel's own reports: its log, and taint flags")
        for report in self.kernel_reports:
            while_running = f", while {' and '.join(report.tests)} ran" if report.tests else ", between tests"
            explained = f", known bug {report.known_bug}" if report.known_bug else ""
            where = f" ({report.log})" if self.facts.machine.get("machines", 1) > 1 else ""
            screen.line(
                f"{report.kind}{explained}{while_running}{where}:",
                red=not report.known_bug,
                yellow=bool(report.known_bug),
            )
            # A report during a test is shown in full with the test's failure.
            for line in report.lines[:1] if report.known_bug or report.tests else report.lines:
                screen.verbatim(f"  {line}")

    @property
    def _interrupted(self) -> bool:
        """Whether a planned test has not run."""
        return any(test["verdict"] == "not run" for test in self._tests.values())

    @property
    def _nothing_ran(self) -> bool:
        on_kvm = [test for test in self._tests.values() if test.get("kvm")]
        tested = any(test["verdict"] not in table.UNTESTED for test in on_kvm)
        return not tested and not self._interrupted and (bool(on_kvm) or self.requires_kvm_tests)

    def _untested_on_kvm(self) -> list[str]:
        """Why tests on KVM did not run, for each of them."""
        tests = self._tests.values()
        return [test["reason"] for test in tests if test.get("kvm") and test["verdict"] in table.UNTESTED]

    def _cells(self) -> list[dict[str, Any]]:
        """The cells of the matrix in the order of the plan; with workers, they arrive in any order."""
        order = {tuple(cell.values()): index for index, cell in enumerate(self.facts.cells)}
        return sorted(
            (test for test in self._tests.values() if "log_mode" in test),
            key=lambda test: order.get(tuple(test[name] for name in table.DIMENSIONS), len(order)),
        )

    def _others(self) -> list[dict[str, Any]]:
        """The other tests on KVM."""
        return [test for test in self._tests.values() if test.get("kvm") and "log_mode" not in test]

    def _migrations(self) -> list[dict[str, Any]]:
        return [test for test in self._tests.values() if "rounds" in test]


def write_failure(results: Path, name: str, data: Any) -> None:
    """Write *data* about a failed test to ``<results>/<name>.json``."""
    results.mkdir(parents=True, exist_ok=True)
    write_to_disk(results / f"{name}.json", json.dumps(data, indent=1))


def write_to_disk(path: Path, text: str) -> None:
    """Write a file, and return when its content is on disk: the kernel under test may be about to die."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def not_kept(results: Path | str, error: OSError, option: str = "--results DIR") -> str:
    """The line to print when *results* cannot be written."""
    return f"THE RESULTS ARE NOT KEPT: {results}: {error.strerror} ({option} puts them elsewhere)"


def _known_bugs(rows: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The rows with verdict "known bug", by the bug's id."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if row["verdict"] == "known bug":
            found.setdefault(row["reason"], []).append(row)
    return found


def verdict(report: pytest.TestReport, properties: dict[str, Any]) -> tuple[str, str]:
    """A test's verdict as in ``table.VERDICTS``, and its reason; the reason may be empty."""
    if hasattr(report, "wasxfail"):
        return "known bug", report.wasxfail.removeprefix("reason: ")
    if report.outcome == "skipped":
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        return properties.get("verdict", "skipped"), reason.removeprefix("Skipped: ").removeprefix("not run: ")
    if report.outcome == "failed":
        return "FAIL", properties.get("kernel_log", "") or properties.get("reason", "")
    return properties.get("verdict", "pass"), ""
