# SPDX-License-Identifier: GPL-2.0-only
"""What a run prints at its end: the table, what did not run, and the verdict on the kernel, as wide as the terminal is."""

import json
import os
import re
from collections import Counter
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from harness.kernel_verdict import RunSummary, Verdict, describe_system, verdict_on_kernel
from harness.selection import DIMENSIONS
from harness.table import Line, counts_of_tests, long_table, migration_lines, short_table, summary, table_for
from kvm_util.wording import counted, listed, wrapped
from selftests.unit.commands import ONE_CELL, QUICK, open_terminal, pytest_command, read, running
from selftests.unit.mutants.faults import LOSING_PLUGIN

CELL = dict(zip((*DIMENSIONS, "vcpus"), ("dirty-log", "48bit-4k", "anonymous", "forced", "sparse", 1), strict=True))
DONE = CELL | {"iterations": 32, "writes": 302_559, "dirty": 8, "clean": 7, "ring_full_exits": 3, "seconds": 1.25}


def shown(lines: list[Line]) -> list[str]:
    return [str(line) for line in lines]


# --- the table --------------------------------------------------------------------------------------------------------


def test_cells_in_80_columns() -> None:
    """Every cell has a row of its own in the table, at most 80 columns wide, whatever its figures."""
    names = (*DIMENSIONS, "vcpus")
    cells = [dict(zip(names, values, strict=True)) for values in product(*DIMENSIONS.values(), (1, 512))]
    figures = {"writes": 999_949_999_999, "seconds": 86_400.0, "verdict": "known bug, not seen", "reason": "a-bug " * 9}
    header, *lines = shown(short_table([cell | figures for cell in cells]))
    assert max(map(len, (header, *lines))) <= 80
    assert len({tuple(line.split()[:6]) for line in lines}) == len(cells)


@pytest.mark.parametrize(
    ("writes", "text"),
    [(None, "-"), (9_999, "9999"), (10_000, "10k"), (272_960, "273k"), (999_499, "999k"), (999_500, "1.0M"),
     (1_234_567, "1.2M"), (9_949_999, "9.9M"), (9_950_000, "10M"), (2_000_000_000, "2.0G"), (1_500_000_000_000, "1500G")],
)  # fmt: skip
def test_writes_in_a_few_characters(writes: int | None, text: str) -> None:
    """A count of writes has four characters where that is possible, rounded to its unit."""
    _, line = short_table([CELL | {"writes": writes, "seconds": 1.0, "verdict": "pass"}])
    assert str(line).split()[6] == text


def test_short_table_has_tested_cells() -> None:
    """The short table has only tested cells; the long one has all, with reasons and all figures."""
    rows = [
        DONE | {"verdict": "pass", "reason": ""},
        CELL | {"verdict": "skipped", "reason": "no LA57"},
        CELL | {"verdict": "not run", "reason": "interrupted"},
        DONE | {"verdict": "known bug", "reason": "some-bug"},
    ]
    header, first, second = shown(short_table(rows))
    assert header.split() == ["log", "mode", "guest", "backing", "stop", "density", "vCPU", "writes", "sec", "verdict"]
    assert first.split() == ["dirty-log", "48bit-4k", "anon", "forced", "sparse", "1", "303k", "1.2", "pass"]
    assert second.endswith("1.2  known bug")
    long = [line.split() for line in shown(long_table(rows))]
    assert long[1] == [
        *["dirty-log", "48bit-4k", "anonymous", "forced", "sparse", "1", "32", "302559", "8", "7", "3", "1.2", "pass"]
    ]
    assert long[2][-9:] == ["-", "-", "-", "-", "-", "-", "skipped:", "no", "LA57"]
    assert long[3][-3:] == ["not", "run:", "interrupted"]
    assert summary(rows) == "4 cells: 1 pass, 1 known bug, 1 skipped, 1 not run"


@pytest.mark.parametrize(
    ("width", "verbose", "long", "reason"),
    [(80, False, False, False), (80, True, False, False), (200, False, False, True), (200, True, True, True)],
)
def test_table_as_wide_as_the_terminal(width: int, verbose: bool, long: bool, reason: bool) -> None:
    """The long table is shown with -v if it fits the terminal, else the short one, with reasons if all of them fit."""
    bug = "pvm-ring-overflow-of-a-very-long-name"
    rows = [DONE | {"verdict": "known bug", "reason": bug}, CELL | {"verdict": "skipped", "reason": ""}]
    lines = shown(table_for(rows, width, verbose))
    assert ("iterations" in lines[0]) == long
    assert (bug in lines[1]) == reason
    assert len(lines) == 2


# --- words ------------------------------------------------------------------------------------------------------------


def test_singular_and_plural() -> None:
    """A noun agrees with its number, in lists and in counts of verdicts."""
    assert counted(1, "page") == "1 page"
    assert counted(0, "page") == "0 pages"
    assert counted(2, "entry", "entries") == "2 entries"
    assert listed("page", [3]) == "page 3"
    assert listed("page", range(11)) == "pages 0, 1, 2, 3, 4, 5, 6, 7 and 3 more"
    assert summary([DONE | {"verdict": "pass"}]) == "1 cell: 1 pass"
    verdicts = Counter({"known bug": 4, "known bug, not seen": 1, "pass": 2, "FAIL": 1, "not run": 3, "skipped": 5})
    expected = "2 passed, 1 failed, 4 known bugs, 1 known bug not seen, 5 skipped, 3 not run"
    assert counts_of_tests(verdicts) == expected


def test_commands_and_paths_stay_whole() -> None:
    """Text in parentheses has a line of its own where it fits none, and a long word is not split."""
    command = "(echo 513 > /sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages)"
    path = "/" + "long" * 30
    lines = wrapped(
        f"needs 513 free huge pages of 2 MiB, the host has 0 {command}, or so: {path}", 80, "    1 ", "      "
    )
    assert [line for line in lines if command in line]
    assert [line for line in lines if line.strip() == path]
    assert all(len(line) <= 80 for line in lines if path not in line)
    assert lines[0].startswith("    1 needs")
    assert wrapped("a " + "(too long for one line) " * 1 + "b", 12) == ["a (too long", "  for one", "  line) b"]


def test_migration_is_one_line() -> None:
    """A migration's eight rounds fit into a line of 80 columns, and the lines are sorted by name."""
    rounds = [{"copied": pages, "ms": 1234.5} for pages in (10216, 10216, 403, 180, 117, 120, 98, 55)]
    names = ["dirty-ring-plain, 2 vCPUs, sequential", "clear-log, 1 vCPU, random"]
    first, second = migration_lines([{"migration": name, "verdict": "pass", "rounds": rounds} for name in names])
    assert first == "clear-log, 1 vCPU, random              pass  10216 10216 403 180 117 120 98 55"
    assert second.startswith("dirty-ring-plain, ")
    assert len(first) == len(second) <= 80


# --- the verdict ------------------------------------------------------------------------------------------------------

GOOD = Counter({"pass": 9, "known bug": 1, "skipped": 2})
BAD = GOOD + Counter({"FAIL": 1})
NOTHING: Counter[str] = Counter()


def passed(number: int) -> Counter[str]:
    return Counter({"pass": number})


def failed(number: int) -> Counter[str]:
    return Counter({"FAIL": number})


def ending(name: str, text: str) -> dict[str, str]:
    """The end of a run in a booted kernel."""
    return {"ending": name, "text": text}


@pytest.mark.parametrize(
    ("outcome", "text"),
    [
        (RunSummary(GOOD), "good: 9 passed, 1 known bug, 2 skipped"),
        (RunSummary(GOOD, planned=12), "good: 9 passed, 1 known bug, 2 skipped"),
        (RunSummary(Counter({"known bug": 2})), "good: 2 known bugs"),
        (RunSummary(BAD), "bad: 9 passed, 1 failed, 1 known bug, 2 skipped"),
        (RunSummary(passed(1), passed(3) + failed(2)), "good: 1 passed; the suite's own tests: 3 passed, 2 failed"),
        (RunSummary(NOTHING, failed(2)), "no verdict: the suite's own tests: 2 failed"),
        (RunSummary(NOTHING), "no verdict: no test was selected"),
        (RunSummary(NOTHING, untested=NOTHING), "no verdict: no test was selected"),
        (RunSummary(passed(1), kernel_reports=1), "bad: 1 report of the kernel; 1 passed"),
        (
            RunSummary(GOOD, planned=40, stopped="interrupted"),
            "interrupted: 12 of 40 tests ran (9 passed, 1 known bug, 2 skipped): no verdict",
        ),
        (
            RunSummary(passed(1) + Counter({"not run": 1}), planned=2, stopped="interrupted"),
            "interrupted: 1 of 2 tests ran (1 passed): no verdict",
        ),
        (RunSummary(NOTHING, stopped="interrupted"), "interrupted: 0 tests ran: no verdict"),
        (RunSummary(NOTHING, uncollected=1), "1 file of tests could not be collected: no verdict"),
        (
            RunSummary(GOOD, uncollected=2),
            "2 files of tests could not be collected; 9 passed, 1 known bug, 2 skipped: no verdict",
        ),
        (RunSummary(failed(1), planned=3, stopped="interrupted"), "bad: interrupted: 1 of 3 tests ran (1 failed)"),
        (
            RunSummary(passed(1), failed(1), planned=3),
            "stopped: 2 of 3 tests ran (1 passed): no verdict; the suite's own tests: 1 failed",
        ),
        (
            RunSummary(Counter({"skipped": 5}), untested=Counter({"no KVM": 4, "no LA57": 1})),
            "cannot be tested: no test ran on KVM: no KVM (and 1 other reason, above); 5 skipped",
        ),
        (
            RunSummary(NOTHING, passed(7), untested=NOTHING),
            "cannot be tested: no test ran on KVM: none that was selected needs it; the suite's own tests: 7 passed",
        ),
        (
            RunSummary(failed(1), end=ending("PANIC", "the kernel panicked: Kernel panic - not syncing")),
            "bad: the kernel panicked; 1 failed",
        ),
        (
            RunSummary(NOTHING, end=ending("NO_BOOT", "the kernel does not boot: why"), untested=NOTHING),
            "cannot be tested: the kernel does not boot: why",
        ),
        (
            RunSummary(GOOD, end=ending("NOT_TESTED", "it cannot be tested: QEMU ended")),
            "cannot be tested: QEMU ended; 9 passed, 1 known bug, 2 skipped",
        ),
        (RunSummary(failed(1), end=ending("EMULATOR_FAULT", "the emulator failed: int3")), "bad: 1 failed"),
    ],
)
def test_verdict_of_each_outcome(outcome: RunSummary, text: str) -> None:
    """Each outcome of a run has its verdict on the kernel, with the reason and the counts."""
    words = {"good": Verdict.GOOD, "bad": Verdict.BAD, "cannot be tested": Verdict.CANNOT}
    assert verdict_on_kernel(outcome) == (words.get(text.partition(":")[0], Verdict.NONE), text)


HOST = {"kernel": "6.12.1", "backend": "kvm_amd"}


@pytest.mark.parametrize(
    ("host", "machine", "text"),
    [
        (HOST, {}, "6.12.1, kvm_amd on this host"),
        (HOST | {"backend": "unknown"}, {}, "6.12.1, KVM on this host"),
        (HOST, {"qemu": "10.0", "emulated": True}, "6.12.1, kvm_amd in QEMU 10.0 (emulated)"),
        (HOST, {"qemu": "7.2", "emulated": False}, "6.12.1, kvm_amd in QEMU 7.2 (virtualized)"),
    ],
)
def test_where_a_kernel_ran(host: dict[str, str], machine: dict[str, Any], text: str) -> None:
    """A system is described by kernel, backend, and this host or QEMU with its version."""
    assert describe_system(host, machine) == text


# --- whole runs -------------------------------------------------------------------------------------------------------

MIXED = [*ONE_CELL, *QUICK, "--log-mode=dirty-log,dirty-ring", "--guest-mode=48bit-4k,57bit-4k"]
ESCAPE = re.compile(r"\x1b\[[\d;]*[A-Za-z]")


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., str]:
    """Run pytest with KVM's bitmaps falsified, on a terminal of 80 columns or in a pipe; returns all that it wrote."""

    def run_it(*arguments: str, terminal: bool = False, **changes: str) -> str:
        command, environment = pytest_command(tmp_path, LOSING_PLUGIN)
        for name in ("NO_COLOR", "FORCE_COLOR", "PY_COLORS", "COLUMNS"):
            environment.pop(name, None)
        ours, theirs = open_terminal() if terminal else os.pipe()
        with running([*command, *arguments], environment | changes, theirs):
            return "".join(read(ours)).replace("\r\n", "\n")

    return run_it


@pytest.mark.parametrize(
    ("terminal", "arguments", "environment", "coloured"),
    [
        (True, [], {}, True),
        (True, ["-n2", "-v"], {"NO_COLOR": "1"}, False),
        (False, [], {}, False),
        (False, ["--color=yes"], {}, True),
    ],
    ids=["terminal", "no-colour", "pipe", "pipe-in-colour"],
)
@pytest.mark.usefixtures("kvm")
@pytest.mark.log_modes("dirty-ring")
@pytest.mark.slow
def test_output_at_the_end_of_a_run(
    run: Callable[..., str], terminal: bool, arguments: list[str],
    environment: dict[str, str], coloured: bool,
) -> None:  # fmt: skip
    """A run ends with table and verdict, coloured if wanted, and no line but a command is wider than the terminal."""
    output = run(*MIXED, *arguments, terminal=terminal, **environment)
    assert ("\x1b[31m\x1b[1mFAIL\x1b[0m" in output) == coloured
    assert ("\x1b[32mpass\x1b[0m" in output) == coloured
    # The lines that are shown meanwhile, and erased, have escapes without a colour.
    assert bool(re.search(r"\x1b\[[\d;]*m", output)) == coloured
    plain = ESCAPE.sub("", output)
    failure, _, end = plain.partition("dirty tracking, cell by cell")
    assert re.search(r"^dirty-log  +48bit-4k +anon +forced +sparse +1 .* FAIL$", end, re.MULTILINE)
    assert re.search(r"^dirty-ring +48bit-4k +anon +forced +sparse +1 .* pass$", end, re.MULTILINE)
    assert "1 pass, 1 FAIL" in end
    verdict = " ".join(end.partition("short test summary")[2].split())
    assert re.search(r"FAILED .* \S+, kvm_\w+ on this host: bad: 1 passed, 1 failed", verdict)
    assert "; files: " in verdict
    whole = ("FAILED ", "reproduce ", "____")
    report = "KVM broke the contract" + failure.partition("KVM broke the contract")[2] + end
    if terminal:
        wide = [line for line in report.splitlines() if len(line) > 80 and " " in line.strip()]
        assert not [line for line in wide if not line.startswith(whole)]
    else:
        assert re.search(r" on this host: bad: .*; files: \S+$", end, re.MULTILINE)


@pytest.mark.usefixtures("kvm")
@pytest.mark.slow
def test_violation_is_shown_first(run: Callable[..., str]) -> None:
    """A failure shows the violation, the test's own line and the command; the library's frames only with --tb=long."""
    test = "selftests/interface/test_slots.py::test_logging_disabled_and_enabled[dirty-log]"
    output = run(test)
    report = output.partition("= FAILURES =")[2].splitlines()
    assert re.match(r"dirty-log: .*LOST", report[2]), output
    assert len(report[2 : report.index("")]) <= 2
    assert re.search(r"^selftests/interface/test_slots\.py:\d+: in test_\w+$", output, re.MULTILINE)
    assert "lib/dirty_tracking/vm.py" not in output
    assert re.search(rf"^reproduce .* '?{re.escape(test)}'? --seed=", output, re.MULTILINE)
    assert "lib/dirty_tracking/vm.py" in run(test, "--tb=long")


@pytest.mark.usefixtures("kvm")
def test_junit_file_says_what_was_tested(run: Callable[..., str], tmp_path: Path) -> None:
    """The JUnit file has kernel, backend, parameters, CPU, suite version and seed, and the figures of each cell."""
    run(*ONE_CELL, *QUICK, "--seed=5", f"--junitxml={tmp_path}/junit.xml")
    results = json.loads((tmp_path / "results/results.json").read_text())
    host = results["host"]
    (suite,) = ElementTree.parse(tmp_path / "junit.xml").getroot()
    expected = {"suite": results["suite"], "seed": "5", "iterations": "2", "place": "this host's own"}
    expected |= {name: host[name] for name in ("kernel", "backend", "cpu")} | host["parameters"]
    assert expected.items() <= properties(suite).items()
    (cell,) = suite.iter("testcase")
    assert int(properties(cell)["writes"]) == results["cells"][0]["writes"] > 0
    assert json.loads(properties(cell)["phases"]) == results["cells"][0]["phases"]


def properties(element: ElementTree.Element) -> dict[str, str]:
    """The properties of a suite or a case of a JUnit file."""
    return {one.attrib["name"]: one.attrib["value"] for one in element.findall("properties/property")}


def test_unit_tests_have_no_verdict(run: Callable[..., str]) -> None:
    """A run of unit tests only has their counts, and no verdict on a kernel."""
    output = run("selftests/unit/test_uapi.py", "-q")
    assert re.search(r": no verdict: the suite's own tests: \d+ passed(, \d+ skipped)?$", output, re.MULTILINE), output
