# SPDX-License-Identifier: GPL-2.0-only
"""The vCPUs that write test memory (guest_code/<arch>/dirty_writer.S), a thread each, and what is known of their writes."""

import signal
import threading
import time
from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import Any, Protocol

from dirty_tracking.cell import HANG_TIMEOUT
from dirty_tracking.modes import LogMode
from dirty_tracking.vcpu_thread import KICK_SIGNAL, State, VcpuHang, VcpuThread
from dirty_tracking.vm import PAGE
from dirty_tracking.write_stream import WriteStream
from kvm_util.arch import current as arch
from kvm_util.guest import GuestVm

_LEAST_POLL, _MOST_POLL = 0.001, 0.02
_JOIN_TIMEOUT = 10.0
_ENDING_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def poll_interval(begun: float) -> float:
    """How long to wait until the next look at what has been waited for since *begun*, in seconds.

    Each look takes time from the threads that are waited for, as only one thread at a time runs Python code. It comes too late
    by a tenth of the wait at most, and by 20 ms.
    """
    return min(max((time.monotonic() - begun) / 10, _LEAST_POLL), _MOST_POLL)


class Pace(IntEnum):
    """How many instructions a write takes: 4, at least 20, or at least 40. The values are those of BLOCK_SPARSE."""

    DENSE = 0
    SPARSE = 1
    VERY_SPARSE = 2


class Helper(Protocol):
    """A thread beside the vCPUs' own, whose failure ends every wait."""

    failure: BaseException | None
    name: str

    def quit(self) -> None: ...
    def is_alive(self) -> bool: ...
    def join(self, timeout: float | None = None) -> None: ...
    @property
    def ident(self) -> int | None: ...


class Writers:
    """The writers of *guest*, whose dirty pages are logged in *mode*; :meth:`add` makes them.

    :ivar cond: guards the state of all threads; notified at every change
    :ivar helpers: other threads of the run, which end with it
    :ivar started: whether the threads were started, and not ended yet
    """

    def __init__(self, guest: GuestVm, mode: LogMode) -> None:
        self.guest = guest
        self.cond = threading.Condition()
        self.streams: list[WriteStream] = []
        self.threads: list[VcpuThread] = []
        self.helpers: list[Helper] = []
        self.started = False
        self._mode = mode
        self._symbols = guest.program.symbols
        self._published: list[memoryview] = []
        self._synced: list[int] = []
        self._stop_flags: list[memoryview] = []
        self._previous_handler: Any = None

    def add(self, stream: WriteStream, gva: int, touch: int, pace: Pace) -> None:
        """Make the next vCPU: it writes its own word of each page of *stream*.

        :param gva: where page 0 is mapped in the guest
        :param touch: how many bytes from *gva* on it touches before it writes
        """
        index = len(self.threads)
        addresses = stream.addresses(gva + 8 * index, PAGE)
        table = self.guest.allocate(len(addresses) * 8)
        self.guest.memory(table, len(addresses) * 8).cast("Q")[:] = memoryview(addresses)
        block = self.guest.allocate(self._symbols["BLOCK_SIZE"])
        values = {
            "BLOCK_FILL_START": gva,
            "BLOCK_FILL_END": gva + touch,
            "BLOCK_TABLE": table,
            "BLOCK_TABLE_END": table + len(addresses) * 8,
            "BLOCK_TABLE_LOOP": table + stream.loop * 8,
            "BLOCK_SPARSE": pace,
        }
        for name, value in values.items():
            self._block_field(block, name)[0] = value
        vcpu = self.guest.add_vcpu(block)
        self.streams.append(stream)
        self.threads.append(VcpuThread(self.guest, vcpu, self._mode, self.cond))
        self._published.append(self._block_field(block, "BLOCK_WRITES"))
        self._synced.append(0)
        self._stop_flags.append(self._block_field(block, "BLOCK_STOP"))

    def published(self) -> list[int]:
        """How many writes each vCPU is known to have done; one more may be in flight.

        A vCPU that was stopped between a store and its publication has done one write more than it publishes, until it
        publishes again.
        """
        return [max(count[0], done) for count, done in zip(self._published, self._synced, strict=True)]

    def sync_write_counts(self, out_of_guest: Sequence[bool], done: Callable[[int, int], int]) -> None:
        """Find out how many writes the vCPUs that are out of their guests have done.

        :param done: for a vCPU and its published count, how many it has done by what is in memory
        """
        for vcpu, count in enumerate(self.published()):
            if out_of_guest[vcpu]:
                self._synced[vcpu] = done(vcpu, count)

    def start(self) -> None:
        """Start the threads; :meth:`end` has to follow. On the main thread."""
        # A handler must exist for the signal to interrupt KVM_RUN; what it does is of no interest.
        self._previous_handler = signal.signal(KICK_SIGNAL, lambda _number, _frame: None)
        self.started = True
        for thread in self.threads:
            thread.start()

    def resume(self) -> None:
        """Have all vCPUs write."""
        self.set_stop_flags(0)
        for thread in self.threads:
            thread.resume()

    def set_stop_flags(self, value: int) -> None:
        """Ask the guests to sync after their batch of writes; with 0, not to."""
        for flag in self._stop_flags:
            flag[0] = value

    def force_stop(self) -> None:
        """Stop the vCPUs wherever their guests are, and wait until they have."""
        for thread in self.threads:
            if thread.state is not State.STOPPED:
                thread.force_stop()
        self.wait(self.all_stopped, "stopping")

    def all_stopped(self) -> bool:
        """Whether no vCPU is in its guest, or about to enter it."""
        return all(thread.state is State.STOPPED for thread in self.threads)

    def any_ring_full(self) -> bool:
        """Whether a vCPU waits for its ring."""
        return any(thread.state is State.RING_FULL for thread in self.threads)

    def resume_after_ring_reset(self) -> None:
        """Resume all vCPUs that wait for their rings."""
        for thread in self.threads:
            thread.resume_after_ring_reset()

    def kick_running(self) -> None:
        """Make every running vCPU leave the guest once, and wait until it did.

        :raises VcpuHang: one did not
        """
        with self.cond:
            running = [(thread, thread.exits) for thread in self.threads if thread.state is State.RUNNING]
            for thread, _ in running:
                thread.kick()

            def left() -> bool:
                return all(thread.exits != exits or thread.state is not State.RUNNING for thread, exits in running)

            if not self.cond.wait_for(left, HANG_TIMEOUT):
                raise VcpuHang(
                    f"no exit within {HANG_TIMEOUT:g} s of a kick, of one of vCPUs {[t.name for t, _ in running]}"
                )

    def wait(
        self,
        condition: Callable[[], bool],
        what: str,
        writes: Callable[[int], bool] | None = None,
        patience: float = 1,
    ) -> None:
        """Wait for *condition*, for HANG_TIMEOUT seconds, or longer while each vCPU that must write does.

        The failure of any thread ends the wait first.

        :param writes: whether a vCPU has to make progress with its writes; without it nothing extends the wait
        :param patience: how many times HANG_TIMEOUT to wait at least
        :raises VcpuHang: the time is up
        """
        begun = time.monotonic()
        deadline = begun + HANG_TIMEOUT * patience
        counts = self.published()
        deadlines = [deadline for _ in counts]
        with self.cond:
            while True:
                for thread in self._all_threads():
                    if thread.failure is not None:
                        raise thread.failure
                if condition():
                    return
                now = time.monotonic()
                if writes is None:
                    late = now > deadline
                else:
                    for vcpu, count in enumerate(self.published()):
                        if count != counts[vcpu] or not writes(vcpu):
                            counts[vcpu], deadlines[vcpu] = count, now + HANG_TIMEOUT
                    late = now > min(deadlines)
                if late:
                    raise VcpuHang(self._describe_hang(what))
                self.cond.wait(poll_interval(begun))

    def wait_for_writes(self, count: int, since: Sequence[int]) -> None:
        """Wait until each vCPU has made *count* writes more than *since*, or one waits for its ring."""

        def written() -> bool:
            return all(now >= then + count for now, then in zip(self.published(), since, strict=True))

        self.wait(lambda: written() or self.any_ring_full(), "writing")

    def last_exits(self) -> str:
        """The last exit of each vCPU, a line each."""
        return "\n".join(f"last exit of {thread.name}: {thread.last_exit}" for thread in self.threads)

    def end(self, error: BaseException | None) -> None:
        """Stop and join all threads, for _JOIN_TIMEOUT at most; signals are delivered afterwards.

        :param error: the error that ended the run, or None. It is the one to report; a thread that does not end afterwards
            is added to it as a note
        :raises VcpuHang: a vCPU does not return from KVM_RUN
        """
        came: list[int] = []
        handlers = {ending: signal.signal(ending, lambda number, _: came.append(number)) for ending in _ENDING_SIGNALS}
        try:
            self._join_threads()
        except VcpuHang as hang:
            if error is None:
                raise
            error.add_note(f"and at the end: {hang}")
        finally:
            for ending, handler in handlers.items():
                signal.signal(ending, handler)
            signal.signal(KICK_SIGNAL, self._previous_handler)
            self.started = False
            for number in came:
                signal.raise_signal(number)

    def close(self) -> None:
        """Close the VM and free all memory, unless a vCPU still runs: that one would write to what was freed."""
        if any(thread.is_alive() for thread in self._all_threads()):
            return
        for view in (*self._published, *self._stop_flags):
            view.release()
        self.guest.close()

    def _block_field(self, block: int, name: str) -> memoryview:
        """A field of a vCPU's block as one 8-byte word: read and written in one access while the guest runs."""
        return self.guest.memory(block + self._symbols[name], 8).cast("Q")

    def _all_threads(self) -> list[Helper]:
        return [*self.threads, *self.helpers]

    def _describe_hang(self, what: str) -> str:
        """Get the vCPUs out of their guests and tell where they were."""
        lines = [f"no progress in {HANG_TIMEOUT:g} s of {what}; writes published: {self.published()}"]
        for thread in self.threads:
            last = (
                f"vCPU {thread.vcpu.id}: {thread.state.name.lower()}, {thread.exits} exits, the last {thread.last_exit}"
            )
            thread.force_stop()
            if self.cond.wait_for(lambda thread=thread: thread.state is not State.RUNNING, _JOIN_TIMEOUT):  # type: ignore[misc]
                lines += [f"{last}; registers:", arch.describe_registers(thread.vcpu.fd)]
            else:
                lines.append(f"{last}; it does not return from KVM_RUN, not even after a signal")
        return "\n".join(lines)

    def _join_threads(self) -> None:
        threads = [thread for thread in self._all_threads() if thread.ident is not None]
        deadline = time.monotonic() + _JOIN_TIMEOUT
        while any(thread.is_alive() for thread in threads):
            if time.monotonic() > deadline:
                raise VcpuHang(f"{[t.name for t in threads if t.is_alive()]} did not end within {_JOIN_TIMEOUT:g} s")
            for thread in threads:
                # Again and again: a signal that came in the moment before KVM_RUN must not be the only one.
                thread.quit()
                thread.join(_LEAST_POLL)
