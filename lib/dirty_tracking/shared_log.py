# SPDX-License-Identifier: GPL-2.0-only
"""The dirty log of a VM whose vCPUs write, which several threads collect, clear, reset and toggle at once."""

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from dirty_tracking.bitmap import BITS_PER_WORD, new_bitmap, set_pages
from dirty_tracking.ledger import Reset, SlotPages, ZapAll
from dirty_tracking.recorder import Recorder
from dirty_tracking.shared_rings import SharedRings
from dirty_tracking.violations import ContractViolation
from dirty_tracking.writers_vm import WritersVm
from kvm_util.ioctl import KvmError


class SharedLog:
    """Dirty-log operations on *vm*, which any thread may call; each is recorded in the ledger.

    :ivar rings: the dirty rings; None where the mode has a bitmap
    """

    def __init__(self, vm: WritersVm) -> None:
        self.vm = vm
        self._recorder = Recorder(vm.writers, vm.mode, vm.slots)
        self.ledger = self._recorder.ledger
        self.judge = self._recorder.judge
        self.rings = SharedRings(vm.vm, vm.mode.rings(vm.vm)) if vm.mode.uses_ring else None

    def set_logging(self, slot: SlotPages, on: bool, stopped: bool = False) -> None:
        """Enable or disable dirty logging of a slot."""
        self._recorder.set_logging(self.vm.vm, slot.slot, on, stopped)

    def set_all_logging(self, on: bool) -> None:
        """Enable or disable dirty logging of all slots, with all vCPUs stopped."""
        for slot in self.vm.slots:
            self.set_logging(slot, on, stopped=True)

    def drop_page_tables(self, change: Callable[[], None]) -> None:
        """Move or delete a slot that no vCPU writes: *change* does it."""
        with self._recorder.recording(ZapAll(), exact=False):
            change()

    def collect(self, slot: SlotPages, stopped: bool = False) -> None:
        """GET a whole slot's bitmap, and clear what was reported."""
        with self._collecting(slot, slot.first, slot.end, stopped) as pages:
            pages += self.vm.take_report(stopped, slots=[slot.slot]).entries(slot.slot)

    def collect_range(self, slot: SlotPages, first_page: int, num_pages: int) -> None:
        """GET a whole slot's bitmap, and CLEAR what it has of *num_pages* pages from *first_page* on; manual modes."""
        first = slot.first + first_page
        with self._collecting(slot, first, first + num_pages, stopped=False) as pages:
            self._recorder.kick()
            bitmap = new_bitmap(len(slot.range))
            self.vm.vm.get_dirty_log(slot.slot, bitmap)
            part = bitmap[first_page // 8 : (first_page + -(-num_pages // BITS_PER_WORD) * BITS_PER_WORD) // 8]
            self.vm.vm.clear_dirty_log(slot.slot, part, first_page, num_pages)
            pages += [first_page + page for page in set_pages(part)]

    def harvest(self, most: int | None = None, stopped: bool = False) -> None:
        """Harvest all rings, or *most* entries of each at most, and reset what was harvested."""
        assert self.rings is not None
        with self._recorder.collecting(0, self.vm.slots[-1].end, stopped) as event:
            event.complete = most is None
            if not stopped:
                self._recorder.kick()
            positions = []
            for vcpu in range(len(self.vm.vm.vcpus)):
                slots, offsets, position = self.rings.harvest(vcpu, most)
                event.add(*self.ledger.entry_numbers(slots, offsets))
                positions.append(position)
            event.reset = self.rings.reset_up_to(positions)
        self.vm.writers.resume_after_ring_reset()

    def reset(self) -> None:
        """KVM_RESET_DIRTY_RINGS, with nothing harvested by this thread."""
        assert self.rings is not None
        reset = Reset(self.ledger.now())
        reset.count = self.rings.reset()
        reset.end = self.ledger.now()
        self.ledger.record(reset)

    def collect_all(self, stopped: bool) -> None:
        """Collect from all slots."""
        if self.rings is not None:
            self.harvest(stopped=stopped)
            return
        for slot in self.vm.slots:
            self.collect(slot, stopped)

    def check(self) -> None:
        """Collect what is left, with all vCPUs stopped, and verify what was recorded since the last check.

        :raises ContractViolation: KVM's reports broke a rule
        """
        self.collect_all(stopped=True)
        if violations := self.judge.verify():
            raise ContractViolation(violations)

    @contextmanager
    def _collecting(self, slot: SlotPages, first: int, last: int, stopped: bool) -> Iterator[list[int]]:
        """Record a collection of a slot's bitmap, whose pages the context adds to the list."""
        with self._recorder.collecting(first, last, stopped) as event:
            pages: list[int] = []
            try:
                yield pages
            except KvmError as error:
                if error.errno != errno.ENOENT:
                    raise
                event.refused = True
            event.add(*self.ledger.page_numbers(slot.slot, pages))
