# SPDX-License-Identifier: GPL-2.0-only
"""Each test of a sentence of the contract fails under one planted fault at least: none of them is there for show."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from kvm_util.kvm import Kvm
from runner import ROOT
from selftests.unit.mutants.planted_faults import FAULTS

# They have proofs of their own, which plant faults in their own ways.
ELSEWHERE = ("test_dirty_log.py", "test_known_bugs.py", "test_histories.py")
# In these nothing but a report may be wrong: with resets that do nothing their threads would wait for each other.
THREADED = ("test_concurrency.py", "test_interrupted_reset.py", "test_migration.py", "test_ring_concurrency.py")
REPORT_FAULTS = ("lose_reports", "add_reports")
FILES = [
    path
    for path in sorted((ROOT / "selftests").rglob("test_*.py"))
    if "unit" not in path.parts and path.name not in ELSEWHERE
]
# What no answer of GET, CLEAR, RESET or an error can make fail, and what does
OTHERWISE = {
    "test_the_ring_lies_beyond_the_vcpus_own_mapping": "compares two numbers",
    "test_the_smallest_ring_holds_what_is_reserved": "KVM_ENABLE_CAP answers",
    "test_the_ring_can_be_mapped_shared_only_and_not_for_execution": "mmap answers",
    "test_the_rules_hold_for_a_mapping_of_which_the_ring_is_a_part": "mmap answers",
    "test_a_mapping_that_is_longer_than_the_ring_ends_with_it": "memory answers",
    "test_without_a_ring_there_is_none_to_read": "memory answers",
    "test_a_large_slot_takes_no_bitmap_in_ring_mode": "compares with the modes that take one",
}


def outcomes(fault: str, folder: Path) -> dict[str, str]:
    """Each test's outcome with *fault* planted; modes that differ from others only in how they are enabled are left out."""
    path = folder / f"{fault}.json"
    command = [sys.executable, "-m", "pytest", "-q", "--tb=no", "-k", "not plain and not clear-log-unset"]
    command += ["-p", "selftests.unit.mutants.planted_faults", "--planted", fault, "--outcomes", str(path)]
    command += ["--results", str(folder / fault)]
    command += [str(file) for file in FILES if fault in REPORT_FAULTS or file.name not in THREADED]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert path.exists(), done.stdout + done.stderr
    found: dict[str, str] = json.loads(path.read_text())
    return found


@pytest.mark.mutants
def test_each_test_fails_under_a_planted_fault(kvm: Kvm, tmp_path: Path) -> None:
    verdicts: dict[str, set[str]] = {}
    for fault in FAULTS:
        for name, outcome in outcomes(fault, tmp_path).items():
            verdicts.setdefault(name, set()).add(outcome)
    survivors = [
        name
        for name, its in verdicts.items()
        if "passed" in its and "failed" not in its and name.partition("::")[2].partition("[")[0] not in OTHERWISE
    ]
    assert not survivors, f"{len(survivors)} tests pass whatever KVM answers"
    assert sum("failed" in its for its in verdicts.values()) > 200


def test_no_exemption_is_stale() -> None:
    sources = "".join(path.read_text() for path in FILES)
    assert [name for name in OTHERWISE if f"def {name}(" not in sources] == []
