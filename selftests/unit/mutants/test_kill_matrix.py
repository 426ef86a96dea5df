# SPDX-License-Identifier: GPL-2.0-only
"""Each contract test can fail: it kills a mutant (mutants/catalogue.py), as the kill matrix records."""

import pytest

from selftests.unit.mutants.catalogue import MUTANTS
from selftests.unit.mutants.kill_matrix import (
    FILE,
    Case,
    KillMatrix,
    case_of,
    compare,
    contract_files,
    contract_functions,
)
from selftests.unit.mutants.record import ELSEWHERE, MODES, WRITERS, Runner

# Tests that no answer of GET, CLEAR or RESET and no errno can fail, and what can
OTHERWISE = {
    "test_ring_offset_is_beyond_kvm_run": "compares two numbers",
    "test_smallest_ring_size": "KVM_ENABLE_CAP answers",
    "test_ring_mmap_is_shared_and_no_exec": "mmap answers",
    "test_ring_mmap_with_one_end_outside": "mmap answers",
    "test_mapping_beyond_the_ring_is_unbacked": "memory answers",
    "test_no_ring_memory_without_rings": "memory answers",
    "test_no_bitmap_allocated_in_ring_mode": "compares with the modes that take one",
}
A = Case("test_a[x]", "dirty-log")
B = Case("test_b", "")
TEXT = """\
== recorded on kvm_one, Linux 6.1
test_a[x] @ dirty-log, dirty-ring: page-lost page-added
test_b: -

== recorded on kvm_two, Linux 6.2
test_b: wrong-errno
"""


@pytest.fixture(scope="module")
def matrix() -> KillMatrix:
    return KillMatrix.load(FILE.read_text())


@pytest.mark.usefixtures("kvm")
def test_each_test_kills_a_mutant(matrix: KillMatrix) -> None:
    """Each contract test fails under the first of a few mutants that it is recorded to kill; a new test, under any of them."""
    runner = Runner()
    cases = {case: test for case, test in runner.cases().items() if case.function not in OTHERWISE}
    new = cases.keys() - matrix.kills.keys()
    killed, skipped = set[Case](), set[Case]()
    for mutant in matrix.cover(MODES):
        left = {case for case in cases.keys() - killed - skipped if case in new or mutant in matrix.kills[case]}
        for seed in (1, 2):
            verdicts = runner.run(mutant, seed, [cases[case] for case in sorted(left)]) if left else {}
            killed |= {case for case, verdict in verdicts.items() if verdict == "failed"}
            skipped |= {case for case, verdict in verdicts.items() if verdict == "skipped"}
            left = {case for case, verdict in verdicts.items() if verdict == "passed"}
        assert not left - new, f"tests that are recorded to kill {mutant}, and do not"
    survivors = cases.keys() - killed - skipped
    assert not survivors, "tests that kill no mutant that is tried here: do they in `make kill-matrix`?"
    assert len(killed) > 200


def test_each_recorded_test_exists(matrix: KillMatrix) -> None:
    """Each test in kill_matrix.txt exists under that name."""
    assert matrix.gone("", ()) == []


def test_only_exempt_tests_kill_nothing(matrix: KillMatrix) -> None:
    """Each recorded test kills a mutant, except those that are listed with a reason."""
    assert {case.function for case, mutants in matrix.kills.items() if not mutants} <= OTHERWISE.keys()


def test_names_of_contract_tests_are_unique() -> None:
    """No two contract tests have the same name, so that the kill matrix need not know their files."""
    functions = contract_functions()
    assert [name for name in set(functions) if functions.count(name) > 1] == []


def test_no_exemption_is_stale() -> None:
    """Each exempt test and each file that is left out exists."""
    assert OTHERWISE.keys() <= set(contract_functions())
    assert {*ELSEWHERE, *WRITERS} <= {path.name for path in contract_files()}


def test_each_mutant_is_killed(matrix: KillMatrix) -> None:
    """Each mutant of the catalogue is killed by at least one test."""
    assert set().union(*matrix.kills.values()) == MUTANTS.keys()


@pytest.mark.parametrize(
    ("name", "case"),
    [
        ("test_x", Case("test_x", "")),
        ("test_x[a-b]", Case("test_x[a-b]", "")),
        ("test_x[dirty-ring]", Case("test_x", "dirty-ring")),
        ("test_x[a-dirty-ring-plain]", Case("test_x[a]", "dirty-ring-plain")),
        ("test_x[clear-log-unset-a-1]", Case("test_x[a-1]", "clear-log-unset")),
        ("test_x[a-clear-log-b]", Case("test_x[a-b]", "clear-log")),
    ],
)
def test_log_mode_in_a_test_id(name: str, case: Case) -> None:
    """The log mode is separated from a test's other parameters, wherever it is in the id."""
    assert case_of(name) == case


def test_kill_matrix_file_round_trip() -> None:
    """A kill matrix that is read and written again is the same text."""
    matrix = KillMatrix.load(TEXT)
    assert matrix.kills[A] == {"page-lost", "page-added"}
    assert matrix.kills[B] == {"wrong-errno"}
    assert matrix.text().endswith(f"\n\n{TEXT}")


@pytest.mark.parametrize("line", ["test_c: no-such-mutant", "test_c", "== recorded on kvm_one"])
def test_invalid_kill_matrix_lines(line: str) -> None:
    """A line that is no heading, or names no mutant, is an error that quotes it."""
    with pytest.raises(ValueError, match=line):
        KillMatrix.load(f"{TEXT}{line}\n")


def test_kills_are_added_once() -> None:
    """Kills that any backend has recorded are not recorded again."""
    matrix = KillMatrix.load(TEXT)
    assert matrix.add("kvm_two", "6.3", {A: {"page-lost"}, B: set()}) == []
    assert matrix.releases["kvm_two"] == "6.2"
    found = {A: {"page-lost", "page-moved"}, Case("test_c", ""): set[str]()}
    assert matrix.add("kvm_two", "6.3", found) == [f"{A}: page-moved", "test_c: -"]
    assert matrix.sections["kvm_two"][A] == {"page-moved"}
    assert matrix.releases["kvm_two"] == "6.3"


def test_lost_and_made_kills() -> None:
    """A kill is lost if no run made it, and made if all runs did; a test that was skipped counts for neither."""
    recorded = {A: {"page-lost"}, B: {"page-lost"}}
    assert compare(recorded, {"page-lost": [{A: "passed", B: "skipped"}]}) == ({A: {"page-lost"}}, {})
    assert compare(recorded, {"page-lost": [{A: "passed", B: "failed"}, {A: "failed", B: "failed"}]}) == (
        {},
        {B: {"page-lost"}},
    )
    assert compare({}, {"page-lost": [{A: "passed"}]}) == ({}, {})


def test_cover_of_recorded_kills() -> None:
    """The mutants chosen are few, and each case that kills any mutant kills one of them."""
    matrix = KillMatrix.load(TEXT)
    assert len(matrix.cover(MODES)) == 2
    matrix.sections["kvm_one"][B] = {"page-lost", "page-moved"}
    assert matrix.cover(MODES) == ["page-lost"]
