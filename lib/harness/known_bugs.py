# SPDX-License-Identifier: GPL-2.0-only
"""The list of known kernel bugs, ``known_bugs.toml``, and which of them concern a cell or a test on this host."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any

from dirty_tracking.cell import MAX_VCPUS, Cell
from dirty_tracking.violations import Kind, Violation
from harness.selection import DIMENSIONS
from harness.toml_file import TomlError, TomlFile
from kvm_util.host import Host, version_numbers
from runner import ROOT

PATH = ROOT / "known_bugs.toml"
_VENDORS = ("kvm_intel", "kvm_amd", "kvm_pvm")
_VALUES = DIMENSIONS | {"vcpus": tuple(str(count) for count in range(1, MAX_VCPUS + 1))}


@dataclass(frozen=True)
class KnownBug:
    """An entry of the list, which describes the fields."""

    id: str
    summary: str
    evidence: str
    backend: tuple[str, ...]
    findings: frozenset[Kind]
    always: bool
    needs: frozenset[Kind] = frozenset(Kind)
    kernels: tuple[str, str] = ("", "")
    parameters: dict[str, str] = field(default_factory=dict)
    cells: dict[str, list[str]] = field(default_factory=dict)
    tests: tuple[str, ...] = ()
    most_pages: int | None = None
    ring_lapped: bool = False
    log: tuple[str, ...] = ()

    def on(self, host: Host) -> bool:
        """Whether *host* meets the conditions."""
        first, before = self.kernels
        return (
            host.backend in self.backend
            and (not first or host.kernel_version >= version_numbers(first))
            and (not before or host.kernel_version < version_numbers(before))
            and all(host.parameters.get(name) == value for name, value in self.parameters.items())
        )

    def is_of(self, family: str) -> bool:
        """Whether it is the bug *family*, such as a folder below bugs/ is named after, or one of several entries of it."""
        return f"{self.id}-".startswith(f"{family}-")

    def concerns(self, test: str, cell: Cell | None = None) -> bool:
        """Whether the entry has a test, by the name of its function, or the *cell* of the test."""
        if test in self.tests or cell is None or not self.cells:
            return test in self.tests
        return all(str(getattr(cell, name)) in values for name, values in self.cells.items())

    def explains(self, violations: Iterable[Violation]) -> bool:
        """Whether the bug causes all of these violations, and at least one is of a kind among those it needs."""
        kinds = {violation.kind for violation in violations}
        most = max(len(violation.pages) for violation in violations)
        lapped = all(violation.ring_lapped for violation in violations)
        return (
            kinds <= self.findings
            and bool(kinds & self.needs)
            and (self.most_pages is None or most <= self.most_pages)
            and (lapped or not self.ring_lapped)
        )

    def explains_log(self, titles: Sequence[str]) -> bool:
        """Whether the bug causes a report in the kernel's log: each of its titles matches, and there is at least one."""
        return bool(titles) and all(any(re.search(pattern, title) for pattern in self.log) for title in titles)


@cache
def load(path: Path = PATH) -> tuple[KnownBug, ...]:
    """Read the list, once in a process."""
    file = TomlFile(path)
    for name in file.data:
        if name != "bug":
            raise file.error(f"no such field: {name} (there are entries [[bug]])", name)
    entries = file.data.get("bug", [])
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise file.error("an entry begins with [[bug]]", "bug")
    bugs: dict[str, KnownBug] = {}
    for number, values in enumerate(entries):
        entry = _Entry(file, number, values)
        bug = entry.parse()
        if bug.id in bugs:
            raise entry.error("id", "an earlier entry has the same")
        bugs[bug.id] = bug
    return tuple(bugs.values())


def on_host(host: Host) -> list[KnownBug]:
    """The bugs whose conditions *host* meets."""
    return [bug for bug in load() if bug.on(host)]


def not_shown(bug: str) -> str:
    """Why a test fails that passed although the known bug with this id always shows."""
    return f"known bug {bug} did not show"


def is_not_shown(reason: str) -> bool:
    """Whether *reason* is one of :func:`not_shown`."""
    return re.fullmatch(not_shown(r"\S+"), reason) is not None


class _Entry:
    """The entry *number* of *file*, as it is written there."""

    def __init__(self, file: TomlFile, number: int, values: dict[str, Any]) -> None:
        self._file = file
        self._number = number
        self._values = values

    def error(self, key: str, text: str) -> TomlError:
        """The error about field *key*."""
        name = self._values.get("id")
        bug = f"bug {name!r}" if isinstance(name, str) else f"bug {self._number + 1} of the list"
        return self._file.error(f"{bug}: {key}: {text}", key, "bug", self._number)

    def parse(self) -> KnownBug:
        known = {field.name for field in fields(KnownBug)} - {"always"} | {"shows"}
        for key in self._values:
            if key not in known:
                raise self.error(key, f"no such field (there are {', '.join(sorted(known))})")
        findings = self._kinds("findings")
        needs = self._kinds("needs") if "needs" in self._values else findings
        if others := ", ".join(sorted(kind.name for kind in needs - findings)):
            raise self.error("needs", f"{others}: not among the findings")
        backends = self._texts("backend") if isinstance(self._values.get("backend"), list) else [self._text("backend")]
        (shows,) = self._chosen("shows", [self._text("shows")], ("always", "sometimes"))
        bug = KnownBug(
            id=self._text("id"),
            summary=self._text("summary"),
            evidence=self._text("evidence"),
            backend=self._chosen("backend", backends, _VENDORS, "vendor module"),
            findings=findings,
            always=shows == "always",
            needs=needs,
            kernels=self._kernels(),
            parameters=self._parameters(),
            cells=self._cells(),
            tests=self._tests(),
            most_pages=self._most_pages(),
            ring_lapped=self._flag("ring_lapped"),
            log=self._log(),
        )
        if not bug.cells and not bug.tests:
            raise self.error("id", "the entry names neither cells nor tests")
        return bug

    def _text(self, key: str) -> str:
        value = self._values.get(key)
        if value is None:
            raise self.error(key, "it is missing")
        if not isinstance(value, str) or not value:
            raise self.error(key, f"must be a string, not {value!r}")
        return value

    def _texts(self, key: str, default: Sequence[str] = ()) -> tuple[str, ...]:
        return self._strings(key, self._values.get(key, list(default)))

    def _strings(self, key: str, value: object) -> tuple[str, ...]:
        if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
            raise self.error(key, f"must be a list of strings, not {value!r}")
        return tuple(value)

    def _table(self, key: str) -> dict[str, Any]:
        value = self._values.get(key, {})
        if not isinstance(value, dict):
            raise self.error(key, f"must be a table in braces, not {value!r}")
        return value

    def _chosen(self, key: str, values: Iterable[str], choices: Sequence[str], what: str = "value") -> tuple[str, ...]:
        for value in values:
            if value not in choices:
                raise self.error(key, f"no such {what}: {value!r} (there are {', '.join(choices)})")
        return tuple(values)

    def _kinds(self, key: str) -> frozenset[Kind]:
        names = self._chosen(key, self._texts(key), tuple(Kind.__members__), "kind")
        if not names:
            raise self.error(key, "it is missing, or has no kind")
        return frozenset(Kind[name] for name in names)

    def _kernels(self) -> tuple[str, str]:
        bounds = self._texts("kernels", ("", ""))
        if len(bounds) != 2 or not all(re.fullmatch(r"(\d+(\.\d+)*)?", bound) for bound in bounds):
            raise self.error("kernels", f'must be ["from", "before"], such as ["6.1", "6.12"], not {list(bounds)}')
        first, before = bounds
        if first and before and version_numbers(first) >= version_numbers(before):
            raise self.error("kernels", f"no kernel is from {first} and before {before}")
        return first, before

    def _parameters(self) -> dict[str, str]:
        table = self._table("parameters")
        for name, value in table.items():
            if "." not in name or not isinstance(value, str):
                raise self.error("parameters", f'must be such as {{ "kvm.tdp_mmu" = "Y" }}, not {name!r} = {value!r}')
        return table

    def _cells(self) -> dict[str, list[str]]:
        table = self._table("cells")
        for name in self._chosen("cells", table, tuple(_VALUES), "dimension"):
            choices = _VALUES[name]
            for value in self._strings("cells", table[name]):
                if value not in choices:
                    some = f"1 to {MAX_VCPUS}" if name == "vcpus" else ", ".join(choices)
                    raise self.error("cells", f"{name} has no value {value!r} (there are {some})")
        return table

    def _tests(self) -> tuple[str, ...]:
        names = self._texts("tests")
        for name in names:
            if name not in _test_names():
                raise self.error("tests", f"no test function of selftests/ has the name {name!r}")
        return names

    def _most_pages(self) -> int | None:
        value = self._values.get("most_pages")
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise self.error("most_pages", f"must be a number from 1 on, not {value!r}")
        return value

    def _flag(self, key: str) -> bool:
        value = self._values.get(key, False)
        if not isinstance(value, bool):
            raise self.error(key, f"must be true or false, not {value!r}")
        return value

    def _log(self) -> tuple[str, ...]:
        patterns = self._texts("log")
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise self.error("log", f"{pattern!r} is no regular expression: {error}") from None
        return patterns


@cache
def _test_names() -> frozenset[str]:
    """The names of the test functions that a bug can concern: the contract tests, without the unit tests."""
    folder = ROOT / "selftests"
    files = [path for path in folder.rglob("test_*.py") if not path.is_relative_to(folder / "unit")]
    definition = re.compile(r"^\s*def (test_\w+)", re.MULTILINE)
    return frozenset(name for path in files for name in definition.findall(path.read_text(encoding="utf-8")))
