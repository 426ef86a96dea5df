# SPDX-License-Identifier: GPL-2.0-only
"""Violations of the contract of dirty tracking, and the one exception that carries them."""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Any, Protocol

_SHOWN = 8


class Kind(Enum):
    """The ways to break the contract; each value is its description."""

    LOST = "written but not reported"
    SPURIOUS = "reported but not written"
    VALUE = "wrong value in memory"
    DUPLICATE = "more ring entries than writes"
    WRONG_SLOT = "ring entry names another slot"
    BAD_OFFSET = "page beyond the end of the slot"
    RESET_COUNT = "KVM_RESET_DIRTY_RINGS reset another number of entries than were harvested"
    GAP = "dirty ring entries after one that is not dirty"
    STUCK = "KVM_EXIT_DIRTY_RING_FULL again with nothing to harvest"
    OTHER = "another answer than the contract allows"


@dataclass(frozen=True)
class Violation:
    """One way in which KVM's reports, or the memory after an iteration, broke the contract.

    :ivar detail: what was seen, in words
    :ivar slot: the memslot concerned; None where it is about no single one
    :ivar pages: the pages concerned, ascending, as page numbers of the slot; empty where there are none
    :ivar vcpu: the vCPU whose writes (LOST, VALUE) or whose ring it is about; None for a bitmap
    :ivar iteration: the iteration of the run, counted from 1; 0 where a test has none
    :ivar collection: the collection of the run, counted from 1; 0 where it is about memory, or the test has no count
    :ivar rule: the rule of docs/contract.md that it breaks; empty where a test states its own
    :ivar ring_lapped: whether a vCPU had, between two collections, made more writes than its ring has entries; False where
        a test does not count that
    """

    kind: Kind
    detail: str
    slot: int | None = None
    pages: tuple[int, ...] = ()
    vcpu: int | None = None
    iteration: int = 0
    collection: int = 0
    rule: str = ""
    ring_lapped: bool = False

    def __str__(self) -> str:
        where = [
            f"iteration {self.iteration}" if self.iteration else "",
            f"collection {self.collection}" if self.collection else "memory" if self.kind is Kind.VALUE else "",
            f"slot {self.slot}" if self.slot is not None else "",
            f"vCPU {self.vcpu}" if self.vcpu is not None else "",
        ]
        place = ", ".join(part for part in where if part)
        rule = f" [{self.rule}]" if self.rule else ""
        kind = self.kind.name + rule + ("" if self.kind is Kind.OTHER else f" ({self.kind.value})")
        return f"{place}{': ' if place else ''}{kind}: {self.detail}"


class Evidence(Protocol):
    """What a test knows about a violation beyond the violation itself."""

    def lines(self) -> list[str]:
        """The evidence for the failure report, in lines that are shown as they are."""

    def data(self) -> dict[str, Any]:
        """The evidence for the results folder, as data that JSON can hold."""


class ContractViolation(AssertionError):
    """KVM broke the contract of dirty tracking.

    :ivar violations: what was wrong, in the order in which it was found; one at least
    :ivar evidence: what else the report shows; None for nothing
    :param doing: what was done in the test, where the violations do not say it
    """

    def __init__(self, violations: Iterable[Violation], doing: str = "", evidence: Evidence | None = None) -> None:
        self.violations = tuple(violations)
        self.evidence = evidence
        lines = [str(violation) for violation in self.violations[:_SHOWN]]
        if len(self.violations) > _SHOWN:
            lines.append(f"and {len(self.violations) - _SHOWN} more")
        if doing:
            lines[0] = f"{doing}: {lines[0]}"
        super().__init__("\n".join(lines))

    @property
    def kinds(self) -> frozenset[Kind]:
        """The kinds of all violations."""
        return frozenset(violation.kind for violation in self.violations)


def violated(kind: Kind, detail: str, doing: str = "") -> ContractViolation:
    """The exception for a single violation that is about no page."""
    return ContractViolation([Violation(kind, detail)], doing)
