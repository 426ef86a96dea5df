# SPDX-License-Identifier: GPL-2.0-only
"""What one collection over a whole VM brought: entries of a bitmap, of a ring per vCPU, or of both."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from dirty_tracking.violations import ContractViolation, Kind, Violation
from kvm_util.wording import counted


@dataclass
class Source:
    """What one ring reported, or the bitmaps, in order: entry *i* is page ``offsets[i]`` of memslot ``slots[i]``.

    :ivar vcpu: whose ring it is; None for bitmaps
    :ivar behind_gap: how many dirty entries of the ring lie behind a clean one; looked at when no vCPU runs
    """

    slots: list[int] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    vcpu: int | None = None
    behind_gap: int = 0

    def add(self, slot: int, offsets: list[int]) -> None:
        """Add pages of a memslot."""
        self.slots += [slot] * len(offsets)
        self.offsets += offsets

    def of_slot(self, slot: int) -> list[int]:
        """The pages that are of memslot *slot*, in order, with what is there several times."""
        if self.slots.count(slot) == len(self.slots):
            return self.offsets
        return [offset for its, offset in zip(self.slots, self.offsets, strict=True) if its == slot]


@dataclass
class DirtyReport:
    """One collection: all that KVM reported, and what KVM_RESET_DIRTY_RINGS said about it.

    :ivar sources: the rings in the order of the vCPUs, and after them the bitmaps; those that the log mode has
    :ivar reset: how many entries KVM_RESET_DIRTY_RINGS reset, over all calls
    """

    sources: list[Source]
    reset: int = 0

    @property
    def harvested(self) -> int:
        """How many ring entries were harvested."""
        return sum(len(source.offsets) for source in self.sources if source.vcpu is not None)

    @property
    def count(self) -> int:
        """How much was reported: ring entries, and bits."""
        return sum(len(source.offsets) for source in self.sources)

    @property
    def slots(self) -> set[int]:
        """The memslots that something was reported of."""
        return {slot for source in self.sources for slot in source.slots}

    def entries(self, slot: int) -> list[int]:
        """The pages reported of memslot *slot*, in the order of each source, with what was reported several times."""
        return [offset for source in self.sources for offset in source.of_slot(slot)]

    def dirty(self, slot: int) -> set[int]:
        """The pages reported of memslot *slot*."""
        return set().union(*(source.of_slot(slot) for source in self.sources))

    def violations(self, npages: Mapping[int, int] | None = None) -> list[Violation]:
        """What is wrong with the report whatever the guest wrote: GAP and RESET_COUNT, and entries of no page.

        :param npages: the size of each memslot, in pages. Then WRONG_SLOT (a memslot that is not among them) and
            BAD_OFFSET (a page beyond the end) are looked for too; not to be given when a ring may have entries of a
            memslot that was deleted or made smaller since
        """
        found = []
        for source in self.sources:
            if npages is not None:
                found += _of_no_page(source, npages)
            if source.behind_gap:
                detail = f"a harvest in order does not reach {counted(source.behind_gap, 'entry', 'entries')}"
                found.append(Violation(Kind.GAP, detail, vcpu=source.vcpu))
        if self.reset != self.harvested:
            found.append(Violation(Kind.RESET_COUNT, f"harvested {self.harvested}, reset {self.reset}"))
        return found

    def check(self, npages: Mapping[int, int] | None = None) -> None:
        """As :meth:`violations`.

        :raises ContractViolation: there are some
        """
        if violations := self.violations(npages):
            raise ContractViolation(violations)


def _of_no_page(source: Source, npages: Mapping[int, int]) -> list[Violation]:
    """What *source* has of memslots that are not there, and of pages that they do not have."""
    found = []
    slots = set(source.slots)
    if unknown := sorted(slots - npages.keys()):
        pages = sorted(page for slot in unknown for page in source.of_slot(slot))
        detail = f"{counted(len(pages), 'entry', 'entries')} of memslot {', '.join(map(hex, unknown[:4]))}"
        found.append(Violation(Kind.WRONG_SLOT, detail, None, tuple(pages), source.vcpu))
    for slot in sorted(slots & npages.keys()):
        pages = source.of_slot(slot)
        if max(pages) >= npages[slot]:
            beyond = sorted({page for page in pages if page >= npages[slot]})
            detail = f"{counted(len(beyond), 'page')}, the slot has {npages[slot]}"
            found.append(Violation(Kind.BAD_OFFSET, detail, slot, tuple(beyond), source.vcpu))
    return found
