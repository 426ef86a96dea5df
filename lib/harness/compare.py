# SPDX-License-Identifier: GPL-2.0-only
"""Compares runs by their ``results.json``: what fails now, is fixed, shows a known bug or did not run, and which times moved.

``make compare BASE=results/a NEW=results/b`` calls it.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path

from harness.figure_changes import FEWEST_RUNS, Moved, common_figures, moved_figures
from harness.saved_run import CompareError, Result, SavedRun
from kvm_util.wording import counted


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
