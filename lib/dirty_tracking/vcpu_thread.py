# SPDX-License-Identifier: GPL-2.0-only
"""A thread that runs one vCPU, and can be resumed, kicked and stopped from others."""

import signal
import threading
import time
from enum import Enum, auto

from dirty_tracking.modes import AfterRun, LogMode
from kvm_util.guest import GuestVm
from kvm_util.vcpu import Vcpu

KICK_SIGNAL = signal.SIGUSR1


class State(Enum):
    """Where a vCPU's thread is."""

    STOPPED = auto()
    RUNNING = auto()
    RING_FULL = auto()
    ENDED = auto()


class VcpuHang(Exception):
    """A vCPU stopped making progress; the text has its last exit and, where it left the guest, its registers."""


class VcpuThread(threading.Thread):
    """Runs *vcpu* whenever it is resumed.

    All of its state is guarded by *cond*, which is notified at every change; the other threads share it.

    :ivar exits: returns from KVM_RUN so far
    :ivar ring_full_exits: those with KVM_EXIT_DIRTY_RING_FULL
    :ivar stalled: for how many seconds it waited for its ring to be reset
    :ivar failure: what ended the thread, if anything did
    """

    def __init__(self, guest: GuestVm, vcpu: Vcpu, mode: LogMode, cond: threading.Condition) -> None:
        super().__init__(name=f"vcpu{vcpu.id}", daemon=True)
        self.vcpu = vcpu
        self.state = State.STOPPED
        self.exits = 0
        self.ring_full_exits = 0
        self.stalled = 0.0
        self.failure: BaseException | None = None
        self.last_exit = "KVM_RUN was not called yet"
        self._guest = guest
        self._mode = mode
        self._cond = cond
        self._stop_requested = False
        self._quit = False

    def resume(self) -> None:
        """Run the guest until it syncs or :meth:`force_stop` is called; the thread must be stopped."""
        with self._cond:
            self._stop_requested = False
            self.state = State.RUNNING
            self._cond.notify_all()

    def resume_after_ring_reset(self) -> None:
        """Resume the vCPU if it waits for its ring."""
        with self._cond:
            if self.state is State.RING_FULL:
                self.state = State.RUNNING
                self._cond.notify_all()

    def kick(self) -> None:
        """Make KVM_RUN return; the guest goes on unless :meth:`force_stop` was called."""
        # immediate_exit closes the gap between the thread's last look at its orders and its entry into the kernel, where
        # the signal alone would be lost (api.rst section 5, "immediate_exit").
        with self._cond:
            if self.ident is not None and self.state is not State.ENDED:
                self.vcpu.run.immediate_exit = 1
                signal.pthread_kill(self.ident, KICK_SIGNAL)

    def force_stop(self) -> None:
        """Stop the vCPU wherever the guest is; does not wait for it."""
        with self._cond:
            self._stop_requested = True
            if self.state is State.RING_FULL:
                self.state = State.STOPPED
                self._cond.notify_all()
        self.kick()

    def quit(self) -> None:
        """End the thread as soon as KVM_RUN returns; does not wait for it."""
        with self._cond:
            self._quit = True
            self._cond.notify_all()
        self.force_stop()

    def run(self) -> None:
        """The thread's own code; not to be called."""
        try:
            while self._wait_for_orders():
                self._run_guest()
        except BaseException as error:  # noqa: BLE001 (the main thread raises it)
            self.failure = error
        finally:
            with self._cond:
                self.state = State.ENDED
                self._cond.notify_all()

    def _wait_for_orders(self) -> bool:
        with self._cond:
            self._cond.wait_for(lambda: self.state is State.RUNNING or self._quit)
            return not self._quit

    def _run_guest(self) -> None:
        while True:
            code = self.vcpu.kvm_run()
            # Before the orders are looked at below: an order given from here on sets it again.
            self.vcpu.run.immediate_exit = 0
            self.last_exit = "EINTR" if code else self.vcpu.exit_reason()
            meaning = self._mode.after_vcpu_run(self._guest, self.vcpu, code)
            with self._cond:
                self.exits += 1
                if meaning is AfterRun.RING_FULL:
                    self.ring_full_exits += 1
                    self._wait_for_reset()
                elif meaning is AfterRun.SYNCED:
                    self.state = State.STOPPED
                if self._stop_requested or self._quit:
                    self.state = State.STOPPED
                self._cond.notify_all()
                if self.state is State.STOPPED:
                    return

    def _wait_for_reset(self) -> None:
        """Wait, with the ring full, until a collector has emptied it."""
        if not self._stop_requested:
            self.state = State.RING_FULL
            self._cond.notify_all()
            begun = time.perf_counter()
            self._cond.wait_for(lambda: self.state is not State.RING_FULL or self._quit)
            self.stalled += time.perf_counter() - begun
