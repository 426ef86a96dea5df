# SPDX-License-Identifier: GPL-2.0-only
"""What dirty logging costs: the phases of the kernel's ``dirty_log_perf_test``, for dirty rings too. Nothing is judged."""

import os
import random
import signal
import threading
import time
from array import array
from dataclasses import dataclass

from dirty_tracking.modes import LOG_MODES, set_dirty_logging
from dirty_tracking.vcpu_thread import KICK_SIGNAL, State, VcpuHang, VcpuThread
from dirty_tracking.vm import FIRST_GPA, GVA_OFFSET, PAGE, DirtyVm
from kvm_util.guest import PROGRAM_SLOT
from kvm_util.kvm import Kvm
from kvm_util.memory import BACKINGS, GIB, HUGE_PAGE_SIZE, align_up

# A vCPU that has to access its pages and does not end within this many seconds for each GiB hangs.
_PATIENCE = 300.0
_VCPU_DATA = 1 << 20


@dataclass(frozen=True)
class Scenario:
    """What a run measures; the names in brackets are the options of the C test.

    :ivar vcpus: number of vCPUs [-v]
    :ivar memory: bytes for each vCPU [-b]
    :ivar iterations: how often the vCPUs access their pages with dirty logging enabled [-i]
    :ivar write_percent: how many of 100 accesses are stores, the others being loads [-w]
    :ivar random: access pages in random order, some more than once [-a]; otherwise each page once, in ascending order
    :ivar slots: how many memslots the memory is divided into [-x]
    :ivar overlap: each vCPU accesses all of the memory [-o]
    :ivar backing: a key of ``BACKINGS`` [-s]
    :ivar pin: the CPU of each vCPU's thread, or none [-c]
    :ivar ring_count: entries of a dirty ring
    """

    log_mode: str
    vcpus: int = 1
    memory: int = GIB
    iterations: int = 2
    write_percent: int = 100
    random: bool = False
    slots: int = 1
    overlap: bool = False
    backing: str = "anonymous"
    pin: tuple[int, ...] = ()
    ring_count: int = 65536

    @property
    def npages(self) -> int:
        """The pages of all vCPUs."""
        return self.vcpus * self.memory // PAGE

    def wrong(self) -> str | None:
        """What is wrong with the values, in words; None if nothing is."""
        checks = {
            f"log_mode: no such mode: {self.log_mode!r} (choose from {', '.join(LOG_MODES)})": self.log_mode in LOG_MODES,
            f"backing: no such backing: {self.backing!r} (choose from {', '.join(BACKINGS)})": self.backing in BACKINGS,
            "vcpus, iterations and slots must be at least 1": min(self.vcpus, self.iterations, self.slots) >= 1,
            f"memory: {self.memory} is not one or more whole pages": self.memory >= PAGE and not self.memory % PAGE,
            f"ring_count: {self.ring_count} is not a power of two": self.ring_count.bit_count() == 1 and self.ring_count > 0,
            f"write_percent: {self.write_percent} is not from 0 to 100": 0 <= self.write_percent <= 100,
            f"slots: {self.npages} pages are not divided into {self.slots} equal slots": not self.npages % max(self.slots, 1),
            f"pin: {len(self.pin)} CPUs for {self.vcpus} vCPUs": len(self.pin) in (0, self.vcpus),
            f"pin: this process may run on CPUs {sorted(os.sched_getaffinity(0))} only": (
                set(self.pin) <= os.sched_getaffinity(0)
            ),
        }  # fmt: skip
        return next((text for text, holds in checks.items() if not holds), None)


@dataclass(frozen=True)
class Cost:
    """What a run cost.

    :ivar phases: of each phase what :meth:`Timings.summary` says; ``get`` and ``clear`` have a time for each slot
    :ivar dirty_pages: how many pages or entries were reported
    :ivar exits: returns from KVM_RUN, of all vCPUs
    :ivar ring_full_exits: those with KVM_EXIT_DIRTY_RING_FULL
    :ivar stalled_seconds: how long vCPUs waited for full rings to be reset, summed over the vCPUs
    """

    phases: dict[str, dict[str, float]]
    dirty_pages: int
    exits: int
    ring_full_exits: int
    stalled_seconds: float


class PerfRun(DirtyVm):
    """A VM for one scenario."""

    def __init__(self, kvm: Kvm, scenario: Scenario, seed: int) -> None:
        accesses = scenario.npages if scenario.overlap else scenario.npages // scenario.vcpus
        data_size = scenario.npages * 8 + scenario.vcpus * (accesses * 8 + _VCPU_DATA)
        super().__init__(kvm, scenario.log_mode, "page_accesses", scenario.ring_count, data_size, "48bit-4k")
        self._scenario = scenario
        self._cond = threading.Condition()
        self._threads: list[VcpuThread] = []
        self._reported = 0
        with self._building():
            size = scenario.npages // scenario.slots
            alignment = max(BACKINGS[scenario.backing].alignment, HUGE_PAGE_SIZE)
            first = align_up(FIRST_GPA, alignment)
            self._slots = range(PROGRAM_SLOT + 1, PROGRAM_SLOT + 1 + scenario.slots)
            for number, slot in enumerate(self._slots):
                self.add_slot(slot, first + number * size * PAGE, size, scenario.backing, logged=False)
            for vcpu in range(scenario.vcpus):
                self._add_vcpu(vcpu, first + GVA_OFFSET, accesses, random.Random(f"{seed}/{vcpu}"))

    def measure(self) -> Cost:
        """Run all phases.

        :raises VcpuHang: a vCPU does not end
        """
        timings = self.mode.timings
        # A handler must exist for the signal to interrupt KVM_RUN; what it does is of no interest.
        previous = signal.signal(KICK_SIGNAL, lambda _number, _frame: None)
        try:
            for thread in self._threads:
                thread.start()
            for thread, cpu in zip(self._threads, self._scenario.pin, strict=False):
                assert thread.native_id is not None
                os.sched_setaffinity(thread.native_id, {cpu})
            with timings.time("populate"):
                self._run_vcpus()
            with timings.time("enable"):
                self._set_logging(on=True)
            for _ in range(self._scenario.iterations):
                with timings.time("dirty"):
                    self._run_vcpus()
                self._reported += self.mode.collect(self.vm, kick=None).reported
            with timings.time("disable"):
                self._set_logging(on=False)
        finally:
            started = [thread for thread in self._threads if thread.ident is not None]
            for thread in started:
                thread.quit()
            for thread in started:
                thread.join(_PATIENCE)
            signal.signal(KICK_SIGNAL, previous)
        return Cost(
            timings.summary(),
            self._reported,
            sum(thread.exits for thread in self._threads),
            sum(thread.ring_full_exits for thread in self._threads),
            sum(thread.stalled for thread in self._threads),
        )

    def _add_vcpu(self, vcpu: int, gva: int, accesses: int, draw: random.Random) -> None:
        scenario, symbols = self._scenario, self.guest.program.symbols
        share = 0 if scenario.overlap else vcpu * accesses
        pages = [draw.randrange(accesses) for _ in range(accesses)] if scenario.random else range(accesses)
        table = array("Q", [gva + (share + page) * PAGE for page in pages])
        if scenario.write_percent < 100:
            for index in range(accesses):
                table[index] |= draw.randrange(100) >= scenario.write_percent
        address = self.guest.allocate(accesses * 8)
        self.guest.memory(address, accesses * 8).cast("Q")[:] = memoryview(table)
        block = self.guest.allocate(symbols["BLOCK_SIZE"])
        own = scenario.npages // scenario.vcpus
        values = {
            "BLOCK_FILL_START": gva + vcpu * own * PAGE,
            "BLOCK_FILL_END": gva + (vcpu + 1) * own * PAGE,
            "BLOCK_TABLE": address,
            "BLOCK_TABLE_END": address + accesses * 8,
        }
        for name, value in values.items():
            self.guest.memory(block + symbols[name], 8).cast("Q")[0] = value
        self._threads.append(VcpuThread(self.guest, self.guest.add_vcpu(block), self.mode, self._cond))

    def _set_logging(self, on: bool) -> None:
        for slot in self._slots:
            set_dirty_logging(self.vm, slot, on)

    def _run_vcpus(self) -> None:
        """Let all vCPUs access their pages once; full rings are collected meanwhile."""
        for thread in self._threads:
            thread.resume()
        deadline = time.monotonic() + _PATIENCE * max(1, self._scenario.npages * PAGE / GIB)
        empty = 0
        while not self._all(State.STOPPED):
            with self._cond:
                self._cond.wait_for(lambda: self._all(State.STOPPED) or self._any(State.RING_FULL, State.ENDED), 1)
            for thread in self._threads:
                if thread.failure is not None:
                    raise thread.failure
            if self._any(State.RING_FULL):
                reported = self.mode.collect(self.vm, kick=self._no_kick).reported
                # The first time the ring may have been harvested between the exit and the thread's change of state.
                empty = 0 if reported else empty + 1
                if empty > self._scenario.vcpus:
                    raise VcpuHang("KVM_EXIT_DIRTY_RING_FULL, and no ring has an entry to harvest (R10)")
                self._reported += reported
                for thread in self._threads:
                    thread.resume_after_ring_reset()
            if time.monotonic() > deadline:
                raise VcpuHang(f"vCPUs did not access their pages: {[thread.last_exit for thread in self._threads]}")

    def _no_kick(self) -> None:
        """A vCPU whose ring is full has left the guest; what others have in PML buffers comes with a later collection."""

    def _all(self, state: State) -> bool:
        return all(thread.state is state for thread in self._threads)

    def _any(self, *states: State) -> bool:
        return any(thread.state in states for thread in self._threads)


def measure(kvm: Kvm, scenario: Scenario, seed: int) -> Cost:
    """Run *scenario* once."""
    with PerfRun(kvm, scenario, seed) as run:
        return run.measure()
