# SPDX-License-Identifier: GPL-2.0-only
"""Collecting, resetting, toggling dirty logging, and signals, all at once, from threads of their own beside a VM's vCPUs."""

import errno
import random
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

from dirty_tracking.bitmap import BITS_PER_WORD, new_bitmap, set_pages
from dirty_tracking.ledger import Reset, SlotPages, ZapAll
from dirty_tracking.recorder import Recorder
from dirty_tracking.shared_rings import SharedRings
from dirty_tracking.vcpu_thread import KICK_SIGNAL, State
from dirty_tracking.violations import ContractViolation
from dirty_tracking.writers import POLL
from dirty_tracking.writers_vm import WritersVm
from kvm_util.ioctl import KvmError

# How many times HANG_TIMEOUT to wait for threads whose progress is not observed
_PATIENCE = 3
# Most signals in a burst
_BURST = 30

Operation = Callable[[], object]


class Collectors:
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

    def drop_page_tables(self, change: Operation) -> None:
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


class Worker(threading.Thread):
    """Does one operation after the other, each after some more writes of the vCPUs.

    :param pause: how many writes to wait for between two operations at most
    :ivar failure: what ended it, if anything did
    """

    def __init__(
        self, vm: WritersVm, name: str, operations: Iterable[Operation], draw: random.Random, pause: int
    ) -> None:
        super().__init__(name=name, daemon=True)
        self.failure: BaseException | None = None
        self._vm = vm
        self._operations = operations
        self._draw = draw
        self._pause = pause
        self._quit = threading.Event()
        self._running = False
        self._lock = threading.Lock()

    def signal(self) -> None:
        """Send it a signal if it runs: none may be sent to a thread that has ended."""
        with self._lock:
            if self._running and self.ident is not None:
                signal.pthread_kill(self.ident, KICK_SIGNAL)

    def quit(self) -> None:
        """End it after the operation that it is doing; does not wait for it."""
        self._quit.set()

    def run(self) -> None:
        """The thread's own code; not to be called."""
        self._running = True
        try:
            for operation in self._operations:
                self._wait_for_writes()
                if self._quit.is_set():
                    return
                operation()
        except BaseException as error:  # noqa: BLE001 (the main thread raises it)
            self.failure = error
        finally:
            with self._lock:
                self._running = False

    def _wait_for_writes(self) -> None:
        """Wait until the vCPUs have made some more writes, or one of them waits for its ring."""
        writers = self._vm.writers
        goal = sum(writers.published()) + self._draw.randint(0, self._pause)
        while sum(writers.published()) < goal and not self._quit.wait(POLL):
            if writers.any_ring_full():
                return


def race(vm: WritersVm, workers: Sequence[Worker], background: Sequence[Worker] = ()) -> None:
    """Run *workers* to completion while the vCPUs write; *background* workers loop until then.

    Each vCPU writes at least once. The vCPUs are stopped afterwards.
    """
    writers = vm.writers
    started = writers.published()
    everyone = (*workers, *background)
    writers.helpers[:] = everyone
    writers.resume()
    for worker in everyone:
        worker.start()

    def done() -> bool:
        written = all(now > then for now, then in zip(writers.published(), started, strict=True))
        return written and not any(worker.is_alive() for worker in workers)

    writers.wait(done, "the race", patience=_PATIENCE)
    for worker in background:
        worker.quit()
    writers.wait(lambda: not any(worker.is_alive() for worker in background), "the end of the race", patience=_PATIENCE)
    vm.stop()


def signal_vcpus_randomly(vm: WritersVm, draw: random.Random) -> Operation:
    """A burst of signals to vCPUs in KVM_RUN, with and without ``immediate_exit``."""

    def burst() -> None:
        for _ in range(draw.randint(1, _BURST)):
            thread = draw.choice(vm.writers.threads)
            if draw.random() < 0.5:
                thread.kick()
                continue
            with vm.writers.cond:
                if thread.state is not State.ENDED and thread.ident is not None:
                    signal.pthread_kill(thread.ident, KICK_SIGNAL)

    return burst


def signal_workers_randomly(workers: Sequence[Worker], draw: random.Random) -> Operation:
    """A burst of signals to threads that may be in an ioctl of the VM's."""

    def burst() -> None:
        for _ in range(draw.randint(1, _BURST)):
            draw.choice(workers).signal()

    return burst
