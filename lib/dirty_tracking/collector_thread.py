# SPDX-License-Identifier: GPL-2.0-only
"""The matrix's collector thread: it collects at a given moment while vCPUs run, whenever a ring is full, and at the end."""

import threading
import time
from collections.abc import Callable, Sequence

from dirty_tracking.ledger import Collection
from dirty_tracking.vcpu_thread import State, VcpuThread


class CollectorThread(threading.Thread):
    """Collects for the vCPUs of *threads*, whose condition variable it shares.

    :param collect: makes a collection of the given iteration, with the vCPUs stopped or not
    :ivar stuck: vCPUs whose ring was full twice in a row with nothing to harvest in between
    :ivar failure: what ended the thread, if anything did
    """

    def __init__(
        self,
        threads: Sequence[VcpuThread],
        cond: threading.Condition,
        collect: Callable[[int, bool], Collection],
    ) -> None:
        super().__init__(name="collector", daemon=True)
        self.stuck: list[int] = []
        self.failure: BaseException | None = None
        self._threads = threads
        self._cond = cond
        self._collect = collect
        self._iteration = 0
        self._due: float | None = None
        self._final_requested = False
        self._quit = False
        self._collections: list[Collection] = []
        self._complete = False
        self._harvested = [0 for _ in threads]

    def begin(self, iteration: int, delay: float) -> None:
        """Start an iteration, in which to collect *delay* seconds from now, while the vCPUs run."""
        with self._cond:
            self._iteration = iteration
            self._due = time.monotonic() + delay
            self._collections = []
            self._complete = False
            self._cond.notify_all()

    def request_final(self) -> None:
        """Ask for the iteration's last collection; all vCPUs must have stopped."""
        with self._cond:
            self._due = None
            self._final_requested = True
            self._cond.notify_all()

    def finished(self) -> list[Collection] | None:
        """The iteration's collections, once the last one was made; None until then."""
        with self._cond:
            return self._collections if self._complete else None

    def quit(self) -> None:
        """End the thread after the collection that it is making; does not wait for it."""
        with self._cond:
            self._quit = True
            self._cond.notify_all()

    def run(self) -> None:
        """The thread's own code; not to be called."""
        try:
            while (final := self._wait_for_work()) is not None:
                self._make(final)
        except BaseException as error:  # noqa: BLE001 (the main thread raises it)
            with self._cond:
                self.failure = error
                self._cond.notify_all()

    def _wait_for_work(self) -> bool | None:
        """Wait until a collection is due; returns whether it is the iteration's last, or None to quit."""
        with self._cond:
            while not self._quit:
                if self._final_requested:
                    self._final_requested = False
                    return True
                waiting = [t for t in self._threads if t.state is State.RING_FULL and t.vcpu.id not in self.stuck]
                due = None if self._due is None else self._due - time.monotonic()
                if waiting:
                    return False
                if due is not None and due <= 0:
                    self._due = None
                    return False
                self._cond.wait(due)
            return None

    def _make(self, final: bool) -> None:
        with self._cond:
            full = [thread for thread in self._threads if thread.state is State.RING_FULL]
        collection = self._collect(self._iteration, final)
        with self._cond:
            self._collections.append(collection)
            self._complete = final
            if len(collection.reported) == len(self._harvested):
                for vcpu, pages in enumerate(collection.reported):
                    self._harvested[vcpu] += len(pages)
                for vcpu, _, _ in collection.strays:
                    self._harvested[vcpu] += 1
            for thread in full:
                # A ring that was full had entries. When none came since the vCPU was last resumed, KVM will say "full"
                # for ever: what it counts as used cannot be harvested.
                vcpu = thread.vcpu.id
                if self._harvested[vcpu]:
                    self._harvested[vcpu] = 0
                    thread.resume_after_ring_reset()
                elif vcpu not in self.stuck:
                    self.stuck.append(vcpu)
            self._cond.notify_all()
