# SPDX-License-Identifier: GPL-2.0-only
"""A copy of a VM's memory that is kept up to date with the pages that KVM reports: the core of migration and snapshot."""

import mmap
from collections.abc import Iterator, Sequence

from dirty_tracking.ledger import Collection, SlotPages
from dirty_tracking.recorder import Recorder
from dirty_tracking.violations import ContractViolation, Kind, Violation
from dirty_tracking.vm import PAGE
from dirty_tracking.writers_vm import WritersVm
from kvm_util.wording import counted

_SHOWN = 8

# Pages by slot
Pages = dict[int, set[int]]


class MemoryCopy:
    """A copy of all memslots of *vm*.

    :ivar copies: the copied memory, by slot; zeros at first
    :ivar everything: all pages of all slots
    """

    def __init__(self, vm: WritersVm) -> None:
        self.vm = vm
        self._slots = dict(vm.vm.memslots)
        self.everything: Pages = {slot: set(range(memslot.npages)) for slot, memslot in self._slots.items()}
        self.copies = {slot: mmap.mmap(-1, memslot.memory.size) for slot, memslot in self._slots.items()}
        known = list(vm.slots)
        first = known[-1].end
        for slot in self._slots.keys() - {pages.slot for pages in known}:
            # That of the guest's program: its writes are in no stream.
            known.append(SlotPages(slot, first, first + self._slots[slot].npages, known=False))
            first = known[-1].end
        self.recorder = Recorder(vm.writers, vm.mode, known)

    def enable_logging(self, stopped: bool = False) -> None:
        """Enable dirty logging of all slots."""
        for slot in self._slots:
            self.recorder.set_logging(self.vm.vm, slot, on=True, stopped=stopped)

    def verify(self) -> None:
        """Compare the copy with the source (R12), and verify the collections.

        :raises ContractViolation: a page is different, or a report broke a rule
        """
        violations = [*self._differences(), *self.recorder.judge.verify()]
        if violations:
            raise ContractViolation(violations, self.described())

    def described(self) -> str:
        """What was verified, for the message."""
        return self.vm.mode.name

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

    def transfer(self, stopped: bool) -> tuple[int, Pages]:
        """Collect and copy, in this order."""
        reported, pages = self.collect(stopped)
        self.copy(pages)
        return reported, pages

    def close(self) -> None:
        """Free the memory of the copies."""
        for copy in self.copies.values():
            copy.close()
