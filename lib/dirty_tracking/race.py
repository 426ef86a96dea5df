# SPDX-License-Identifier: GPL-2.0-only
"""A race: threads that do one operation after the other, and send signals, while a VM's vCPUs write."""

import random
import signal
import threading
import time
from collections.abc import Callable, Iterable, Sequence

from dirty_tracking.vcpu_thread import KICK_SIGNAL, State
from dirty_tracking.writers import poll_interval
from dirty_tracking.writers_vm import WritersVm

# How many times HANG_TIMEOUT to wait for threads whose progress is not observed
_PATIENCE = 3
# Most signals in a burst
_BURST = 30

Operation = Callable[[], object]


class Worker(threading.Thread):
    """Does one operation after the other, each after some more writes of the vCPUs.

    :param pause: how many writes to wait for between two operations at most
    :ivar failure: what ended it, if anything did
    :ivar ended: whether it has done all that it will
    """

    def __init__(
        self, vm: WritersVm, name: str, operations: Iterable[Operation], draw: random.Random, pause: int
    ) -> None:
        super().__init__(name=name, daemon=True)
        self.failure: BaseException | None = None
        self.ended = False
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
            with self._vm.writers.cond:
                self.ended = True
                self._vm.writers.cond.notify_all()

    def _wait_for_writes(self) -> None:
        """Wait until the vCPUs have made some more writes, or one of them waits for its ring."""
        writers = self._vm.writers
        begun = time.monotonic()
        goal = sum(writers.published()) + self._draw.randint(0, self._pause)
        while sum(writers.published()) < goal and not self._quit.wait(poll_interval(begun)):
            if writers.any_ring_full():
                return


def workers_of(vm: WritersVm, jobs: Iterable[Iterable[Operation]], draw: random.Random, pause: int) -> list[Worker]:
    """A worker for each of *jobs*, not started."""
    return [Worker(vm, f"worker{number}", job, random.Random(draw.random()), pause) for number, job in enumerate(jobs)]


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
        return written and all(worker.ended for worker in workers)

    writers.wait(done, "the race", patience=_PATIENCE)
    for worker in background:
        worker.quit()
    writers.wait(lambda: all(worker.ended for worker in background), "the end of the race", patience=_PATIENCE)
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
