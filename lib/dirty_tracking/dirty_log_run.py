# SPDX-License-Identifier: GPL-2.0-only
"""One run of one cell: vCPU threads that write, a collector thread that reaps, and the iterations' clock."""

import random
import time
from types import TracebackType

from dirty_tracking.cell import DENSITIES, MIN_WRITES, Cell, Settings, guest_data_size, place_test_memory
from dirty_tracking.collector import Collector
from dirty_tracking.ledger import Collection, SlotPages
from dirty_tracking.memory_check import MemoryCheck
from dirty_tracking.modes import LOG_MODES
from dirty_tracking.progress import Meter
from dirty_tracking.recorder import Recorder
from dirty_tracking.run_evidence import Figures, RunEvidence
from dirty_tracking.vcpu_thread import State
from dirty_tracking.violations import ContractViolation, Kind, Violation
from dirty_tracking.write_stream import make_stream, sweep_length
from dirty_tracking.writers import DENSE, SPARSE, Writers
from kvm_util.arch import current as arch
from kvm_util.guest import GuestVm
from kvm_util.guest_program import GuestProgram
from kvm_util.kvm import Kvm
from kvm_util.memory import GIB
from kvm_util.wording import counted

TEST_SLOT = 1
# Test memory is mapped here; a 5-level guest mode adds an address bit that 4 levels do not have.
_TEST_GVA = 1 << 40
_TEST_GVA_5_LEVEL = 1 << 52


class DirtyLogRun:
    """A VM with test memory, ready to be run for *settings.iterations* iterations.

    :raises GuestMemoryError: the memory cannot be had
    :raises KvmError: KVM refuses the VM
    :raises ValueError: the settings do not fit the machine
    """

    def __init__(self, kvm: Kvm, cell: Cell, settings: Settings) -> None:
        self.cell = cell
        self.settings = settings
        self.figures = Figures()
        self._started = time.monotonic()
        density = DENSITIES[cell.density]
        program = GuestProgram.load("dirty_writer")
        self.mode = LOG_MODES[cell.log_mode](settings.ring_count)
        size = settings.slot_size
        self.guest = GuestVm(kvm, program, cell.guest_mode, guest_data_size(size, cell.vcpus))
        try:
            vm = self.guest.vm
            self.gpa = place_test_memory(settings, cell, arch.guest_phys_limit(self.guest.cpuid))
            self.mode.create_vm_done(vm)
            # Logging is off at first: the guest touches all pages, so that they are mapped (huge, where they can be) and
            # writable when it is switched on, as they are in a VM whose migration begins.
            self.memslot = vm.add_memory(TEST_SLOT, self.gpa, size, cell.backing, populate=True)
            npages = self.memslot.npages
            mode = self.guest.guest_mode
            gva = (_TEST_GVA_5_LEVEL if mode.levels == 5 else _TEST_GVA) + self.gpa % mode.page_size
            self.guest.map_test_memory(gva, self.gpa, size)
            batch = program.symbols["WRITES_PER_BATCH"]
            self._sweep = sweep_length(npages, cell.vcpus)
            self.writers = Writers(self.guest, self.mode)
            for vcpu in range(cell.vcpus):
                stream = make_stream(density.pattern, npages, vcpu, cell.vcpus, settings.seed, batch)
                # One vCPU touches all pages.
                self.writers.add(stream, gva, size if vcpu == 0 else 0, SPARSE if density.sparse else DENSE)
            self.streams = self.writers.streams
        except BaseException:
            self.guest.close()
            raise
        self.recorder = Recorder(self.writers, self.mode, [SlotPages(TEST_SLOT, 0, npages)])
        self.memory_check = MemoryCheck(npages, self.streams, self.memslot.memory.words)
        self._meter = Meter(settings.iterations, settings.interval / 1000)
        self._draw = random.Random(f"{settings.seed}/reap")
        self._collector = Collector(self.writers.threads, self.writers.cond, self._collect)
        self.writers.helpers.append(self._collector)

    def run(self) -> Figures:
        """Run all iterations.

        :raises ContractViolation: KVM's reports or the memory were wrong in an iteration
        :raises GuestError: a guest ended in a way that it should not
        :raises VcpuHang: a vCPU stopped making progress
        """
        failure: BaseException | None = None
        try:
            self.writers.start()
            self._touch_all_pages()
            self.recorder.set_logging(self.guest.vm, TEST_SLOT, on=True, stopped=True)
            self._collector.start()
            for iteration in range(1, self.settings.iterations + 1):
                self._iterate(iteration)
        except BaseException as error:
            failure = error
            if not isinstance(error, ContractViolation):
                error.add_note(self.writers.last_exits())
            raise
        finally:
            self.writers.end(failure)
            self.figures.seconds = time.monotonic() - self._started
        return self.figures

    def published(self) -> list[int]:
        """How many writes each vCPU is known to have done; see :meth:`Writers.published`."""
        return self.writers.published()

    def history(self, page: int) -> str:
        """When *page* was last written and last reported, as far as the checks got."""
        return f"page {page}: {self.memory_check.last_writes(page)}; {self.recorder.ledger.last_report(page)}"

    def _collect(self, iteration: int, stopped: bool) -> Collection:
        """Make one collection; on the collector's thread."""
        exact = [stopped or thread.state is State.RING_FULL for thread in self.writers.threads]
        self.writers.settle(exact, self.memory_check.done)
        # Each vCPU is kicked, or out of its guest.
        event = Collection(last=self.memslot.npages, kicked=True, iteration=iteration)
        with self.recorder.recording(event, exact) as one:
            kick = None if stopped else self.writers.kick_running
            self.recorder.add(one, self.mode.collect(self.guest.vm, kick, always_kick=True))
        return one

    def all_stopped(self) -> bool:
        """Whether no vCPU is in its guest, or about to enter it."""
        return self.writers.all_stopped()

    def close(self) -> None:
        """Close the VM and give all memory back, unless a vCPU still runs."""
        self.writers.close()

    def _touch_all_pages(self) -> None:
        self.writers.let_go()
        # Nothing is published meanwhile; a slow machine needs seconds for a GiB.
        self.writers.wait(self.all_stopped, "touching all pages", patience=max(1, self.settings.slot_size / GIB))

    def _iterate(self, iteration: int) -> None:
        # The first iteration lasts until every page was written once, as the C test's does.
        needed = self._sweep if iteration == 1 else MIN_WRITES
        begun = self.published()
        goals = [count + needed for count in begun]
        self._meter.begin(begun, goals)
        interval = self.settings.interval / 1000
        end = time.monotonic() + interval
        self._collector.begin(iteration, self._draw.uniform(0, interval))
        self.writers.let_go()

        def below_goal(vcpu: int) -> bool:
            return self.published()[vcpu] < goals[vcpu]

        def written_enough() -> bool:
            self._meter.read(self.published)
            return time.monotonic() >= end and not any(map(below_goal, range(len(goals))))

        self.writers.wait(lambda: written_enough() or bool(self._collector.stuck), "writing", below_goal)
        self._stop()
        self._collector.request_final()
        self.writers.wait(lambda: self._collector.finished() is not None, "collecting")
        self._verify(iteration, self._collector.finished() or [])

    def _stop(self) -> None:
        """Stop all vCPUs, in the cell's way."""
        if self.cell.stop == "cooperative" and not self._collector.stuck:
            self.writers.set_stop_flags(1)
            # A ring can still get stuck before the guest has seen the flag.
            self.writers.wait(lambda: self.all_stopped() or bool(self._collector.stuck), "stopping", self._not_stopped)
        self.writers.force_stop()

    def _not_stopped(self, vcpu: int) -> bool:
        return self.writers.threads[vcpu].state is not State.STOPPED

    def _verify(self, iteration: int, collections: list[Collection]) -> None:
        """Verify the iteration's collections, and the memory after it."""
        findings = self.recorder.judge.verify()
        number = self.figures.reaps + len(collections)
        for vcpu in self._collector.stuck:
            exits = self.writers.threads[vcpu].ring_full_exits
            detail = f"after {counted(exits, 'such exit')} of this vCPU in all"
            findings.append(Violation(Kind.STUCK, detail, None, (), vcpu, iteration, number, "R10"))
        done = collections[-1].before
        findings += self.memory_check.check(iteration, done)
        dirty = len(set().union(*(one.pages for one in collections)))
        self.figures.iterations = iteration
        self.figures.writes = sum(done)
        self.figures.dirty += dirty
        self.figures.clean += self.memslot.npages - dirty
        self.figures.reaps += len(collections)
        self.figures.ring_full_exits = sum(thread.ring_full_exits for thread in self.writers.threads)
        if findings:
            evidence = RunEvidence(findings, self.figures, self.memslot.npages, self.history)
            raise ContractViolation(findings, evidence=evidence)

    def __enter__(self) -> "DirtyLogRun":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
