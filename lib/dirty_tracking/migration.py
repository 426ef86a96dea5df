# SPDX-License-Identifier: GPL-2.0-only
"""Pre-copy live migration as a VMM does it: all memory, again and again what KVM reports, and the rest when all is stopped.

What is reported is tracked anew (CLEAR, reset, or GET itself) **before** the pages are read while the vCPUs run: a write in
between then is reported again (api.rst 8.29; the same holds for a bitmap).
"""

import mmap
import time
from dataclasses import asdict, dataclass
from typing import Any

from dirty_tracking.cell import PAGE
from dirty_tracking.modes import enable_dirty_logging
from dirty_tracking.violations import Kind, violated
from dirty_tracking.writers_vm import WritersVm
from kvm_util.wording import counted

_SHOWN = 8
# How many writes each vCPU makes in a round, at least
_WRITES = 128

# Pages by slot
Pages = dict[int, set[int]]


@dataclass(frozen=True)
class Round:
    """One round of a migration.

    :ivar reported: what KVM reported: bits, or ring entries
    :ivar copied: different pages among them
    :ivar remaining: pages written since, when the copy was made: what the next round will find at least; slot 0 not counted
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
    """Copies the memory of *vm*, all slots of it, while its vCPUs run.

    :ivar copies: the copied memory, by slot
    :param enough: stop the vCPUs when a round copied no more than so many pages
    :param most_rounds: or after so many rounds
    """

    def __init__(self, vm: WritersVm, enough: int, most_rounds: int) -> None:
        self.vm = vm
        self.rounds: list[Round] = []
        self._enough = enough
        self._most_rounds = most_rounds
        self._slots = dict(vm.vm.memslots)
        self.copies = {slot: mmap.mmap(-1, memslot.memory.size) for slot, memslot in self._slots.items()}

    def run(self) -> list[Round]:
        """Migrate; the vCPUs have to be running, and are stopped afterwards."""
        for slot in self._slots:
            enable_dirty_logging(self.vm.vm, slot)
        self._round(0, {slot: set(range(memslot.npages)) for slot, memslot in self._slots.items()})
        while len(self.rounds) <= self._most_rounds:
            self._round(len(self.rounds), None)
            if self.rounds[-1].copied <= self._enough:
                break
        self.vm.stop()
        self._round(len(self.rounds), None, stopped=True)
        return self.rounds

    def compare(self) -> None:
        """Hold the copy to the source.

        :raises ContractViolation: a page is different
        """
        wrong = []
        for slot, memslot in self._slots.items():
            source = memslot.memory.view
            with memoryview(self.copies[slot]) as copy, copy.cast("Q") as words:
                if memslot.memory.words == words:
                    continue
                where = [slice(page * PAGE, (page + 1) * PAGE) for page in range(memslot.npages)]
                pages = [page for page, its in enumerate(where) if source[its] != copy[its]]
            some = ", ".join(map(str, pages[:_SHOWN]))
            wrong.append(f"slot {slot}: {len(pages)} of {counted(memslot.npages, 'page')}: {some}")
        if wrong:
            after = f"{self.vm.mode.name}: after {counted(len(self.rounds), 'round')}"
            raise violated(Kind.LOST, f"{after} the copy differs from the source in {'; '.join(wrong)}")

    def figures(self) -> list[dict[str, Any]]:
        """The rounds as plain data."""
        return [asdict(one) for one in self.rounds]

    def collect(self, stopped: bool) -> tuple[int, Pages]:
        """Collect the dirty pages, which KVM write-protects again; returns how much KVM reported, and the pages.

        :raises ContractViolation: an entry is of no page of the VM's, or KVM reset another number of ring entries
        """
        kick = None if stopped else self.vm.writers.kick_running
        report = self.vm.mode.collect(self.vm.vm, kick)
        report.check({slot: memslot.npages for slot, memslot in self._slots.items()})
        self.vm.writers.rings_were_reset()
        return report.count, {slot: report.dirty(slot) for slot in self._slots}

    def copy(self, pages: Pages) -> None:
        """Copy pages from the source."""
        for slot, its in pages.items():
            source, copy = self._slots[slot].memory.view, self.copies[slot]
            for page in its:
                where = slice(page * PAGE, (page + 1) * PAGE)
                copy[where] = bytes(source[where])

    def close(self) -> None:
        """Give the copy's memory back."""
        for copy in self.copies.values():
            copy.close()

    def transfer(self, stopped: bool) -> tuple[int, Pages]:
        """Collect and copy, in this order."""
        reported, pages = self.collect(stopped)
        self.copy(pages)
        return reported, pages

    def _transmit(self, writes: list[int]) -> None:
        """Take the time that it takes to send the pages: until each vCPU has made some writes since *writes*."""
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
            remaining.update(stream.last_writes(copied_at[vcpu], now[vcpu]))
        copied = sum(map(len, pages.values()))
        ms = (time.monotonic() - started) * 1000
        self.rounds.append(Round(number, reported, copied, len(remaining), sum(now) - sum(writes), round(ms, 2)))
