# SPDX-License-Identifier: GPL-2.0-only
"""The table that ends a run: a row per cell of the matrix."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

DIMENSIONS = ("log_mode", "guest_mode", "backing", "stop", "density", "vcpus")
_FIGURES = {
    "iterations": "iterations",
    "writes": "writes",
    "dirty": "dirty",
    "clean": "clean",
    "ring_full_exits": "ring full",
    "seconds": "seconds",
}
VERDICTS = ("pass", "FAIL", "known bug", "known bug, not seen", "skipped", "not run")

Row = Mapping[str, Any]


def format_table(rows: Sequence[Row]) -> list[str]:
    """The rows as aligned lines: dimensions, figures, verdict, and the reason of a verdict that has one."""
    header = [name.replace("_", " ") for name in DIMENSIONS] + list(_FIGURES.values()) + ["verdict"]
    lines = [header]
    for row in rows:
        figures = [_figure(row.get(name)) for name in _FIGURES]
        reason = f": {row['reason']}" if row.get("reason") else ""
        lines.append([str(row.get(name, "")) for name in DIMENSIONS] + figures + [f"{row['verdict']}{reason}"])
    widths = [max(len(line[column]) for line in lines) for column in range(len(header) - 1)]
    return ["  ".join([*_aligned(line, widths), line[-1]]) for line in lines]


def _aligned(line: Sequence[str], widths: Sequence[int]) -> list[str]:
    """A line's columns but the last, names to the left and numbers to the right."""
    names = len(DIMENSIONS) - 1  # the last dimension, vcpus, is a number
    return [
        text.ljust(width) if column < names else text.rjust(width)
        for column, (text, width) in enumerate(zip(line[:-1], widths, strict=True))
    ]


def summary(rows: Sequence[Row]) -> str:
    """How many cells there are of each verdict."""
    counts = Counter(row["verdict"] for row in rows)
    return f"{len(rows)} cells: " + ", ".join(f"{counts[verdict]} {verdict}" for verdict in VERDICTS if counts[verdict])


def migration_lines(migrations: Sequence[Row]) -> list[str]:
    """A line per migration: its name, verdict, and what each round copied and took."""
    width = max(len(str(one["name"])) for one in migrations)
    return [
        f"{one['name']:<{width}}  {one['verdict']:<4}  "
        + ", ".join(f"{done['copied']} in {done['ms']:.1f}" for done in one["rounds"])
        for one in migrations
    ]


def not_run_lines(tests: Mapping[str, Sequence[str]]) -> list[str]:
    """A line per reason for which tests did not run, the one that kept most from running first.

    :param tests: for each reason the tests' ids
    """
    lines = []
    for reason, ids in sorted(tests.items(), key=lambda item: -len(item[1])):
        files = dict.fromkeys(test.partition("::")[0].removeprefix("selftests/") for test in ids)
        lines.append(f"{len(ids):5} of {', '.join(files)}: {reason}")
    return lines


_SHORT = {"known bug": "bug", "known bug, not seen": "bug?", "skipped": "skip", "not run": "-"}


def cross_table(names: Sequence[str], runs: Sequence[Sequence[Row]]) -> list[str]:
    """The verdicts of several runs against the cells: a line per cell, and a column per run, headed by its name."""
    cells: dict[tuple[str, ...], dict[str, str]] = {}
    for name, rows in zip(names, runs, strict=True):
        for row in rows:
            cell = tuple(str(row[dimension]) for dimension in DIMENSIONS)
            cells.setdefault(cell, {})[name] = _SHORT.get(str(row["verdict"]), str(row["verdict"]))
    lines = [[name.replace("_", " ") for name in DIMENSIONS] + list(names)]
    return _left(lines + [[*cell, *(verdicts.get(name, "-") for name in names)] for cell, verdicts in cells.items()])


def cross_table_of_tests(names: Sequence[str], runs: Sequence[Sequence[Row]]) -> list[str]:
    """Which tests really ran where: a line per test function, and a column per run with how many of its cases passed.

    ``12 1k 2s 1F`` says: 12 passed, 1 showed a known bug (or may have), 2 were skipped, 1 failed.
    """
    counts: dict[str, dict[str, Counter[str]]] = {}
    for name, rows in zip(names, runs, strict=True):
        for row in rows:
            function = str(row["test"]).partition("[")[0].removeprefix("selftests/")
            counts.setdefault(function, {}).setdefault(name, Counter())[str(row["verdict"])] += 1
    lines = [["test", *names]]
    lines += [[function, *(_cases(columns.get(name)) for name in names)] for function, columns in counts.items()]
    return _left(lines)


def skipped_everywhere(runs: Sequence[Sequence[Row]]) -> list[str]:
    """The tests that ran in none of several runs, with the reason that the first one gave."""
    reasons = {str(row["test"]): str(row["reason"]) for rows in reversed(runs) for row in rows}
    ran = {str(row["test"]) for rows in runs for row in rows if row["verdict"] != "skipped"}
    return [f"{test}: {reason}" for test, reason in reasons.items() if test not in ran]


def _cases(verdicts: Counter[str] | None) -> str:
    if verdicts is None:
        return "-"
    letters = {"pass": "", "known bug": "k", "known bug, not seen": "k", "skipped": "s", "FAIL": "F"}
    counts: Counter[str] = Counter()
    for verdict, number in verdicts.items():
        counts[letters[verdict]] += number
    return " ".join(f"{counts[letter]}{letter}" for letter in dict.fromkeys(letters.values()) if counts[letter])


def _left(lines: Sequence[Sequence[str]]) -> list[str]:
    """The lines with all columns aligned to the left."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return ["  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip() for line in lines]


def _figure(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.1f}" if isinstance(value, float) else str(value)
