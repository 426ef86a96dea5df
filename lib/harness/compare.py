# SPDX-License-Identifier: GPL-2.0-only
"""Compares runs by their ``results.json``: what fails now, is fixed, shows a known bug or did not run, and which times moved.

``make compare BASE=results/a NEW=results/b`` calls it.
"""

import argparse
import json
import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple

from harness.figure_changes import FEWEST_RUNS, Moved, common_figures, moved_figures
from harness.kernel_verdict import describe_system
from harness.rejudge import judged_anew
from harness.run_report import FILES_OF_A_RUN
from harness.table import DIMENSIONS, UNTESTED, VERDICTS
from harness.toml_file import TomlError
from kvm_util.wording import counted
from runner.boot_outcome import BootOutcome

_RESULTS = FILES_OF_A_RUN[0]
_NUMBER = re.compile(r"0x[0-9a-f]+|\d+")
# Of a test's verdicts in several runs of a kernel, the first of these counts.
_WORST_FIRST = ("FAIL", "known bug", "known bug, not seen", "pass", "not run", "skipped")
_MATRIX = "selftests/matrix/test_dirty_log.py::test_dirty_log"


class CompareError(Exception):
    """Runs cannot be compared; the message says which and why."""


class Change(Enum):
    """How a test's verdict differs between two runs; each value is the title of its list, worst first."""

    FAILS = "newly failing"
    STILL_FAILS = "failing as before"
    BUG = "newly with a known bug"
    SKIPPED = "no longer run"
    VANISHED = "not there any more"
    FIXED = "fixed"
    BUG_GONE = "no longer with a known bug"
    RUNS = "newly run"
    APPEARED = "new"


class Result(NamedTuple):
    """A test's verdict, as in ``table.VERDICTS``, and its reason."""

    verdict: str
    reason: str

    @property
    def ran(self) -> bool:
        """Whether the test ran."""
        return self.verdict not in UNTESTED


@dataclass(frozen=True)
class SavedRun:
    """A run as its results have it, or several of the same kernel as one.

    :ivar name: the folder, as the user wrote it
    :ivar system: kernel, backend and where it ran
    :ivar parameters: the parameters of KVM's modules
    :ivar tests: the result of each test on KVM, by its id; of several runs, the worst
    :ivar log_reports: reports in the kernel's log that no known bug explains, without the numbers in them
    :ivar death: how the booted kernel ended, if that is its fault; else empty
    :ivar figures: of each run that measured the costs of dirty logging: milliseconds, by phase and scenario
    :ivar machines: on what they were measured, in words
    """

    name: str
    system: str
    parameters: dict[str, str]
    tests: dict[str, Result]
    log_reports: set[str]
    death: str
    figures: list[dict[str, float]]
    machines: set[str]

    @classmethod
    def load(cls, folder: Path, rejudge: bool = False) -> "SavedRun":
        """Load the run in *folder*, or the runs in the folders that are in it.

        :param rejudge: with the verdicts that they have by today's list of known bugs
        :raises CompareError: there is none, or they are not of one kernel
        """
        several = [] if (folder / _RESULTS).exists() else sorted(folder.glob(f"*/{_RESULTS}"))
        folders = [path.parent for path in several] or [folder]
        first, *others = [cls._load_one(one, rejudge) for one in folders]
        for run in others:
            if (run.system, run.parameters) != (first.system, first.parameters):
                raise CompareError(
                    f"{folder}: {first.name} and {run.name} are not runs of the same kernel and parameters"
                )
            for test, result in run.tests.items():
                results = (first.tests.get(test, result), result)
                first.tests[test] = min(results, key=lambda one: _WORST_FIRST.index(one.verdict))
            first.log_reports.update(run.log_reports)
            first.figures.extend(run.figures)
            first.machines.update(run.machines)
        death = next((run.death for run in [first, *others] if run.death), "")
        if not any(result.ran for result in first.tests.values()):
            raise CompareError(f"{folder}: no test ran on KVM")
        return replace(first, name=str(folder), death=death)

    @classmethod
    def _load_one(cls, folder: Path, rejudge: bool) -> "SavedRun":
        path = folder / _RESULTS
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            if rejudge:
                data = judged_anew(folder, data)
            host, machine = data["host"], data["machine"]
            cells = {f"{_MATRIX}[{_cell_id(cell)}]": cell for cell in data["cells"]}
            rows = {**cells, **{test["test"]: test for test in data["tests"]}}
            tests = {test: Result(row["verdict"], row["reason"] or "") for test, row in rows.items()}
            if others := {result.verdict for result in tests.values()}.difference(VERDICTS):
                raise ValueError(f"no such verdicts: {others}")
            reports = data["kernel_log"] if isinstance(data["kernel_log"], list) else []
            # CPU, PID, line and address differ between two runs.
            titles = {_NUMBER.sub("N", report["title"]) for report in reports if report["known_bug"] is None}
            end = BootOutcome[data["end"]["ending"]] if data["end"] else BootOutcome.FINISHED
            death = end.value if end.exit_status == 1 else ""
            costs = data.get("costs", {})  # results of older versions have none
            figures = [_figures(costs)] if costs else []
            machines = {_machine(host, machine)} if costs else set()
            system = describe_system(host, machine)
            return cls(str(folder), system, dict(host["parameters"]), tests, titles, death, figures, machines)
        except OSError as error:
            raise CompareError(f"{error.filename}: {error.strerror}") from None
        except TomlError as error:
            raise CompareError(str(error)) from None
        except (ValueError, LookupError, TypeError, AttributeError):
            what = f"{path} is no {_RESULTS} of a run" + (
                ", or a file of a failure beside it is damaged" if rejudge else ""
            )
            raise CompareError(what) from None

    @property
    def is_bad(self) -> bool:
        """Whether a test failed, the kernel died, or its log has a report."""
        return bool(any(one.verdict == "FAIL" for one in self.tests.values()) or self.log_reports or self.death)

    @property
    def cut_short(self) -> int:
        """How many of its tests did not run because it ended before them."""
        return sum(result.verdict == "not run" for result in self.tests.values())


def _cell_id(cell: Mapping[str, Any]) -> str:
    *names, vcpus = (str(cell[name]) for name in DIMENSIONS)
    return "-".join([*names, f"{vcpus}vcpu{'' if vcpus == '1' else 's'}"])


def _figures(costs: Mapping[str, Sequence[Mapping[str, float]]]) -> dict[str, float]:
    """Of each phase of each scenario the least time of its rounds, in milliseconds: other load only makes one longer."""
    return {
        f"{phase}, {scenario}": min(float(times[phase]) for times in rounds)
        for scenario, rounds in costs.items()
        for phase in rounds[0]
    }


def _machine(host: Mapping[str, Any], machine: Mapping[str, Any]) -> str:
    """What decides how fast everything is, but for the kernel."""
    emulator = [f"QEMU {machine['qemu']} {machine['accel']}", f"{machine['machines']} at once"] if machine else []
    return ", ".join([*emulator, str(host["cpu"]), counted(host["cpus"], "CPU")])


def changes(base: SavedRun, new: SavedRun) -> dict[Change, list[str]]:
    """The tests whose verdicts differ, or that fail in both runs, by change; sorted."""
    found: dict[Change, list[str]] = {change: [] for change in Change}
    for test in sorted(base.tests.keys() | new.tests.keys()):
        change = _change(base.tests.get(test), new.tests.get(test))
        if change is not None:
            found[change].append(test)
    return found


def _change(before: Result | None, now: Result | None) -> Change | None:
    if now is None:
        return Change.VANISHED
    if now.verdict == "FAIL":
        return Change.STILL_FAILS if before is not None and before.verdict == "FAIL" else Change.FAILS
    if before is None:
        return Change.APPEARED
    if now.ran != before.ran:
        return Change.RUNS if now.ran else Change.SKIPPED
    if before.verdict == "FAIL":
        return Change.FIXED
    # One that shows only sometimes, and did not, is no change.
    if now.verdict == "known bug" and before.verdict == "pass":
        return Change.BUG
    return Change.BUG_GONE if before.verdict == "known bug" and now.verdict == "pass" else None


@dataclass(frozen=True)
class Comparison:
    """How a run differs from the base.

    :ivar tests: the tests whose verdicts differ, or that fail in both, by change
    :ivar moved: the times that differ
    :ivar steady: how many of them do not
    :ivar not_compared: why times are not compared, if both runs have some; else empty
    """

    base: SavedRun
    new: SavedRun
    tests: dict[Change, list[str]]
    moved: list[Moved]
    steady: int
    not_compared: str

    @classmethod
    def of(cls, base: SavedRun, new: SavedRun) -> "Comparison":
        """Compare two runs.

        :raises CompareError: there are times to compare, and no scipy
        """
        tests, not_compared = changes(base, new), _why_no_figures(base, new)
        names = [] if not_compared else common_figures(base.figures, new.figures)
        try:
            moved = moved_figures(base.figures, new.figures) if names else []
        except ImportError as error:
            raise CompareError(f"times are compared by scipy: {error} (make .venv/analysis installs it)") from None
        return cls(base, new, tests, moved, len(names) - len(moved), not_compared)

    @property
    def is_regression(self) -> bool:
        """Whether a test newly fails, the kernel newly dies, its log newly has a report, or something takes longer.

        A known bug that shows is no failure, as in a run.
        """
        newly_dies = self.new.death and not self.base.death
        slower = any(figure.rose for figure in self.moved)
        return bool(self.tests[Change.FAILS] or self.new.log_reports - self.base.log_reports or newly_dies or slower)

    @property
    def incomplete(self) -> bool:
        """Whether tests of the new run did not run, or times of several runs could not be compared."""
        several = max(len(self.base.figures), len(self.new.figures)) > 1
        return bool(self.new.cut_short or (self.not_compared and several))

    def lines(self, all_tests: bool) -> list[str]:
        """The differences in words, worst first; cases of a test with the same reason share a line, unless *all_tests*."""
        base, new = self.base, self.new
        text = [f"base {base.name}: {_system(base, new)}", f"new  {new.name}: {_system(new, base)}"]
        if new.death:
            text.append(f"{new.death}{', as before' if base.death else ''}")
        text += [f"the kernel's log newly has: {title}" for title in sorted(new.log_reports - base.log_reports)]
        for change, tests in self.tests.items():
            if tests:
                text.append(f"{change.value} ({counted(len(tests), 'test')}):")
                each = [(test, _why(change, test, base, new)) for test in tests]
                if all_tests:
                    text += [f"  {test}{why}" for test, why in each]
                else:
                    cases = Counter((test.partition("[")[0], why) for test, why in each)
                    text += [
                        f"  {test}{f', {count} cases' if count > 1 else ''}{why}"
                        for (test, why), count in cases.items()
                    ]
        same = len(base.tests.keys() | new.tests.keys()) - sum(map(len, self.tests.values()))
        return [*text, f"{counted(same, 'test')} as before", *self._figure_lines(), self._verdict()]

    def _figure_lines(self) -> list[str]:
        if self.not_compared:
            return [f"times are not compared: {self.not_compared}"]
        runs = f"{len(self.base.figures)} and {len(self.new.figures)} runs"
        text = []
        for title, those in (
            ("slower", [figure for figure in self.moved if figure.rose]),
            ("faster", [figure for figure in self.moved if not figure.rose]),
        ):
            text += [f"{title} ({counted(len(those), 'time')}; medians of {runs}, in ms):"] if those else []
            text += [f"  {figure}" for figure in those]
        return [*text, f"{counted(self.steady, 'time')} as before ({runs})"] if self.moved or self.steady else text

    def _verdict(self) -> str:
        if self.is_regression:
            return "REGRESSION"
        if self.new.cut_short:
            return f"no regression in what ran: {counted(self.new.cut_short, 'test')} of {self.new.name} did not run"
        return "no regression" + (" in the verdicts" if self.incomplete else "")


def _why_no_figures(base: SavedRun, new: SavedRun) -> str:
    """Why the times of two runs cannot be compared; empty if they can, or one of them has none."""
    counts = len(base.figures), len(new.figures)
    if not all(counts):
        return ""
    if min(counts) < FEWEST_RUNS:
        return f"{FEWEST_RUNS} runs of each are needed, and there are {counts[0]} and {counts[1]} (docs/results.md, 'Times')"
    machines = sorted(base.machines | new.machines)
    return f"not all runs were on the same machine: {'; '.join(machines)}" if len(machines) > 1 else ""


def _system(run: SavedRun, other: SavedRun) -> str:
    """What ran, with the parameters that have another value in the *other* run."""
    theirs = run.parameters | other.parameters
    return ", ".join(
        [run.system, *(f"{name}={value}" for name, value in run.parameters.items() if theirs[name] != value)]
    )


def _why(change: Change, test: str, base: SavedRun, new: SavedRun) -> str:
    of_new = change in (Change.FAILS, Change.STILL_FAILS, Change.BUG, Change.SKIPPED)
    result = (new if of_new else base).tests.get(test)
    return f": {result.reason}" if result is not None and result.reason else ""


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare the runs that the command line names; returns 1 if there is a regression, 2 if they cannot be compared."""
    parser = argparse.ArgumentParser(prog="compare", description=__doc__)
    parser.add_argument("base", type=Path, metavar="BASE", help="the results folder of a run, or a folder of several")
    parser.add_argument("new", type=Path, metavar="NEW", nargs="*", help="those of runs to compare with it")
    parser.add_argument(
        "--rejudge",
        action="store_true",
        help="with the verdicts by today's known_bugs.toml; without NEW: what they change",
    )
    parser.add_argument("--all", action="store_true", help="name each case of a test")
    options = parser.parse_args(arguments)
    if not options.new and not options.rejudge:
        parser.error("NEW is missing")
    try:
        if not options.new:
            return _show_rejudged(options.base, options.all)
        base, *others = (SavedRun.load(folder, options.rejudge) for folder in [options.base, *options.new])
        found = [Comparison.of(base, new) for new in others]
    except CompareError as error:
        print(f"compare: {error}", file=sys.stderr)
        return 2
    print("\n\n".join("\n".join(comparison.lines(options.all)) for comparison in found))
    if any(comparison.is_regression for comparison in found):
        return 1
    return 2 if any(comparison.incomplete for comparison in found) else 0


def _show_rejudged(folder: Path, all_tests: bool) -> int:
    """Print what today's list of known bugs changes in the verdicts of a run; returns 1 if it is bad."""
    base, new = (replace(SavedRun.load(folder, rejudge), figures=[]) for rejudge in (False, True))
    *lines, _ = Comparison.of(base, replace(new, name=f"{new.name}, judged by today's known_bugs.toml")).lines(
        all_tests
    )
    left = f"no verdict: {counted(new.cut_short, 'test')} did not run" if new.cut_short else "good"
    print("\n".join([*lines, "bad" if new.is_bad else left]))
    return 1 if new.is_bad else 2 if new.cut_short else 0


if __name__ == "__main__":
    sys.exit(main())
