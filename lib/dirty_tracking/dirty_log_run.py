# SPDX-License-Identifier: GPL-2.0-only
"""One run of one cell: the loop of the kernel's ``dirty_log_test.c``, in :meth:`DirtyLogRun.run`."""

import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from dirty_tracking.cell import DENSITIES, MIN_WRITES, Cell, Settings, place_test_memory
from dirty_tracking.collector_thread import CollectorThread
from dirty_tracking.ledger import Collection
from dirty_tracking.memory_check import MemoryCheck
from dirty_tracking.progress import Meter
from dirty_tracking.recorder import Recorder
from dirty_tracking.run_evidence import Figures, RunEvidence
from dirty_tracking.vcpu_thread import State
from dirty_tracking.violations import ContractViolation, Kind, Violation
from dirty_tracking.vm import PAGE
from dirty_tracking.write_stream import make_stream, sweep_length
from dirty_tracking.writers import Pace
from dirty_tracking.writers_vm import WritersVm
from kvm_util.arch import current as arch
from kvm_util.guest_program import GuestProgram
from kvm_util.kept_memory import KeptMemory
from kvm_util.kvm import Kvm
from kvm_util.memory import GuestMemory
from kvm_util.wording import counted


class DirtyLogRun(WritersVm):
    """A VM with one slot of test memory, ready to be run for *settings.iterations* iterations.

    :param memory: where the test memory comes from, and goes to; None for new memory
    :ivar figures: what the run counted so far
    :raises GuestMemoryError: the memory cannot be had
    :raises KvmError: KVM refuses the VM
    :raises ValueError: the settings do not fit the machine
    """

    def __init__(self, kvm: Kvm, cell: Cell, settings: Settings, memory: KeptMemory | None = None) -> None:
        self.cell = cell
        self.settings = settings
        self.figures = Figures()
        self._started = time.monotonic()
        density = DENSITIES[cell.density]
        npages = settings.slot_size // PAGE
        batch = GuestProgram.load("dirty_writer").symbols["WRITES_PER_BATCH"]
        self.streams = [
            make_stream(density.pattern, npages, vcpu, cell.vcpus, settings.seed, batch) for vcpu in range(cell.vcpus)
        ]
        pace = Pace.SPARSE if density.sparse else Pace.DENSE
        gpa = place_test_memory(settings, cell, arch.guest_phys_limit(kvm.supported_cpuid))
        shapes = [(npages, cell.backing)]
        super().__init__(
            kvm, cell.log_mode, shapes, self.streams, settings.ring_count, pace, cell.guest_mode, gpa,
            GuestMemory if memory is None else memory.make,
        )  # fmt: skip
        self.memslot = self.vm.memslots[self.slots[0].slot]
        self.recorder = Recorder(self.writers, self.mode, self.slots)
        self.memory_check = MemoryCheck(npages, self.streams, self.memslot.memory.words)
        self._interval = settings.interval / 1000
        self._meter = Meter(settings.iterations, self._interval)
        self._draw = random.Random(f"{settings.seed}/reap")
        self._counted = [0] * cell.vcpus  # writes when the last collection that was verified began
        self._ring_lapped = False
        self._collector = CollectorThread(self.writers.threads, self.writers.cond, self._collect)
        self.writers.helpers.append(self._collector)

    def run(self) -> Figures:
        """Run all iterations.

        :raises ContractViolation: KVM's reports or the memory were wrong in an iteration
        :raises GuestError: a guest ended in a way that it should not
        :raises VcpuHang: a vCPU stopped making progress
        """
        timings = self.mode.timings
        with self._running():
            with timings.time("populate"):
                self.populate()
            with timings.time("enable"):
                self.recorder.set_logging(self.vm, self.memslot.slot, on=True, stopped=True)
            self._collector.start()
            for iteration in range(1, self.settings.iterations + 1):
                # The collector's thread collects at this moment, and whenever a ring is full, while the vCPUs run.
                self._collector.begin(iteration, self._draw.uniform(0, self._interval))
                with timings.time("dirty"):
                    self._run_vcpus(iteration)
                    self._stop_vcpus()
                self._verify(iteration, self._collect_rest())
            with timings.time("disable"):
                self.recorder.set_logging(self.vm, self.memslot.slot, on=False, stopped=True)
        return self.figures

    def history(self, page: int) -> str:
        """When *page* was last written and last reported, as far as the checks got."""
        return f"page {page}: {self.memory_check.last_writes(page)}; {self.recorder.ledger.last_report(page)}"

    @contextmanager
    def _running(self) -> Iterator[None]:
        """End all threads after the context; an error in it that is no verdict on KVM gets the vCPUs' last exits."""
        failure: BaseException | None = None
        try:
            yield
        except BaseException as error:
            failure = error
            if not isinstance(error, ContractViolation):
                error.add_note(self.writers.last_exits())
            raise
        finally:
            self.writers.end(failure)
            self.figures.seconds = time.monotonic() - self._started
            self.figures.phases = self.mode.timings.summary()

    def _run_vcpus(self, iteration: int) -> None:
        """Resume the vCPUs, for the interval at least, and until each has made some writes, or a ring is stuck."""
        # The first iteration lasts until every page was written once, which the C test does not ask for.
        needed = sweep_length(self.memslot.npages, self.cell.vcpus) if iteration == 1 else MIN_WRITES
        begun = self.writers.published()
        goals = [count + needed for count in begun]
        self._meter.begin(begun, goals)
        end = time.monotonic() + self._interval
        self.writers.resume()

        def below_goal(vcpu: int) -> bool:
            return self.writers.published()[vcpu] < goals[vcpu]

        def written_enough() -> bool:
            self._meter.read(self.writers.published)
            return time.monotonic() >= end and not any(map(below_goal, range(len(goals))))

        self.writers.wait(lambda: written_enough() or bool(self._collector.stuck), "writing", below_goal)

    def _stop_vcpus(self) -> None:
        """Stop all vCPUs, in the cell's way."""
        if self.cell.stop == "cooperative" and not self._collector.stuck:
            self.writers.set_stop_flags(1)

            def stopped() -> bool:
                # A ring can still get stuck before the guest has seen the flag.
                return self.writers.all_stopped() or bool(self._collector.stuck)

            threads = self.writers.threads
            self.writers.wait(stopped, "stopping", lambda vcpu: threads[vcpu].state is not State.STOPPED)
        self.writers.force_stop()

    def _collect_rest(self) -> list[Collection]:
        """Collect what is left, with all vCPUs stopped; returns all of the iteration's collections."""
        self._collector.request_final()
        self.writers.wait(lambda: self._collector.finished() is not None, "collecting")
        return self._collector.finished() or []

    def _collect(self, iteration: int, stopped: bool) -> Collection:
        """Make one collection; on the collector's thread."""
        exact = [stopped or thread.state is State.RING_FULL for thread in self.writers.threads]
        self.sync_write_counts(exact)
        # Each vCPU is kicked, or out of its guest.
        event = Collection(last=self.memslot.npages, kicked=True, iteration=iteration)
        with self.recorder.recording(event, exact) as collection:
            self.recorder.add(collection, self.take_report(stopped, always_kick=True))
        return collection

    def _verify(self, iteration: int, collections: list[Collection]) -> None:
        """Hold all reports of an iteration, and the memory, to what the vCPUs are known to have written."""
        violations = [
            *self.recorder.judge.verify(),
            *self._rings_stuck(iteration, collections),
            *self.memory_check.check(iteration, collections[-1].before),
        ]
        self._count(iteration, collections)
        self._compare_with_ring(collections)
        if violations:
            violations = [replace(violation, ring_lapped=self._ring_lapped) for violation in violations]
            evidence = RunEvidence(violations, self.figures, self.memslot.npages, self.history)
            raise ContractViolation(violations, evidence=evidence)

    def _rings_stuck(self, iteration: int, collections: list[Collection]) -> Iterator[Violation]:
        """R10: rings that KVM says are full, and that have nothing to harvest."""
        number = self.figures.collections + len(collections)
        for vcpu in self._collector.stuck:
            exits = self.writers.threads[vcpu].ring_full_exits
            detail = f"after {counted(exits, 'such exit')} of this vCPU in all"
            yield Violation(Kind.STUCK, detail, None, (), vcpu, iteration, number, "R10")

    def _compare_with_ring(self, collections: list[Collection]) -> None:
        """Notice whether a vCPU made more writes from one collection's start to the next one's end than its ring has entries.

        Writes, not pages: KVM pushes each write that it emulates (mark_page_dirty_in_slot()). A ring that was lapped stays
        out of step with what KVM resets, so this is for the rest of the run.
        """
        for collection in collections:
            written = max(after - before for before, after in zip(self._counted, collection.after, strict=True))
            in_flight = 1
            self._ring_lapped |= self.mode.uses_ring and written + in_flight > self.settings.ring_count
            self._counted = collection.before

    def _count(self, iteration: int, collections: list[Collection]) -> None:
        """Add an iteration to the figures."""
        dirty = len(set().union(*(collection.pages for collection in collections)))
        self.figures.iterations = iteration
        self.figures.writes = sum(collections[-1].before)
        self.figures.dirty += dirty
        self.figures.dirty_by_iteration.append(dirty)
        if self.mode.uses_ring:
            rings = [pages for collection in collections for pages in collection.reported[: self.cell.vcpus]]
            self.figures.ring_fill_by_iteration.append(max(map(len, rings)))
        self.figures.clean += self.memslot.npages - dirty
        self.figures.collections += len(collections)
        self.figures.ring_full_exits = sum(thread.ring_full_exits for thread in self.writers.threads)
        self.figures.exits = sum(thread.exits for thread in self.writers.threads)
        self.figures.stalled_seconds = sum(thread.stalled for thread in self.writers.threads)
        self.figures.writes_per_second = self.figures.writes / self.mode.timings.total("dirty")
