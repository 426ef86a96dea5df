# SPDX-License-Identifier: GPL-2.0-only
"""The page: what the template ``page.html`` is filled with."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, field
from itertools import groupby, zip_longest
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from dirty_tracking.cell import Cell
from harness.compare import Change, Comparison
from harness.report.plots import Plot, bar_plot, line_plot, logarithmic_line_plot
from harness.report.saved import CellRun, Problem, ReportedRun
from harness.report.tables import Count, Row, Tests, area_row, by_area, cells_of, function_rows, reasons
from harness.saved_run import Result
from kvm_util.wording import counted

# Failure reports take no more characters than these in all, so that the file stays small however much failed.
_MOST_CHARACTERS = 400_000
# No text has more lines than these.
_MOST_LINES = 40
_CALLS = ("get", "get_running", "clear", "clear_running", "harvest", "harvest_running", "reset", "reset_running")
_FIGURES = {
    "writes": "writes", "writes_per_second": "writes/s", "dirty": "dirty pages", "clean": "clean pages",
    "collections": "collections", "exits": "exits", "ring_full_exits": "ring full", "seconds": "seconds",
    "stalled_seconds": "stalled seconds",
}  # fmt: skip


@dataclass(frozen=True)
class Column:
    """A run: a column of the tables, and a section of its own.

    :ivar changes: how many tests changed compared with the first run, by change
    :ivar comparison: all changes, in lines
    """

    number: int
    run: ReportedRun
    regressed: bool = False
    changes: Mapping[Change, int] = field(default_factory=dict)
    comparison: Sequence[str] = ()

    @property
    def label(self) -> str:
        return f"run {self.number}"


@dataclass(frozen=True)
class ShownProblem:
    """A failure report with a place in the page.

    :ivar text: the first lines of the problem's text
    :ivar log: the first lines of the kernel's log
    """

    id: str
    column: Column
    problem: Problem
    text: Sequence[str]
    log: Sequence[str]


@dataclass(frozen=True)
class ShownCell:
    """A cell of the matrix, over all runs.

    :ivar runs: each column with its run of the cell, None if it has none
    :ivar command: what runs it again as in the first run that has it
    :ivar calls: the calls of KVM that it makes
    """

    id: str
    cell: Cell
    runs: Sequence[tuple[Column, CellRun | None]]
    command: str
    calls: Sequence[str]
    plots: Sequence[Plot]
    problems: Sequence[ShownProblem]

    @property
    def name(self) -> str:
        *names, vcpus = astuple(self.cell)
        return " ".join([*names, counted(vcpus, "vCPU")])


@dataclass(frozen=True)
class ShownArea:
    """An area of the tests, over all runs."""

    id: str
    row: Row
    functions: Sequence[Row]
    reasons: Mapping[tuple[str, str], Mapping[str, int]]
    problems: Sequence[ShownProblem]


def render(runs: Sequence[ReportedRun]) -> str:
    """The page about *runs*, one at least; the first one is the base of the comparison."""
    columns = [_column(number, run, runs[0]) for number, run in enumerate(runs, 1)]
    problems: dict[str, list[ShownProblem]] = {}
    for shown in _problems(columns):
        problems.setdefault(shown.problem.test, []).append(shown)
    cells = [_cell(f"c{number}", cell, columns, problems) for number, cell in enumerate(cells_of(runs), 1)]
    areas = [
        _area(f"a{number}", area, tests, problems, {run.test for shown in cells for _, run in shown.runs if run})
        for number, (area, tests) in enumerate(by_area(runs).items(), 1)
    ]
    all_shown = [shown for those in problems.values() for shown in those]
    folder = Path(__file__).parent
    environment = Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "count": _count, "cut": _cut, "groups": _groups, "number": _number, "svg": Markup, "verdict_class": _verdict_class
    }  # fmt: skip
    return environment.get_template("page.html").render(
        title=_title(runs),
        columns=columns,
        cells=cells,
        areas=areas,
        migrations=_migrations(columns),
        problems={(shown.column.number, shown.problem.test): shown.id for shown in all_shown},
        left_out=sum(len(run.problems) for run in runs) - len(all_shown),
        figures=_FIGURES,
        style=Markup((folder / "page.css").read_text(encoding="utf-8")),
    )


def _title(runs: Sequence[ReportedRun]) -> str:
    about = runs[0].facts["system"] if len(runs) == 1 else counted(len(runs), "run")
    return f"Dirty page tracking: {about}"


def _column(number: int, run: ReportedRun, base: ReportedRun) -> Column:
    if run is base or run.saved is None or base.saved is None:
        return Column(number, run)
    comparison = Comparison.of(base.saved, run.saved)
    return Column(
        number,
        run,
        comparison.is_regression,
        {change: len(tests) for change, tests in comparison.tests.items() if tests},
        _cut(comparison.lines(all_tests=False)),
    )


def _problems(columns: Sequence[Column]) -> Iterator[ShownProblem]:
    """The failure reports that are shown: as many as there is space for, of as many tests as possible."""
    of_tests: dict[str, list[tuple[Column, Problem]]] = {}
    for column in columns:
        for test, problem in column.run.problems.items():
            of_tests.setdefault(test, []).append((column, problem))
    left = _MOST_CHARACTERS
    rounds = zip_longest(*of_tests.values())
    for number, (column, problem) in enumerate((one for ones in rounds for one in ones if one), 1):
        shown = ShownProblem(
            f"p{number}",
            column,
            problem,
            _cut(problem.text),
            _cut(problem.log),
        )
        left -= sum(len(line) for lines in (shown.text, shown.log, problem.notes) for line in lines)
        left -= sum(len(row) for slot_map in problem.maps.values() for row in slot_map.rows) + 1000
        if left < 0:
            return
        yield shown


def _cell(id: str, cell: Cell, columns: Sequence[Column], problems: Mapping[str, Sequence[ShownProblem]]) -> ShownCell:
    runs = [(column, column.run.cells.get(cell)) for column in columns]
    known = {column.label: run for column, run in runs if run is not None}
    calls = [call for call in _CALLS if any(call in run.phases for run in known.values())]
    plots = []
    if dirty := {name: run.dirty for name, run in known.items() if run.dirty}:
        plots.append(line_plot("Dirty pages per iteration", "iteration", dirty))
    if fill := {name: run.ring_fill for name, run in known.items() if run.ring_fill}:
        plots.append(line_plot("Fullest ring per iteration, in percent", "iteration", fill))
    times = {name: [run.phases.get(call, {}).get("p99") or None for call in calls] for name, run in known.items()}
    if any(any(values) for values in times.values()):
        names = [call.replace("_", " ") for call in calls]
        plots.append(bar_plot("Latency of collections, 99th percentile, in ms", "call", names, times))
    first = next(iter(known.values()))
    return ShownCell(id, cell, runs, first.command, calls, plots, problems.get(first.test, []))


def _area(
    id: str, area: str, tests: Sequence[Tests], problems: Mapping[str, Sequence[ShownProblem]], of_cells: set[str]
) -> ShownArea:
    """An area with the failure reports of its tests that are no cells."""
    others = sorted(set().union(*tests) - of_cells)
    reports = [shown for test in others for shown in problems.get(test, [])]
    return ShownArea(id, area_row(area, tests), function_rows(tests), reasons(tests), reports)


def _migrations(columns: Sequence[Column]) -> list[Plot]:
    """How each migration converges."""
    names = dict.fromkeys(name for column in columns for name in column.run.migrations)
    series = {
        name: {column.label: column.run.migrations[name] for column in columns if name in column.run.migrations}
        for name in sorted(names)
    }
    return [logarithmic_line_plot(f"{name}: pages copied", "round", values, 0) for name, values in series.items()]


def _number(value: float | None) -> str:
    """A figure as a table shows it: counts in full, times and rates to three digits."""
    if value is None:
        return ""
    return f"{value:.3g}" if value < 100 and value != int(value) else str(round(value))


def _verdict_class(verdict: str) -> str:
    """The class that the style sheet colours."""
    return "v-" + verdict.lower().replace(",", "").replace(" ", "-")


def _count(result: Result) -> Count:
    """The field of a single test."""
    return Count(result.verdict, result.verdict)


def _cut(text: Sequence[str]) -> Sequence[str]:
    """The first lines of a text, and how many more there are."""
    more = len(text) - _MOST_LINES
    return text if more <= 0 else [*text[:_MOST_LINES], f"... and {counted(more, 'more line')}"]


def _groups(row: str) -> list[tuple[str, str]]:
    """The stretches of equal marks in a row of a slot map: the mark, and the stretch."""
    return [(mark, "".join(marks)) for mark, marks in groupby(row)]
