# SPDX-License-Identifier: GPL-2.0-only
"""The list of known kernel bugs, ``known_bugs.toml``: which of them concern a cell or a test on this host."""

import re
import tomllib
from collections.abc import Sequence, Set
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from lib.cell import Cell
from lib.host import Host, version_numbers
from lib.oracle import Finding, Kind

PATH = Path(__file__).resolve().parent.parent / "known_bugs.toml"


class KnownBugsError(ValueError):
    """The list has an entry that cannot be understood."""


@dataclass(frozen=True)
class KnownBug:
    """An entry of the list; the fields are described there."""

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

    def concerns_cell(self, cell: Cell) -> bool:
        """Whether *cell* is one of those named."""
        return bool(self.cells) and all(str(getattr(cell, name)) in values for name, values in self.cells.items())

    def explains(self, findings: Sequence[Finding]) -> bool:
        """Whether all of *findings* are of kinds that the bug causes, and one of them tells that it is this bug."""
        return self.explains_kinds({finding.kind for finding in findings})

    def explains_kinds(self, kinds: Set[Kind]) -> bool:
        """The same for the *kinds* of findings."""
        return kinds <= self.findings and bool(kinds & self.needs)

    def explains_log(self, titles: Sequence[str]) -> bool:
        """Whether a report in the kernel's log is one that the bug causes, by all of its titles; without one it is not."""
        return bool(titles) and all(any(re.search(pattern, title) for pattern in self.log) for title in titles)


def load(path: Path = PATH) -> list[KnownBug]:
    """Read the list.

    :raises KnownBugsError: an entry lacks a field, has an unknown one, or names a kind or dimension that does not exist
    """
    try:
        data = tomllib.loads(path.read_text())
        return [_parse(entry) for entry in data.get("bug", [])]
    except (tomllib.TOMLDecodeError, KeyError, TypeError, ValueError) as error:
        raise KnownBugsError(f"{path.name}: {error}") from error


def _parse(entry: dict[str, Any]) -> KnownBug:
    values = dict(entry)
    shows = values.pop("shows")
    if shows not in ("always", "sometimes"):
        raise ValueError(f'{entry["id"]}: shows must be "always" or "sometimes", not {shows!r}')
    unknown = set(values.get("cells", {})) - {field.name for field in fields(Cell)}
    if unknown:
        raise ValueError(f"{entry['id']}: no such dimension: {', '.join(sorted(unknown))}")
    if not values.get("cells") and not values.get("tests"):
        raise ValueError(f"{entry['id']}: names neither cells nor tests")
    for name in ("findings", "needs"):
        if name in values:
            values[name] = frozenset(Kind[kind] for kind in values[name])
    if isinstance(values.get("backend"), str):
        values["backend"] = [values["backend"]]
    for name in ("backend", "kernels", "tests", "log"):
        if name in values:
            values[name] = tuple(values[name])
    return KnownBug(always=shows == "always", **values)
