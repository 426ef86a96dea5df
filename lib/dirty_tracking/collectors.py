# SPDX-License-Identifier: GPL-2.0-only
"""Collecting, resetting, switching tracking, and signals, all at once, from threads of their own beside a VM's vCPUs."""

import errno
import random
import signal
import threading
from collections.abc import Callable, Iterable, Sequence

from dirty_tracking.bitmap import BITS_PER_WORD, new_bitmap, set_pages
from dirty_tracking.collection_log import Collection, CollectionLog, Drop, Toggle
from dirty_tracking.modes import disable_dirty_logging, enable_dirty_logging
from dirty_tracking.platform import uses_pml
from dirty_tracking.reset_ledger import ResetLedger
from dirty_tracking.vcpu_thread import KICK_SIGNAL, State
from dirty_tracking.violations import ContractViolation, Kind, Violation, violated
from dirty_tracking.writers import POLL
from dirty_tracking.writers_vm import Area, WritersVm
from kvm_util.host import this_host
from kvm_util.ioctl import KvmError

# How many times a thread that was not seen to make progress may take the time for one that hangs
_PATIENCE = 3
# Most signals in a row
_BURST = 30

Operation = Callable[[], object]


class Collectors:
    """What may be done with the dirty pages of *vm*, by any thread, and a log of what came."""

    def __init__(self, vm: WritersVm) -> None:
        self.vm = vm
        pml = uses_pml(this_host())
        self.log = CollectionLog(vm.writers.streams, vm.mode.uses_ring, vm.mode.initially_set, may_log_twice=pml)
        self.ledger = ResetLedger(vm.vm, vm.mode.rings(vm.vm)) if vm.mode.uses_ring else None

    def switch(self, area: Area, on: bool, stopped: bool = False) -> None:
        """Switch the tracking of a slot on or off."""
        toggle = Toggle(self.log.now(), self._writes(), stopped, on=on, first=area.first)
        (enable_dirty_logging if on else disable_dirty_logging)(self.vm.vm, area.slot)
        toggle.after, toggle.end = self._writes(), self.log.now()
        self.log.add(toggle)

    def drop_page_tables(self, change: Operation) -> None:
        """Move or delete a slot that no vCPU writes: *change* does it."""
        drop = Drop(self.log.now(), self._writes(), exact=False)
        change()
        drop.after, drop.end = self._writes(), self.log.now()
        self.log.add(drop)

    def collect(self, area: Area, stopped: bool = False) -> None:
        """GET all of a slot's bitmap, and clear what was reported."""
        event = self._begin(area.first, area.end, stopped)

        def get() -> list[int]:
            kick = None if stopped else self.vm.writers.kick_running
            return self.vm.mode.collect(self.vm.vm, kick, slots=[area.slot]).entries(area.slot)

        self._take_bitmap(event, get)

    def collect_range(self, area: Area, first_page: int, num_pages: int) -> None:
        """GET all of a slot's bitmap, and CLEAR what it has of *num_pages* pages from *first_page* on; manual modes."""
        event = self._begin(area.first + first_page, area.first + first_page + num_pages, stopped=False)

        def get() -> list[int]:
            self.vm.mode.flush_cpu_logs(self.vm.writers.kick_running)
            bitmap = new_bitmap(area.memslot.npages)
            self.vm.vm.get_dirty_log(area.slot, bitmap)
            part = bitmap[first_page // 8 : (first_page + -(-num_pages // BITS_PER_WORD) * BITS_PER_WORD) // 8]
            self.vm.vm.clear_dirty_log(area.slot, part, first_page, num_pages)
            return [first_page + page for page in set_pages(part)]

        self._take_bitmap(event, get)

    def harvest(self, most: int | None = None, stopped: bool = False) -> None:
        """Harvest all rings, or *most* entries of each at most, and have KVM take that back."""
        assert self.ledger is not None
        event = self._begin(0, self.vm.areas[-1].end, stopped)
        event.complete = most is None
        if not stopped:
            self.vm.mode.flush_cpu_logs(self.vm.writers.kick_running)
        harvests = [self.ledger.harvest(vcpu, most) for vcpu in range(len(self.vm.vm.vcpus))]
        self.ledger.reset_up_to([position for _, position in harvests])
        event.reported = [self._numbers(vcpu, entries) for vcpu, (entries, _) in enumerate(harvests)]
        self._end(event)
        self.vm.writers.rings_were_reset()

    def reset(self) -> None:
        """KVM_RESET_DIRTY_RINGS, with nothing harvested by this thread."""
        assert self.ledger is not None
        self.ledger.reset()

    def collect_all(self, stopped: bool) -> None:
        """Collect from all slots that are tracked."""
        if self.ledger is not None:
            self.harvest(stopped=stopped)
            return
        for area in self.vm.areas:
            self.collect(area, stopped)

    def check(self) -> None:
        """Collect what is left, with all vCPUs stopped, and hold all since the last check to what was written.

        :raises ContractViolation: KVM's answers cannot be right
        """
        self.collect_all(stopped=True)
        if self.ledger is not None:
            self.ledger.settle()
        self.log.check([(area.first, area.end) for area in self.vm.areas])

    def _begin(self, first: int, last: int, stopped: bool) -> Collection:
        return Collection(self.log.now(), self._writes(), stopped, first=first, last=last)

    def _take_bitmap(self, event: Collection, get: Callable[[], list[int]]) -> None:
        area = next(area for area in self.vm.areas if event.first < area.end)
        try:
            pages = get()
        except KvmError as error:
            if error.errno != errno.ENOENT:
                raise
            event.refused = True
            pages = []
        if beyond := [page for page in pages if area.first + page >= area.end]:
            raise ContractViolation([Violation(Kind.BAD_OFFSET, f"{beyond[:8]}", area.slot, tuple(beyond))])
        event.reported = [[area.first + page for page in pages]]
        self._end(event)

    def _end(self, event: Collection) -> None:
        event.after, event.end = self._writes(), self.log.now()
        self.log.add(event)

    def _numbers(self, vcpu: int, entries: Sequence[tuple[int, int]]) -> list[int]:
        numbers = []
        for slot, offset in entries:
            number = self.vm.number(slot, offset)
            if number is None:
                raise violated(
                    Kind.WRONG_SLOT, f"the ring of vCPU {vcpu} has an entry of slot {slot:#x}, offset {offset:#x}"
                )
            numbers.append(number)
        return numbers

    def _writes(self) -> list[int]:
        return self.vm.writers.published()


class Worker(threading.Thread):
    """Does one operation after the other, each after some writes more of the vCPUs.

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
        """Send it a signal, if it is at work: one must not be sent to a thread that has ended."""
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
        except BaseException as error:  # noqa: BLE001 (told to the main thread, which raises it)
            self.failure = error
        finally:
            with self._lock:
                self._running = False

    def _wait_for_writes(self) -> None:
        """Wait until the vCPUs made some writes more, or one of them waits for its ring."""
        writers = self._vm.writers
        goal = sum(writers.published()) + self._draw.randint(0, self._pause)
        while sum(writers.published()) < goal and not self._quit.wait(POLL):
            if writers.any_ring_full():
                return


def work_together(vm: WritersVm, workers: Sequence[Worker], beside: Sequence[Worker] = ()) -> None:
    """Run *workers* to their end while the vCPUs write, and *beside* them others, which have no end.

    It lasts until each vCPU has written something at least. The vCPUs are stopped then.
    """
    writers = vm.writers
    started = writers.published()
    everyone = (*workers, *beside)
    writers.helpers[:] = everyone
    writers.let_go()
    for worker in everyone:
        worker.start()

    def done() -> bool:
        written = all(now > then for now, then in zip(writers.published(), started, strict=True))
        return written and not any(worker.is_alive() for worker in workers)

    writers.wait(done, "working together", patience=_PATIENCE)
    for worker in beside:
        worker.quit()
    writers.wait(lambda: not any(worker.is_alive() for worker in beside), "the end of the work", patience=_PATIENCE)
    vm.stop()


def storm_at_vcpus(vm: WritersVm, draw: random.Random) -> Operation:
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


def storm_at(workers: Sequence[Worker], draw: random.Random) -> Operation:
    """A burst of signals to threads that may be in an ioctl of the VM's."""

    def burst() -> None:
        for _ in range(draw.randint(1, _BURST)):
            draw.choice(workers).signal()

    return burst
