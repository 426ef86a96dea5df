# SPDX-License-Identifier: GPL-2.0-only
"""One run of one cell: vCPU threads that write, a collector thread that reaps, and the iterations' clock."""

import random
import signal
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType

from lib import uapi
from lib.arch import current as arch
from lib.cell import DENSITIES, HANG_TIMEOUT, MIN_WRITES, PAGE, Cell, Settings, guest_data_size, place_test_memory
from lib.collector import Collector
from lib.guest import GuestVm
from lib.guest_program import GuestProgram
from lib.host import this_host, uses_pml
from lib.kvm import Kvm
from lib.log_modes import make_log_mode
from lib.memory import BACKINGS, GIB, GuestMemory
from lib.oracle import Finding, Kind, Oracle, Reap
from lib.vcpu_thread import KICK_SIGNAL, State, VcpuHang, VcpuThread
from lib.write_stream import make_stream, sweep_length

TEST_SLOT = 1
_POLL = 0.001
_JOIN_TIMEOUT = 10.0
# Test memory is mapped here; a 5-level guest mode adds an address bit that 4 levels do not have.
_TEST_GVA = 1 << 40
_TEST_GVA_5_LEVEL = 1 << 52


class DirtyTrackingError(AssertionError):
    """KVM broke the contract of dirty tracking.

    :ivar findings: what was wrong, in the order in which it was found
    :ivar run: the run that found it
    """

    def __init__(self, findings: Sequence[Finding], run: "DirtyLogRun") -> None:
        super().__init__("\n".join(map(str, findings)))
        self.findings = list(findings)
        self.run = run


@dataclass
class Figures:
    """What a run counted; it grows while the run lasts, so that a failed run has its figures too.

    :ivar dirty: pages reported, summed over the iterations
    :ivar clean: pages not reported, summed over the iterations
    """

    iterations: int = 0
    writes: int = 0
    dirty: int = 0
    clean: int = 0
    reaps: int = 0
    ring_full_exits: int = 0
    seconds: float = 0.0


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
        self._symbols = program.symbols
        self.mode = make_log_mode(cell.log_mode, settings.ring_count)
        size = settings.slot_size
        mode = arch.GUEST_MODES[cell.guest_mode]
        self.guest = GuestVm(kvm, program, mode, guest_data_size(size, cell.vcpus))
        try:
            vm = self.guest.vm
            self.gpa = place_test_memory(settings, cell, arch.guest_phys_limit(self.guest.cpuid))
            self.mode.create_vm_done(vm)
            # Logging is off at first: the guest touches all pages, so that they are mapped (huge, where they can be) and
            # writable when it is switched on, as they are in a VM whose migration begins.
            memory = GuestMemory(BACKINGS[cell.backing], size, self.gpa)
            try:
                memory.populate()
                self.memslot = vm.set_user_memory_region(TEST_SLOT, self.gpa, memory)
            except BaseException:
                memory.close()
                raise
            self._words = memory.words
            npages = self.memslot.npages
            gva = (_TEST_GVA_5_LEVEL if mode.levels == 5 else _TEST_GVA) + self.gpa % mode.page_size
            self.guest.map_test_memory(gva, self.gpa, size)
            batch = self._symbols["WRITES_PER_BATCH"]
            self.streams = [
                make_stream(density.pattern, npages, vcpu, cell.vcpus, settings.seed, batch)
                for vcpu in range(cell.vcpus)
            ]
            self._sweep = sweep_length(npages, cell.vcpus)
            blocks = [self._add_writer(vcpu, gva, density.sparse) for vcpu in range(cell.vcpus)]
            self._published = [self._block_field(block, "BLOCK_WRITES") for block in blocks]
            self._settled = [0 for _ in blocks]
            self._stop_flags = [self._block_field(block, "BLOCK_STOP") for block in blocks]
        except BaseException:
            self.guest.close()
            raise
        self.oracle = Oracle(
            npages,
            self.streams,
            self.mode.per_vcpu,
            self.mode.initially_set,
            TEST_SLOT,
            may_log_twice=uses_pml(this_host()),
        )
        self._draw = random.Random(f"{settings.seed}/reap")
        self._cond = threading.Condition()
        self._threads = [VcpuThread(self.guest, vcpu, self.mode, self._cond) for vcpu in vm.vcpus]
        self._collector = Collector(self._threads, self._cond, self._collect, HANG_TIMEOUT)
        self._all_threads: tuple[VcpuThread | Collector, ...] = (*self._threads, self._collector)

    def run(self) -> Figures:
        """Run all iterations.

        :raises DirtyTrackingError: KVM's reports or the memory were wrong in an iteration
        :raises GuestError: a guest ended in a way that it should not
        :raises VcpuHang: a vCPU stopped making progress
        """
        # A handler must exist for the signal to interrupt KVM_RUN; what it does is of no interest.
        previous = signal.signal(KICK_SIGNAL, lambda _number, _frame: None)
        try:
            for thread in self._threads:
                thread.start()
            self._touch_all_pages()
            self.guest.vm.set_user_memory_region(TEST_SLOT, self.gpa, self.memslot.memory, uapi.KVM_MEM_LOG_DIRTY_PAGES)
            self._collector.start()
            for iteration in range(1, self.settings.iterations + 1):
                self._iterate(iteration)
        except DirtyTrackingError:
            raise
        except Exception as error:
            error.add_note("\n".join(f"last exit of {thread.name}: {thread.last_exit}" for thread in self._threads))
            raise
        finally:
            try:
                self._end_threads()
            finally:
                signal.signal(KICK_SIGNAL, previous)
            self.figures.seconds = time.monotonic() - self._started
        return self.figures

    def published(self) -> list[int]:
        """How many writes each vCPU is known to have done; one more may be under way.

        A vCPU that was stopped between a store and its publication has done one write more than it says, and goes on
        saying so for a moment after it was let go.
        """
        return [max(count[0], done) for count, done in zip(self._published, self._settled, strict=True)]

    def _collect(self, iteration: int, stopped: bool) -> Reap:
        """Make one reap; on the collector's thread."""
        exact = [stopped or thread.state is State.RING_FULL for thread in self._threads]
        self._settle(exact)
        before = self.published()
        kick = self._collector.kick_running
        collected = self.mode.collect_dirty_pages(self.guest.vm, self.memslot, kick, stopped)
        return Reap(iteration, before, self.published(), exact, collected)

    def _settle(self, out_of_guest: Sequence[bool]) -> None:
        """Find out how many writes the vCPUs that are out of their guests have done."""
        for vcpu, count in enumerate(self.published()):
            if out_of_guest[vcpu]:
                self._settled[vcpu] = self.oracle.done(vcpu, count, self._words)

    def all_stopped(self) -> bool:
        """Whether no vCPU is in its guest, or about to enter it."""
        return all(thread.state is State.STOPPED for thread in self._threads)

    def close(self) -> None:
        """Close the VM and give all memory back, unless a vCPU still runs: that one would write to what was freed."""
        if any(thread.is_alive() for thread in self._all_threads):
            return
        for view in (*self._published, *self._stop_flags):
            view.release()
        self.guest.close()

    def _add_writer(self, index: int, gva: int, sparse: bool) -> int:
        """Make vCPU *index* with its block and table; returns the block's address."""
        stream = self.streams[index]
        table = self.guest.allocate(len(stream.pages) * 8)
        addresses = stream.addresses(gva + 8 * index, PAGE)
        self.guest.memory(table, len(addresses) * 8).cast("Q")[:] = memoryview(addresses)
        block = self.guest.allocate(self._symbols["BLOCK_SIZE"])
        values = {
            "BLOCK_FILL_START": gva,
            "BLOCK_FILL_END": gva + self.settings.slot_size if index == 0 else gva,  # one vCPU touches all pages
            "BLOCK_TABLE": table,
            "BLOCK_TABLE_END": table + len(addresses) * 8,
            "BLOCK_TABLE_LOOP": table + stream.loop * 8,
            "BLOCK_SPARSE": int(sparse),
        }
        for name, value in values.items():
            self._block_field(block, name)[0] = value
        self.guest.add_vcpu(block)
        return block

    def _block_field(self, block: int, name: str) -> memoryview:
        """A field of a vCPU's block as one 8-byte word: read and written in one access while the guest runs."""
        return self.guest.memory(block + self._symbols[name], 8).cast("Q")

    def _touch_all_pages(self) -> None:
        self._let_go()
        # Nothing is published meanwhile; a slow machine needs seconds for a GiB.
        self._wait(self.all_stopped, "touching all pages", patience=max(1, self.settings.slot_size / GIB))

    def _iterate(self, iteration: int) -> None:
        # The first iteration lasts until every page was written once, as the C test's does.
        needed = self._sweep if iteration == 1 else MIN_WRITES
        goals = [count + needed for count in self.published()]
        interval = self.settings.interval / 1000
        end = time.monotonic() + interval
        self._collector.begin(iteration, self._draw.uniform(0, interval))
        self._let_go()

        def below_goal(vcpu: int) -> bool:
            return self.published()[vcpu] < goals[vcpu]

        def written_enough() -> bool:
            return time.monotonic() >= end and not any(map(below_goal, range(len(goals))))

        self._wait(lambda: written_enough() or bool(self._collector.stuck), "writing", below_goal)
        self._stop()
        self._collector.request_final()
        self._wait(lambda: self._collector.finished() is not None, "collecting")
        self._verify(iteration, self._collector.finished() or [])

    def _let_go(self) -> None:
        self._set_stop_flags(0)
        for thread in self._threads:
            thread.let_go()

    def _stop(self) -> None:
        """Stop all vCPUs, in the cell's way."""
        if self.cell.stop == "cooperative" and not self._collector.stuck:
            self._set_stop_flags(1)
            # A ring can still get stuck before the guest has seen the flag.
            self._wait(lambda: self.all_stopped() or bool(self._collector.stuck), "stopping", self._not_stopped)
        for thread in self._threads:
            if thread.state is not State.STOPPED:
                thread.force_stop()
        self._wait(self.all_stopped, "stopping")

    def _not_stopped(self, vcpu: int) -> bool:
        return self._threads[vcpu].state is not State.STOPPED

    def _set_stop_flags(self, value: int) -> None:
        for flag in self._stop_flags:
            flag[0] = value

    def _wait(
        self,
        condition: Callable[[], bool],
        what: str,
        writes: Callable[[int], bool] | None = None,
        patience: float = 1,
    ) -> None:
        """Wait for *condition*, for HANG_TIMEOUT seconds, or longer while each vCPU that must write does.

        :param writes: whether a vCPU has to make progress with its writes; without it nothing extends the wait
        :param patience: how many times HANG_TIMEOUT to wait at least
        :raises VcpuHang: the time is up
        """
        deadline = time.monotonic() + HANG_TIMEOUT * patience
        counts = self.published()
        deadlines = [deadline for _ in counts]
        with self._cond:
            while not condition():
                for thread in self._all_threads:
                    if thread.failure is not None:
                        raise thread.failure
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
                self._cond.wait(_POLL)

    def _release_waiting(self) -> None:
        for thread in self._threads:
            thread.ring_was_reset()

    def _describe_hang(self, what: str) -> str:
        """Get the vCPUs out of their guests and tell where they were."""
        lines = [f"no progress in {HANG_TIMEOUT:g} s of {what}; writes published: {self.published()}"]
        for thread in self._threads:
            last = (
                f"vCPU {thread.vcpu.id}: {thread.state.name.lower()}, {thread.exits} exits, the last {thread.last_exit}"
            )
            thread.force_stop()
            if self._cond.wait_for(lambda thread=thread: thread.state is not State.RUNNING, _JOIN_TIMEOUT):  # type: ignore[misc]
                lines += [f"{last}; registers:", arch.describe_registers(thread.vcpu.fd)]
            else:
                lines.append(f"{last}; it does not return from KVM_RUN, not even after a signal")
        return "\n".join(lines)

    def _end_threads(self) -> None:
        """Stop and join all threads; a second Ctrl-C must not cut this short, it takes _JOIN_TIMEOUT at most.

        :raises VcpuHang: a vCPU does not return from KVM_RUN
        """
        interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            self._join_threads()
        finally:
            signal.signal(signal.SIGINT, interrupt)

    def _join_threads(self) -> None:
        self.mode.before_vcpu_join(self._release_waiting)
        threads = [thread for thread in self._all_threads if thread.ident is not None]
        deadline = time.monotonic() + _JOIN_TIMEOUT
        while any(thread.is_alive() for thread in threads):
            if time.monotonic() > deadline:
                raise VcpuHang(f"{[t.name for t in threads if t.is_alive()]} did not end within {_JOIN_TIMEOUT:g} s")
            for thread in threads:
                # Again and again: a signal that came in the moment before KVM_RUN must not be the only one.
                thread.quit()
                thread.join(_POLL)

    def _verify(self, iteration: int, reaps: list[Reap]) -> None:
        """Hold the iteration's reaps and the memory after it to what was written."""
        findings: list[Finding] = []
        for reap in reaps:
            findings += self.oracle.check_reap(reap)
        done = reaps[-1].before
        findings += self.oracle.check_memory(iteration, done, self._words)
        stuck = self._collector.stuck
        if stuck:
            detail = f"vCPUs {stuck}, after {sum(thread.ring_full_exits for thread in self._threads)} such exits in all"
            findings.insert(0, Finding(Kind.STUCK, iteration, len(reaps), None, (), detail))
        dirty = len(set().union(*(pages for reap in reaps for pages in reap.collected.pages)))
        self.figures.iterations = iteration
        self.figures.writes = sum(done)
        self.figures.dirty += dirty
        self.figures.clean += self.memslot.npages - dirty
        self.figures.reaps += len(reaps)
        self.figures.ring_full_exits = sum(thread.ring_full_exits for thread in self._threads)
        if findings:
            raise DirtyTrackingError(findings, self)

    def __enter__(self) -> "DirtyLogRun":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
