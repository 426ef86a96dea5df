# SPDX-License-Identifier: GPL-2.0-only
"""What one collection over a whole VM brought: entries of a bitmap, of a ring per vCPU, or of both."""

from collections.abc import Sequence
from dataclasses import dataclass

from dirty_tracking.violations import ContractViolation, Kind, Violation
from kvm_util.wording import counted


@dataclass
class Source:
    """What one ring reported, or the bitmaps, in order: entry *i* is page ``offsets[i]`` of memslot ``slots[i]``.

    :ivar vcpu: whose ring it is; None for bitmaps
    :ivar behind_gap: how many dirty entries of the ring come after a clean one; looked at when no vCPU runs
    """

    slots: Sequence[int]
    offsets: Sequence[int]
    vcpu: int | None = None
    behind_gap: int = 0

    def of_slot(self, slot: int) -> Sequence[int]:
        """The pages that are of memslot *slot*, in order, with what is there several times."""
        if self.slots.count(slot) == len(self.slots):
            return self.offsets
        return [offset for of, offset in zip(self.slots, self.offsets, strict=True) if of == slot]


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
    def reported(self) -> int:
        """How many bits were set and ring entries harvested, in all."""
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

    def check(self) -> None:
        """Check what must hold whatever the guest wrote.

        :raises ContractViolation: a ring has dirty entries after one that is not (GAP), or KVM reset another number of
            entries than were harvested (RESET_COUNT)
        """
        found = [
            Violation(
                Kind.GAP,
                f"a harvest in order does not reach {counted(source.behind_gap, 'entry', 'entries')}",
                vcpu=source.vcpu,
                rule="R9",
            )
            for source in self.sources
            if source.behind_gap
        ]
        if self.reset != self.harvested:
            found.append(Violation(Kind.RESET_COUNT, f"harvested {self.harvested}, reset {self.reset}", rule="R8"))
        if found:
            raise ContractViolation(found)
