# SPDX-License-Identifier: GPL-2.0-only
"""Pre-copy live migration as a VMM does it: all memory, then what KVM reports, in rounds, and the rest with vCPUs stopped.

Reported pages are write-protected again (by GET, CLEAR or RESET) **before** they are copied while the vCPUs run, so that a
write in between is reported again (api.rst, dirty ring; the same holds for a bitmap).
"""

import mmap
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dirty_tracking.ledger import Collection, SlotPages
from dirty_tracking.recorder import Recorder
from dirty_tracking.violations import ContractViolation, Kind, Violation
from dirty_tracking.vm import PAGE
from dirty_tracking.writers_vm import WritersVm
from kvm_util.wording import counted

_SHOWN = 8
# The least number of writes of each vCPU in a round
_WRITES = 128

# Pages by slot
Pages = dict[int, set[int]]


@dataclass(frozen=True)
class Round:
    """One round of a migration.

    :ivar reported: how many bits or ring entries KVM reported
    :ivar copied: how many different pages were copied
    :ivar remaining: pages written after the copy, which the next round has to report; without slot 0
    :ivar writes: the guest's writes to test memory during the round
    :ivar ms: how long it took
    """

    round: int
    reported: int
    copied: int
    remaining: int
    writes: int
    ms: float


class Migration:
    """Copies all memslots of *vm* while its vCPUs run.

    :ivar copies: the copied memory, by slot
    :param enough: stop the vCPUs after a round that copied no more than this many pages
    :param most_rounds: or after this many rounds
    """

    def __init__(self, vm: WritersVm, enough: int, most_rounds: int) -> None:
        self.vm = vm
        self.rounds: list[Round] = []
        self._enough = enough
        self._most_rounds = most_rounds
        self._slots = dict(vm.vm.memslots)
        self.copies = {slot: mmap.mmap(-1, memslot.memory.size) for slot, memslot in self._slots.items()}
        known = list(vm.slots)
        first = known[-1].end
        for slot in self._slots.keys() - {pages.slot for pages in known}:
            # That of the guest's program: its writes are in no stream.
            known.append(SlotPages(slot, first, first + self._slots[slot].npages, known=False))
            first = known[-1].end
        self.recorder = Recorder(vm.writers, vm.mode, known)

    def run(self) -> list[Round]:
        """Migrate; the vCPUs have to be running, and are stopped afterwards."""
        for slot in self._slots:
            self.recorder.set_logging(self.vm.vm, slot, on=True)
        self._round(0, {slot: set(range(memslot.npages)) for slot, memslot in self._slots.items()})
        while len(self.rounds) <= self._most_rounds:
            self._round(len(self.rounds), None)
            if self.rounds[-1].copied <= self._enough:
                break
        self.vm.stop()
        self._round(len(self.rounds), None, stopped=True)
        return self.rounds

    def verify(self) -> None:
        """Compare the copy with the source (R12), and verify the collections.

        :raises ContractViolation: a page is different, or a report broke a rule
        """
        violations = [*self._differences(), *self.recorder.judge.verify()]
        if violations:
            raise ContractViolation(violations, f"{self.vm.mode.name}, after {counted(len(self.rounds), 'round')}")

    def _differences(self) -> Iterator[Violation]:
        for slot, memslot in self._slots.items():
            source = memslot.memory.view
            with memoryview(self.copies[slot]) as copy, copy.cast("Q") as words:
                if memslot.memory.words == words:
                    continue
                places = [slice(page * PAGE, (page + 1) * PAGE) for page in range(memslot.npages)]
                pages = [page for page, place in enumerate(places) if source[place] != copy[place]]
            some = ", ".join(map(str, pages[:_SHOWN]))
            detail = f"the copy differs from the source in {len(pages)} of {counted(memslot.npages, 'page')}: {some}"
            yield Violation(Kind.LOST, detail, slot, tuple(pages), rule="R12")

    def figures(self) -> list[dict[str, Any]]:
        """The rounds as plain data."""
        return list(map(asdict, self.rounds))

    def collect(self, stopped: bool) -> tuple[int, Pages]:
        """Collect, which write-protects the reported pages again; returns how many bits or entries there were, and the pages.

        Entries that name no page of the VM are recorded in the ledger only.
        """
        slots = self.recorder.ledger.slots
        if self.vm.mode.uses_ring:
            collections = [self._collect(slots, stopped)]
            self.vm.writers.resume_after_ring_reset()
        else:
            collections = [self._collect([slot], stopped) for slot in slots]
        numbers = set().union(*(collection.pages for collection in collections))
        pages = {slot.slot: {number - slot.first for number in numbers if number in slot.range} for slot in slots}
        return sum(collection.harvested for collection in collections), pages

    def _collect(self, slots: Sequence[SlotPages], stopped: bool) -> Collection:
        """Collect the pages of *slots*; in a mode with bitmaps that is one slot."""
        recorder = self.recorder
        with recorder.collecting(slots[0].first, slots[-1].end, stopped) as collection:
            recorder.add(collection, self.vm.take_report(stopped, slots=[pages.slot for pages in slots]))
        return collection

    def copy(self, pages: Pages) -> None:
        """Copy pages from the source."""
        for slot, numbers in pages.items():
            source, copy = self._slots[slot].memory.view, self.copies[slot]
            for page in numbers:
                where = slice(page * PAGE, (page + 1) * PAGE)
                copy[where] = bytes(source[where])

    def close(self) -> None:
        """Free the memory of the copies."""
        for copy in self.copies.values():
            copy.close()

    def transfer(self, stopped: bool) -> tuple[int, Pages]:
        """Collect and copy, in this order."""
        reported, pages = self.collect(stopped)
        self.copy(pages)
        return reported, pages

    def _transmit(self, writes: list[int]) -> None:
        """Wait as for the pages to be sent: until each vCPU has made some writes since *writes*."""
        writers = self.vm.writers

        def written() -> bool:
            return all(now >= then + _WRITES for now, then in zip(writers.published(), writes, strict=True))

        writers.wait(lambda: written() or writers.any_ring_full(), "writing")

    def _round(self, number: int, everything: Pages | None, stopped: bool = False) -> None:
        started, writes = time.monotonic(), self.vm.writers.published()
        if everything is None:
            reported, pages = self.transfer(stopped)
        else:
            reported, pages = 0, everything
            self.copy(pages)
        copied_at = self.vm.writers.published()
        if not stopped:
            self._transmit(writes)
        now = self.vm.writers.published()
        remaining: set[int] = set()
        for vcpu, stream in enumerate(self.vm.writers.streams):
            remaining.update(stream.written(copied_at[vcpu], now[vcpu]))
        copied = sum(map(len, pages.values()))
        ms = (time.monotonic() - started) * 1000
        self.rounds.append(Round(number, reported, copied, len(remaining), sum(now) - sum(writes), round(ms, 2)))
