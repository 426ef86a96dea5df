# SPDX-License-Identifier: GPL-2.0-only
"""Compares the verdicts of runs, by their ``results.json``: what fails now, is fixed, shows a known bug, or did not run.

``make compare BASE=results/a NEW=results/b`` calls it.
"""

import argparse
import json
import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple

from harness.kernel_verdict import describe_system
from harness.run_report import FILES_OF_A_RUN
from harness.table import DIMENSIONS, UNTESTED
from kvm_util.wording import counted
from runner.boot_outcome import BootOutcome

_RESULTS = FILES_OF_A_RUN[0]
_NUMBER = re.compile(r"0x[0-9a-f]+|\d+")
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
    """A run as its results have it.

    :ivar name: the folder, as the user wrote it
    :ivar system: kernel, backend and where it ran
    :ivar tests: the result of each test on KVM, by its id
    :ivar log_reports: reports in the kernel's log that no known bug explains, without the numbers in them
    :ivar death: how the booted kernel ended, if that is its fault; else empty
    """

    name: str
    system: str
    tests: dict[str, Result]
    log_reports: set[str]
    death: str

    @classmethod
    def load(cls, folder: Path) -> "SavedRun":
        """Load the run in *folder*.

        :raises CompareError: there is none
        """
        path = folder / _RESULTS
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            cells = {f"{_MATRIX}[{_cell_id(cell)}]": cell for cell in data["cells"]}
            rows = {**cells, **{test["test"]: test for test in data["tests"]}}
            tests = {test: Result(row["verdict"], row["reason"] or "") for test, row in rows.items()}
            reports = data["kernel_log"] if isinstance(data["kernel_log"], list) else []
            # CPU, PID, line and address differ between two runs.
            titles = {_NUMBER.sub("N", report["title"]) for report in reports if report["known_bug"] is None}
            end = BootOutcome[data["end"]["ending"]] if data["end"] else BootOutcome.FINISHED
            death = end.value if end.exit_status == 1 else ""
            run = cls(str(folder), describe_system(data["host"], data["machine"]), tests, titles, death)
        except OSError as error:
            raise CompareError(f"{path}: {error.strerror}") from None
        except (ValueError, KeyError, TypeError, AttributeError):
            raise CompareError(f"{path} is no {_RESULTS} of a run") from None
        if not any(result.ran for result in tests.values()):
            raise CompareError(f"{folder}: no test ran on KVM")
        return run

    @property
    def cut_short(self) -> int:
        """How many of its tests did not run because it ended before them."""
        return sum(result.verdict == "not run" for result in self.tests.values())


def _cell_id(cell: Mapping[str, Any]) -> str:
    *names, vcpus = (str(cell[name]) for name in DIMENSIONS)
    return "-".join([*names, f"{vcpus}vcpu{'' if vcpus == '1' else 's'}"])


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


def is_regression(base: SavedRun, new: SavedRun, found: Mapping[Change, Sequence[str]]) -> bool:
    """Whether a test newly fails, the kernel newly dies, or its log has a report that it had not before.

    A known bug that shows is no failure, as in a run.
    """
    return bool(found[Change.FAILS] or new.log_reports - base.log_reports or (new.death and not base.death))


def lines(base: SavedRun, new: SavedRun, found: Mapping[Change, Sequence[str]], all_tests: bool) -> list[str]:
    """The differences in words, worst first; cases of a test with the same reason share a line, unless *all_tests*."""
    text = [f"base {base.name}: {base.system}", f"new  {new.name}: {new.system}"]
    if new.death:
        text.append(f"{new.death}{', as before' if base.death else ''}")
    text += [f"the kernel's log newly has: {title}" for title in sorted(new.log_reports - base.log_reports)]
    for change, tests in found.items():
        if tests:
            text.append(f"{change.value} ({counted(len(tests), 'test')}):")
            each = [(test, _why(change, test, base, new)) for test in tests]
            if all_tests:
                text += [f"  {test}{why}" for test, why in each]
            else:
                cases = Counter((test.partition("[")[0], why) for test, why in each)
                text += [
                    f"  {test}{f', {count} cases' if count > 1 else ''}{why}" for (test, why), count in cases.items()
                ]
    same = len(base.tests.keys() | new.tests.keys()) - sum(map(len, found.values()))
    text.append(f"{counted(same, 'test')} as before")
    if is_regression(base, new, found):
        return [*text, "REGRESSION"]
    if new.cut_short:
        return [*text, f"no regression in what ran: {counted(new.cut_short, 'test')} of {new.name} did not run"]
    return [*text, "no regression"]


def _why(change: Change, test: str, base: SavedRun, new: SavedRun) -> str:
    of_new = change in (Change.FAILS, Change.STILL_FAILS, Change.BUG, Change.SKIPPED)
    result = (new if of_new else base).tests.get(test)
    return f": {result.reason}" if result is not None and result.reason else ""


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare the runs that the command line names; returns 1 if there is a regression, 2 if they cannot be compared."""
    parser = argparse.ArgumentParser(prog="compare", description=__doc__)
    parser.add_argument("base", type=Path, metavar="BASE", help="the results folder of a run")
    parser.add_argument("new", type=Path, metavar="NEW", nargs="+", help="those of runs to compare with it")
    parser.add_argument("--all", action="store_true", help="name each case of a test")
    options = parser.parse_args(arguments)
    try:
        base, *others = map(SavedRun.load, [options.base, *options.new])
    except CompareError as error:
        print(f"compare: {error}", file=sys.stderr)
        return 2
    regressed = cut_short = False
    for new in others:
        found = changes(base, new)
        regressed |= is_regression(base, new, found)
        cut_short |= bool(new.cut_short)
        print("\n".join(lines(base, new, found, options.all)), end="\n\n" if new is not others[-1] else "\n")
    return 1 if regressed else 2 if cut_short else 0


if __name__ == "__main__":
    sys.exit(main())
