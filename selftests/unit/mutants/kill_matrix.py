# SPDX-License-Identifier: GPL-2.0-only
"""The kill matrix: which contract test fails under which mutant, as kill_matrix.txt keeps it.

A line of the file is a test function with its parameters but the log mode, the log modes, and the mutants that the test kills
in each of these modes: ``test_moved @ dirty-log, clear-log: page-lost page-added``. A mutant that is not on the line survives
the test, or does not concern the mode. The file has a section per backend that it was recorded on; each has what those above
it lack.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from dirty_tracking.modes import LOG_MODES
from runner import ROOT
from selftests.unit.mutants.catalogue import MUTANTS

FILE = Path(__file__).with_name("kill_matrix.txt")
_SURVIVED = "-"  # by all mutants
_MODE = re.compile(rf"(?<![a-z])({'|'.join(sorted(LOG_MODES, key=len, reverse=True))})(?![a-z])")
_HEADING = re.compile(r"== recorded on (\S+), Linux (\S+)")
_ABOUT = """\
# SPDX-License-Identifier: GPL-2.0-only
# Which contract test fails under which mutant (catalogue.py): `make kill-matrix` compares, and adds what is new. A line is a
# test with its parameters @ log modes: mutants that it kills in each of them; "-" is none. Nothing may be taken out, except
# together with its test. When a test or a parameter is renamed, rename it here as well.
"""


@dataclass(frozen=True, order=True)
class Case:
    """A contract test with its parameters.

    :ivar test: the function's name, and in brackets its parameters but the log mode
    :ivar mode: the log mode; empty for a test that is not parametrized with it
    """

    test: str
    mode: str

    def __str__(self) -> str:
        return f"{self.test} @ {self.mode}" if self.mode else self.test

    @property
    def function(self) -> str:
        """The name of the test function."""
        return self.test.partition("[")[0]


def case_of(name: str) -> Case:
    """The case of a test that pytest calls *name*: function and parameters."""
    function, _, parameters = name.removesuffix("]").partition("[")
    found = _MODE.search(parameters)
    if found is None:
        return Case(name, "")
    around = (parameters[: found.start()].rstrip("-"), parameters[found.end() :].lstrip("-"))
    others = "-".join(part for part in around if part)
    return Case(f"{function}[{others}]" if others else function, found[0])


def contract_files() -> list[Path]:
    """The files with tests of KVM's contract: all but the suite's tests of itself."""
    return [path for path in sorted((ROOT / "selftests").rglob("test_*.py")) if "unit" not in path.parts]


def contract_functions() -> list[str]:
    """The names of the test functions in these files."""
    texts = [path.read_text() for path in contract_files()]
    return [name for text in texts for name in re.findall(r"^def (test_\w+)", text, re.MULTILINE)]


Kills = dict[Case, set[str]]  # the names of the mutants that each case kills
Verdicts = Mapping[Case, str]  # passed, failed, skipped or error


class KillMatrix:
    """The kills, in a section for each backend that some were recorded on.

    :ivar sections: by backend
    :ivar releases: the kernel's release at the last recording, by backend
    """

    def __init__(self) -> None:
        self.sections: dict[str, Kills] = {}
        self.releases: dict[str, str] = {}

    @classmethod
    def load(cls, text: str) -> "KillMatrix":
        """Read the text of a file.

        :raises ValueError: a line is neither a heading nor a test with its kills, or names no mutant of the catalogue
        """
        matrix = cls()
        section: Kills | None = None
        for line in text.splitlines():
            if line.startswith("#") or not line:
                continue
            if heading := _HEADING.fullmatch(line):
                section = matrix.sections[heading[1]] = {}
                matrix.releases[heading[1]] = heading[2]
                continue
            cases, separator, names = line.rpartition(": ")
            mutants = set() if names == _SURVIVED else set(names.split())
            if section is None or not separator or not mutants <= MUTANTS.keys():
                raise ValueError(f"kill matrix: neither a heading, nor a test and mutants that there are: {line}")
            test, _, modes = cases.partition(" @ ")
            for mode in modes.split(", "):
                section[Case(test, mode)] = mutants
        return matrix

    def text(self) -> str:
        """The file's text: tests by name, modes and mutants in the order of their catalogues."""
        return _ABOUT + "".join(
            f"\n== recorded on {backend}, Linux {self.releases[backend]}\n" + "".join(_lines(section))
            for backend, section in self.sections.items()
        )

    @property
    def kills(self) -> Kills:
        """The kills of all sections."""
        union: Kills = {}
        for section in self.sections.values():
            for case, mutants in section.items():
                union[case] = union.get(case, set()) | mutants
        return union

    def add(self, backend: str, release: str, kills: Kills) -> list[str]:
        """Add what was found on *backend* and is not recorded; returns the kills, and the cases that kill nothing."""
        known = self.kills
        section = self.sections.setdefault(backend, {})
        added: list[str] = []
        for case, mutants in kills.items():
            new = mutants - known.get(case, set())
            if new or case not in known:
                section[case] = section.get(case, set()) | new
                added += [f"{case}: {mutant}" for mutant in sorted(new)] or [f"{case}: {_SURVIVED}"]
        if added:
            self.releases[backend] = release
        return added

    def gone(self, backend: str, collected: Iterable[Case]) -> list[str]:
        """The cases that are not there any more: on *backend* those recorded on it, elsewhere those whose function is gone."""
        cases, functions = set(collected), set(contract_functions())
        return [
            str(case)
            for recorded_on, section in self.sections.items()
            for case in section
            if case.function not in functions or (recorded_on == backend and case not in cases)
        ]

    def cover(self, modes: Iterable[str]) -> list[str]:
        """A few mutants of which each case in *modes*, or without one, kills one that it can kill: the greedy choice."""
        left = [mutants for case, mutants in self.kills.items() if mutants and case.mode in ("", *modes)]
        chosen: list[str] = []
        while left:
            best = max(MUTANTS, key=lambda mutant: sum(mutant in mutants for mutants in left))
            left = [mutants for mutants in left if best not in mutants]
            chosen.append(best)
        return chosen


def _lines(section: Kills) -> Iterable[str]:
    modes_of: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for mode in ("", *LOG_MODES):
        for case, mutants in section.items():
            if case.mode == mode:
                names = tuple(name for name in MUTANTS if name in mutants)
                modes_of.setdefault((case.test, names), []).append(mode)
    for (test, names), modes in sorted(modes_of.items(), key=lambda item: item[0][0]):
        where = f" @ {', '.join(modes)}" if modes != [""] else ""
        yield f"{test}{where}: {' '.join(names) or _SURVIVED}\n"


def compare(recorded: Kills, runs: Mapping[str, list[Verdicts]]) -> tuple[Kills, Kills]:
    """Hold the runs of each mutant to what is recorded.

    :returns: the kills that are recorded, and that no run made in which the test ran; and those that all runs made
    """
    lost: Kills = {}
    made: Kills = {}
    for mutant, verdicts_of_runs in runs.items():
        for case in set().union(*verdicts_of_runs):
            verdicts = {verdicts.get(case, "skipped") for verdicts in verdicts_of_runs}
            if verdicts == {"failed"}:
                made.setdefault(case, set()).add(mutant)
            elif "failed" not in verdicts and "passed" in verdicts and mutant in recorded.get(case, ()):
                lost.setdefault(case, set()).add(mutant)
    return lost, made
