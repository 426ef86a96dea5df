# SPDX-License-Identifier: GPL-2.0-only
"""Run the contract tests against mutants, and compare their kills with the kill matrix, which may only grow.

A kill is new if two runs with different seeds made it, and lost if two did not: a kill that depends on how threads
interleave is not recorded.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from json import loads
from pathlib import Path
from xml.etree import ElementTree

from dirty_tracking.modes import LOG_MODES
from runner import ROOT
from selftests.unit.mutants.catalogue import MUTANTS
from selftests.unit.mutants.kill_matrix import (
    FILE,
    Case,
    KillMatrix,
    Kills,
    Verdicts,
    case_of,
    compare,
    contract_files,
)

PLANTED = "selftests/unit/mutants/planted.py::test_planted"
# The others differ from these only in how they are enabled.
MODES = ("dirty-log", "clear-log", "dirty-ring")
# These run for minutes under some mutants; test_checks_can_fail.py plants more faults in the same run.
ELSEWHERE = ("test_dirty_log.py", "test_known_bugs.py")
# Tests with writer threads, each of which would wait a minute for what never comes under some mutants
WRITERS = (
    *("test_concurrency.py", "test_interrupted_reset.py", "test_migration.py", "test_ring_concurrency.py"),
    "test_snapshots.py",
)
SIZES = ("--test-mem=64M", "--iterations=8", "--ring-count=4096")
_TIMEOUT = 3600


class Runner:
    """Runs the contract tests in :data:`MODES`, with pytest's *options*.

    :ivar backend: KVM's vendor module in the last run, and *release*: the kernel's release
    """

    def __init__(self, options: Sequence[str] = (), workers: int = 1) -> None:
        self.backend = self.release = ""
        self._options = options
        self._workers = workers

    def cases(self) -> dict[Case, str]:
        """The cases that can run, with the id of each."""
        command = [sys.executable, "-m", "pytest", "--collect-only", "-q", *_files(()), *_modes(MODES), *SIZES]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        ids = [line for line in done.stdout.splitlines() if "::" in line]
        return {case_of(test.partition("::")[2]): test for test in ids}

    def run(self, mutant: str | None, seed: int, only: Sequence[str] = ()) -> Verdicts:
        """The verdict on each case, or on those with the ids *only*, under *mutant*, or on unchanged KVM.

        :raises RuntimeError: the run did not come to its end
        """
        concerned = [mode for mode in MODES if not mutant or mode in MUTANTS[mutant].modes]
        hang = WRITERS if mutant and MUTANTS[mutant].hangs_writers else ()
        with tempfile.TemporaryDirectory() as folder:
            junit = Path(folder) / "junit.xml"
            command = [sys.executable, "-m", "pytest", *([f"{PLANTED}[{mutant}]"] if mutant else [])]
            command += only or [*_files(hang), *_modes(concerned)]
            command += ["-q", "--tb=no", "-p", "no:cacheprovider", *SIZES, f"--seed={seed}", *self._options]
            command += [f"--results={folder}", f"--junitxml={junit}"]
            # The mutant is planted in one machine.
            command += ["--machines=1"] if any(option.startswith("--kernel") for option in self._options) else []
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=_TIMEOUT)
            # Where a few are named, all of them may be skipped on this KVM: status 5.
            if done.returncode not in ((0, 1, 5) if only else (0, 1)) or not junit.exists():
                raise RuntimeError(f"{mutant or 'no mutant'}: status {done.returncode}\n{done.stdout}{done.stderr}")
            verdicts = _verdicts(junit)
            host = loads((Path(folder) / "results.json").read_text())["host"]
            self.backend, self.release = host["backend"], host["kernel"]
        if mutant and verdicts.pop(case_of(f"test_planted[{mutant}]"), "") != "passed":
            raise RuntimeError(f"{mutant} was not planted\n{done.stdout}{done.stderr}")
        return verdicts

    def kills(self, mutants: Sequence[str], recorded: Kills, twice_if_new: bool) -> tuple[Kills, Kills]:
        """Run *mutants*; those of which a kill is lost run twice.

        :param twice_if_new: those with a new kill run twice too
        :returns: the kills lost and made, as by :func:`compare`
        """
        runs = {mutant: [verdicts] for mutant, verdicts in zip(mutants, self._run_all(mutants, 1), strict=True)}
        doubtful = []
        for mutant in mutants:
            lost, made = compare(recorded, {mutant: runs[mutant]})
            new = any(names - recorded.get(case, set()) for case, names in made.items())
            if lost or (twice_if_new and new):
                doubtful.append(mutant)
        for mutant, verdicts in zip(doubtful, self._run_all(doubtful, 2), strict=True):
            runs[mutant].append(verdicts)
        return compare(recorded, runs)

    def _run_all(self, mutants: Sequence[str], seed: int) -> list[Verdicts]:
        with ThreadPoolExecutor(self._workers) as pool:
            return list(pool.map(lambda mutant: self.run(mutant, seed), mutants))


def _files(left_out: Sequence[str]) -> list[str]:
    """The contract tests, but those that run elsewhere or are *left_out*."""
    return [str(path.relative_to(ROOT)) for path in contract_files() if path.name not in (*ELSEWHERE, *left_out)]


def _modes(concerned: Sequence[str]) -> list[str]:
    """The option that selects the cases in the log modes *concerned*, and those without one."""
    return ["-k", " and ".join(f"not {mode}" for mode in LOG_MODES if mode not in concerned)]


def _verdicts(junit: Path) -> dict[Case, str]:
    """Each case's verdict: passed, failed, skipped, or error if its fixtures failed."""
    words = {"failure": "failed", "error": "error", "skipped": "skipped"}
    verdicts: dict[Case, str] = {}
    for test in ElementTree.parse(junit).getroot().iter("testcase"):
        case = case_of(test.attrib["name"])
        verdict = next((words[child.tag] for child in test if child.tag in words), "passed")
        # A test that has an error at its teardown has a second entry.
        verdicts[case] = "failed" if "failed" in (verdict, verdicts.get(case)) else verdict
    return verdicts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--mutants", default=",".join(MUTANTS), help="some of the catalogue's, with commas between them"
    )
    arguments, options = parser.parse_known_args()
    mutants = arguments.mutants.split(",")
    matrix = KillMatrix.load(FILE.read_text() if FILE.exists() else "")
    runner = Runner(options, os.cpu_count() or 1)
    sound = runner.run(None, 1)
    lost, made = runner.kills(mutants, matrix.kills, twice_if_new=True)
    losses = [f"no such test: {case}" for case in matrix.gone(runner.backend, sound)]
    losses += [f"survives {case}: {mutant}" for case, names in sorted(lost.items()) for mutant in sorted(names)]
    if losses:
        print(*losses, sep="\n")
        print(
            f"{len(losses)} kills are lost, and {FILE.relative_to(ROOT)} stays as it is."
            " If a test or a parameter was renamed, rename it there as well."
        )
        return 1
    passed = {case: made.get(case, set()) for case, verdict in sound.items() if verdict == "passed"}
    added = matrix.add(runner.backend, runner.release, passed)
    if added:
        FILE.write_text(matrix.text())
    print(f"{len(mutants)} mutants, {len(passed)} tests that ran: nothing is lost, {len(added)} kills are new")
    return 0


if __name__ == "__main__":
    sys.exit(main())
