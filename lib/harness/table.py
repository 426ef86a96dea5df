# SPDX-License-Identifier: GPL-2.0-only
"""The tables and lists of a run's summary. Each row is a mapping: a cell's dimensions, figures, verdict and reason."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvm_util.wording import WIDTH, counted, short_number

DIMENSIONS = ("log_mode", "guest_mode", "backing", "stop", "density", "vcpus")
VERDICTS = ("pass", "FAIL", "known bug", "known bug, not seen", "skipped", "not run")
_FIGURES = ("iterations", "writes", "dirty", "clean", "ring_full_exits", "seconds")
_FIRST_NUMBER = DIMENSIONS.index("vcpus")
# Verdicts of cells and tests whose body did not run
UNTESTED = ("skipped", "not run")
_PLURALS = {"known bug": "known bugs", "known bug, not seen": "known bugs not seen"}
# The words for counts of tests, where they differ from those for cells
_OF_TESTS = {"pass": "passed", "FAIL": "failed"}

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Line:
    """A line of the table, split into the parts that have different colours."""

    text: str
    verdict: str = ""
    reason: str = ""

    def __str__(self) -> str:
        return self.text + self.verdict + self.reason


def long_table(rows: Sequence[Row]) -> list[Line]:
    """All rows and columns: full names, exact figures, verdict and reason."""
    header = [name.removesuffix("_exits").replace("_", " ") for name in (*DIMENSIONS, *_FIGURES)]
    lines = [
        [str(row.get(name, "")) for name in DIMENSIONS] + [_exact(row.get(name)) for name in _FIGURES] for row in rows
    ]
    return _table(header, lines, "  ", [(row["verdict"], row.get("reason")) for row in rows])


def short_table(rows: Sequence[Row], width: int = WIDTH) -> list[Line]:
    """The rows that were tested, abbreviated to fit into *width* columns; 80 are enough for every cell."""
    tested = [row for row in rows if row["verdict"] not in UNTESTED]
    header = [*_SHORT_HEADERS.values(), "writes", "sec"]
    lines = [
        [*(_short_name(row, name) for name in DIMENSIONS), _writes(row.get("writes")), _seconds(row.get("seconds"))]
        for row in tested
    ]
    verdicts = [_SHORT_VERDICTS.get(row["verdict"], str(row["verdict"])) for row in tested]
    with_reasons = [(verdict, row.get("reason")) for verdict, row in zip(verdicts, tested, strict=True)]
    without_reasons = [(verdict, None) for verdict in verdicts]
    for gap, ends in (("  ", with_reasons), ("  ", without_reasons), (" ", without_reasons)):
        table = _table(header, lines, gap, ends)
        if all(len(str(line)) <= width for line in table):
            break
    return table


def table_for(rows: Sequence[Row], width: int, verbose: bool) -> list[Line]:
    """The rows that were tested: the long table if *verbose* and it fits into *width* columns, else the short one."""
    long = long_table([row for row in rows if row["verdict"] not in UNTESTED]) if verbose else []
    return long if long and all(len(str(line)) <= width for line in long) else short_table(rows, width)


def summary(rows: Sequence[Row]) -> str:
    """How many cells have each verdict: ``4 cells: 3 pass, 1 FAIL``."""
    return f"{counted(len(rows), 'cell')}: {_counts(Counter(row['verdict'] for row in rows), {})}"


def counts_of_tests(verdicts: Counter[str]) -> str:
    """How many tests have each verdict: ``11 passed, 3 known bugs``."""
    return _counts(verdicts, _OF_TESTS)


def migration_lines(migrations: Sequence[Row]) -> list[str]:
    """A line per migration, sorted: its name, its verdict, and how many pages each round copied."""
    lines = [
        [str(row["migration"]), str(row["verdict"]), " ".join(str(done["copied"]) for done in row["rounds"])]
        for row in migrations
    ]
    return _left(sorted(lines))


def untested_lines(tests: Mapping[str, Sequence[str]], verdict: str) -> list[str]:
    """A line per reason why tests did not run, the most frequent first.

    Reasons that differ only in their first word (``57bit-4k: no LA57``, ``57bit-2m: no LA57``) share a line.
    """
    groups: dict[str, tuple[list[str], list[str]]] = {}
    for reason, ids in tests.items():
        name, colon, text = reason.partition(": ")
        if not colon or " " in name:
            name, text = "", reason
        names, those = groups.setdefault(text, ([], []))
        names += filter(None, [name])
        those += ids
    lines = []
    for text, (names, those) in sorted(groups.items(), key=lambda item: -len(item[1][1])):
        files = dict.fromkeys(test.partition("::")[0].removeprefix("selftests/") for test in those)
        about = f"{', '.join(sorted(names))}: " if names else ""
        lines.append(f"{len(those):5} {verdict}, {', '.join(files)}: {about}{text}")
    return lines


_CASES = "(4 3k 2s 1F: 4 passed, 3 have a known bug, 2 skipped or not run, 1 failed)"
_IN_CROSS_TABLE = {"known bug": "bug", "known bug, not seen": "bug?", "skipped": "skip", "not run": "none"}


def cross_table(names: Sequence[str], runs: Sequence[Sequence[Row]]) -> list[str]:
    """The verdicts of several runs: a line per cell, a column per run, and a legend."""
    cells: dict[tuple[str, ...], dict[str, str]] = {}
    for name, rows in zip(names, runs, strict=True):
        for row in rows:
            cell = tuple(_short_name(row, dimension) for dimension in DIMENSIONS)
            cells.setdefault(cell, {})[name] = _IN_CROSS_TABLE.get(str(row["verdict"]), str(row["verdict"]))
    lines = [[_SHORT_HEADERS[name] for name in DIMENSIONS] + list(names)]
    lines += [[*cell, *(verdicts.get(name, "-") for name in names)] for cell, verdicts in cells.items()]
    words = {word for line in lines for word in line[len(DIMENSIONS) :]}
    meanings = [(short, verdict) for verdict, short in _IN_CROSS_TABLE.items()] + [("-", "no cell of that run")]
    legend = "; ".join(f"{word}: {meaning}" for word, meaning in meanings if word in words)
    return _left(lines) + ([f"({legend})"] if legend else [])


def cross_table_of_tests(names: Sequence[str], runs: Sequence[Sequence[Row]]) -> list[str]:
    """The test cases of several runs: a line per test function, a column per run with counts per verdict, and a legend."""
    counts: dict[str, dict[str, Counter[str]]] = {}
    for name, rows in zip(names, runs, strict=True):
        for row in rows:
            function = str(row["test"]).partition("[")[0].removeprefix("selftests/")
            counts.setdefault(function, {}).setdefault(name, Counter())[str(row["verdict"])] += 1
    lines = [[*names, "test"]]  # the long names last
    lines += [[*(_cases(columns.get(name)) for name in names), function] for function, columns in counts.items()]
    return [*_left(lines), _CASES]


def skipped_everywhere(runs: Sequence[Sequence[Row]]) -> list[str]:
    """The tests that ran in none of the runs, each with its reason in the first run."""
    reasons = {str(row["test"]): str(row["reason"]) for rows in reversed(runs) for row in rows}
    ran = {str(row["test"]) for rows in runs for row in rows if row["verdict"] not in UNTESTED}
    return [f"{test}: {reason}" for test, reason in reasons.items() if test not in ran]


def _cases(verdicts: Counter[str] | None) -> str:
    if verdicts is None:
        return "-"
    letters = {"pass": "", "known bug": "k", "known bug, not seen": "k", "skipped": "s", "not run": "s", "FAIL": "F"}
    counts: Counter[str] = Counter()
    for verdict, number in verdicts.items():
        counts[letters[verdict]] += number
    return " ".join(f"{counts[letter]}{letter}" for letter in dict.fromkeys(letters.values()) if counts[letter])


def _left(lines: Sequence[Sequence[str]]) -> list[str]:
    """Align all columns to the left."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return ["  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip() for line in lines]


def _table(
    header: Sequence[str], lines: Sequence[Sequence[str]], gap: str, ends: Sequence[tuple[str, str | None]]
) -> list[Line]:
    """A header and *lines*, with *gap* between columns, and with a verdict and its reason, if any, at each end.

    Columns from the number of vCPUs on are numbers, which are aligned to the right.
    """
    widths = [max(map(len, texts)) for texts in zip(header, *lines, strict=True)]
    texts = [
        "".join(
            (text.rjust(width) if column >= _FIRST_NUMBER else text.ljust(width)) + gap
            for column, (text, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in (header, *lines)
    ]
    table = [Line(f"{texts[0]}verdict")]
    for text, (verdict, reason) in zip(texts[1:], ends, strict=True):
        table.append(Line(text, verdict, f": {reason}" if reason else ""))
    return table


def _counts(verdicts: Counter[str], words: Mapping[str, str]) -> str:
    found = [(verdicts[name], words.get(name, name.replace(",", "")), name) for name in VERDICTS if verdicts[name]]
    return ", ".join(counted(number, word, _PLURALS.get(name, word)) for number, word, name in found)


def _exact(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.1f}" if isinstance(value, float) else str(value)


def _writes(number: int | None) -> str:
    return "-" if number is None else short_number(number)


def _seconds(value: float | None) -> str:
    if value is None:
        return "-"
    if value >= 9999.5:
        return f"{value / 3600:.0f}h"
    return f"{value:.1f}" if value < 99.95 else f"{value:.0f}"


# Abbreviations of dimension values and verdicts
_SHORT_NAMES = {
    "anonymous": "anon",
    "anonymous_thp": "thp",
    "anonymous_hugetlb_2mb": "htlb-2m",
    "anonymous_hugetlb_1gb": "htlb-1g",
    "shmem_thp": "shm-thp",
    "shared_hugetlb_2mb": "shm-2m",
    "cooperative": "coop",
    "dense-sequential": "dense-seq",
    "dense-random": "dense-rnd",
}
_SHORT_VERDICTS = {"known bug, not seen": "bug not seen"}
_SHORT_HEADERS = {
    "log_mode": "log mode",
    "guest_mode": "guest",
    "backing": "backing",
    "stop": "stop",
    "density": "density",
    "vcpus": "vCPU",
}


def _short_name(row: Row, dimension: str) -> str:
    name = str(row.get(dimension, ""))
    return _SHORT_NAMES.get(name, name)
