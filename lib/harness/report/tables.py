# SPDX-License-Identifier: GPL-2.0-only
"""The report's tables: a row for each cell, area or test, and a column for each run."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from dirty_tracking.cell import Cell
from harness.report.saved import ReportedRun
from harness.saved_run import Result
from harness.table import VERDICTS, counts_of_tests

# The verdict that stands for several, worst first: a test that the host cannot run says less than one that passed.
_WORST_FIRST = ("FAIL", "known bug", "not run", "known bug, not seen", "pass", "skipped")

# Tests of a run, by their ids
Tests = dict[str, Result]


class Count(NamedTuple):
    """What a field of a table shows: the verdict that decides its colour, and a text."""

    verdict: str
    text: str


@dataclass(frozen=True)
class Row:
    """A row: its name, and a field for each run, None where the run has nothing."""

    name: str
    fields: Sequence[Count | None]


def cells_of(runs: Sequence[ReportedRun]) -> list[Cell]:
    """All cells, in the order of the first run that has them."""
    return list(dict.fromkeys(cell for run in runs for cell in run.cells))


def by_area(runs: Sequence[ReportedRun]) -> dict[str, list[Tests]]:
    """The tests of each run by area, which is the folder below ``selftests/``; the areas are sorted."""
    areas: dict[str, list[Tests]] = {}
    for number, run in enumerate(runs):
        for test, result in run.tests.items():
            area = test.removeprefix("selftests/").partition("/")[0]
            areas.setdefault(area, [{} for _ in runs])[number][test] = result
    return dict(sorted(areas.items()))


def area_row(area: str, tests: Sequence[Tests]) -> Row:
    """The row of an area: how many of its tests, which are given for each run, have which verdict."""
    counts = [Counter(result.verdict for result in those.values()) for those in tests]
    return Row(area, [_field(verdicts, counts_of_tests) for verdicts in counts])


def function_rows(tests: Sequence[Tests]) -> list[Row]:
    """A row for each test function of an area, sorted."""
    of_runs = [_by_function(those) for those in tests]
    return [
        Row(function, [_field(verdicts.get(function), _short) for verdicts in of_runs])
        for function in sorted(set().union(*of_runs))
    ]


def reasons(tests: Sequence[Tests]) -> dict[tuple[str, str], dict[str, int]]:
    """Why tests of an area did not pass: by verdict and reason, in how many cases of which function.

    The number is the largest of the runs.
    """
    found: dict[tuple[str, str], dict[str, int]] = {}
    for those in tests:
        counts = Counter((result, _function(test)) for test, result in those.items() if result.reason)
        for ((verdict, reason), function), count in counts.items():
            functions = found.setdefault((verdict, reason), {})
            functions[function] = max(count, functions.get(function, 0))
    return dict(sorted(found.items(), key=lambda item: (VERDICTS.index(item[0][0]), item[0][1])))


def _function(test: str) -> str:
    """File and function of the test with this id, without its area."""
    return test.partition("[")[0].removeprefix("selftests/").partition("/")[2]


def _by_function(tests: Tests) -> dict[str, Counter[str]]:
    functions: dict[str, Counter[str]] = {}
    for test, result in tests.items():
        functions.setdefault(_function(test), Counter())[result.verdict] += 1
    return functions


def _field(verdicts: Counter[str] | None, words: Callable[[Counter[str]], str]) -> Count | None:
    return Count(_worst(verdicts), words(verdicts)) if verdicts else None


def _worst(verdicts: Iterable[str]) -> str:
    return min(verdicts, key=_WORST_FIRST.index)


def _short(verdicts: Counter[str]) -> str:
    """The worst verdict, and of how many cases."""
    worst = _worst(verdicts)
    count, total = verdicts[worst], verdicts.total()
    return worst if total == 1 else f"{worst} {count}" if count == total else f"{worst} {count} of {total}"
