# SPDX-License-Identifier: GPL-2.0-only
"""What a run of the matrix adds to the report of a violation: figures, history of the wrong pages, a map of the slot."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from dirty_tracking.violations import Kind, Violation
from kvm_util.wording import counted, wrapped

_FIRST_PAGES = 8
_MAP_COLUMNS = 64
_MAP_ROWS = 8

# The marks of the map; the first kind that a part of the slot has decides.
_MARKS = ((Kind.LOST, "L"), (Kind.VALUE, "V"), (Kind.SPURIOUS, "S"), (Kind.DUPLICATE, "D"))


@dataclass
class Figures:
    """The counts of a run, updated while it lasts, so that a failed run has figures too.

    :ivar dirty: pages reported, summed over the iterations
    :ivar clean: pages not reported, summed over the iterations
    :ivar exits: returns from KVM_RUN, of all vCPUs
    :ivar stalled_seconds: how long vCPUs waited for a full ring to be reset, summed over the vCPUs
    :ivar writes_per_second: by all vCPUs, while they were to write
    :ivar phases: of each phase what :meth:`Timings.summary` says
    :ivar dirty_by_iteration: pages reported, for each iteration
    :ivar ring_fill_by_iteration: the most entries that one collection found in one vCPU's ring, for each iteration; empty
        without rings
    """

    iterations: int = 0
    writes: int = 0
    dirty: int = 0
    clean: int = 0
    collections: int = 0
    ring_full_exits: int = 0
    seconds: float = 0.0
    exits: int = 0
    stalled_seconds: float = 0.0
    writes_per_second: float = 0.0
    phases: dict[str, dict[str, float]] = field(default_factory=dict)
    dirty_by_iteration: list[int] = field(default_factory=list)
    ring_fill_by_iteration: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class RunEvidence:
    """The evidence of a run.

    :ivar npages: the size of the slot
    :ivar history: returns a line about a page of the slot: its last write and its last report
    """

    violations: Sequence[Violation]
    figures: Figures
    npages: int
    history: Callable[[int], str]

    def lines(self) -> list[str]:
        figures = self.figures
        done = [
            counted(figures.writes, "write"),
            f"{counted(figures.collections, 'collection')} of dirty pages",
            counted(figures.ring_full_exits, "ring-full exit"),
        ]
        lines = [f"figures  {', '.join(done)}"]
        if pages := self._first_pages():
            lines += ["", "first pages concerned:"]
            lines += [line for page in pages for line in wrapped(self.history(page), first="  ", later="    ")]
            lines += ["", *self._map()]
        return lines

    def data(self) -> dict[str, Any]:
        return {
            "figures": asdict(self.figures),
            "history": [self.history(page) for page in self._first_pages()],
            "map": self._map(),
        }

    def _map(self) -> list[str]:
        return SlotMap.of(self.violations, self.npages).lines()

    def _first_pages(self) -> list[int]:
        """A few of the wrong pages, with some of each violation."""
        pages: dict[int, None] = {}
        for violation in self.violations:
            pages.update(dict.fromkeys([page for page in violation.pages if page < self.npages][:_FIRST_PAGES]))
        return list(pages)[: 2 * _FIRST_PAGES]


class SlotMap(NamedTuple):
    """A slot as text: what the characters mean, and rows of them, each character for a range of pages."""

    legend: str
    rows: list[str]

    @classmethod
    def of(cls, violations: Iterable[Violation], npages: int) -> "SlotMap":
        """The map of a slot of *npages* pages: the mark of a violation that a range has, or ``.``."""
        pages: dict[Kind, list[int]] = {}
        for violation in violations:
            pages.setdefault(violation.kind, []).extend(violation.pages)
        per_mark = -(-npages // (_MAP_COLUMNS * _MAP_ROWS))
        marks = ["."] * -(-npages // per_mark)
        for kind, mark in reversed(_MARKS):
            for page in pages.get(kind, []):
                if page < npages:
                    marks[page // per_mark] = mark
        rows = ["".join(marks[start : start + _MAP_COLUMNS]) for start in range(0, len(marks), _MAP_COLUMNS)]
        legend = ", ".join(f"{mark} {kind.value}" for kind, mark in _MARKS)
        return cls(f"slot map, {counted(per_mark, 'page')} a character: {legend}", rows)

    def lines(self) -> list[str]:
        """The map for a terminal."""
        return [*wrapped(self.legend), *(f"  {row}" for row in self.rows)]
