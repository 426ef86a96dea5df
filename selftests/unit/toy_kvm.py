# SPDX-License-Identifier: GPL-2.0-only
"""A toy KVM that logs dirty pages in steps as small as the kernel's, and workers that alternate with its vCPUs at random.

Its results say nothing about KVM: it makes ledgers, sound or with a planted fault, to test the judge.
"""

import random
from array import array
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto

from dirty_tracking.ledger import Collection, Counted, Event, Ledger, Reset, SlotPages, Toggle, ZapAll
from dirty_tracking.write_stream import WriteStream

SLOTS = [SlotPages(1, 0, 24), SlotPages(2, 24, 40)]
NPAGES = 40
# Pages of each slot that no vCPU writes
UNWRITTEN = {22, 23, 39}
_ENDED = object()
MODES = ["dirty-log", "clear-log", "clear-log-unset", "dirty-ring"]


class Phase(Enum):
    """The progress of a vCPU's next write."""

    BEFORE = auto()
    WRITABLE = auto()  # KVM has made the page writable and not logged it yet
    READY = auto()
    STORED = auto()  # but not published


@dataclass
class Vcpu:
    """One vCPU; *done* counts its stores, *published* those that the host knows."""

    id: int
    stream: WriteStream
    done: int = 0
    published: int = 0
    phase: Phase = Phase.BEFORE
    parked: bool = False


@dataclass
class Fault:
    """A fault in the last collection of a run.

    :ivar planted: whether the run had an occasion for it
    """

    name: str
    planted: bool = False


@dataclass
class ToyKvm:
    """A VM with two slots, whose *mode* is one of MODES.

    :ivar events: what happened, in the order of its end; None where everything so far can be verified
    """

    draw: random.Random
    mode: str
    vcpu_count: int
    kicks: bool
    fault: Fault | None = None
    events: list[Event | None] = field(default_factory=list)

    def __post_init__(self) -> None:
        written = [page for page in range(NPAGES) if page not in UNWRITTEN]
        streams = []
        for vcpu in range(self.vcpu_count):
            own = written[vcpu :: self.vcpu_count]
            # Most go to pages of its own and to the same two.
            pages = [self.draw.choice(self.draw.choice([own, written, written[:2]])) for _ in range(48)]
            streams.append(WriteStream(array("I", pages), self.draw.choice([0, 16])))
        self.rings = self.mode == "dirty-ring"
        self.initially_set = self.mode == "clear-log"
        self.ledger = Ledger(streams, SLOTS, self.rings, self.initially_set)
        self.vcpus = [Vcpu(number, stream) for number, stream in enumerate(streams)]
        self.logging = {slot.slot: False for slot in SLOTS}
        self._writable = set(range(NPAGES))
        self._dirty: set[int] = set()
        self._pushed: list[list[int]] = [[] for _ in self.vcpus]
        self._harvested: list[list[int]] = [[] for _ in self.vcpus]
        self._resetting = False
        self._ignores_toggles = False

    # --- the guest --------------------------------------------------------------------------------------------------------

    def step(self, vcpu: Vcpu) -> None:
        """Let a vCPU make one step."""
        page = vcpu.stream.between(vcpu.done, vcpu.done + 1)[0]
        if vcpu.phase is Phase.BEFORE:
            vcpu.phase = Phase.READY
            if page not in self._writable:
                self._writable.add(page)
                vcpu.phase = Phase.WRITABLE
                if self.draw.random() < 0.5:  # the slow path logs under the lock
                    self._finish_fault(vcpu)
        elif vcpu.phase is Phase.WRITABLE:
            if self.draw.random() < 0.2:  # long enough for others to store to the page
                self._finish_fault(vcpu)
        elif vcpu.phase is Phase.READY:
            if page not in self._writable:
                vcpu.phase = Phase.BEFORE
                return
            vcpu.done += 1
            vcpu.phase = Phase.STORED
        else:
            vcpu.published = vcpu.done
            vcpu.phase = Phase.BEFORE

    def _finish_fault(self, vcpu: Vcpu) -> None:
        page = vcpu.stream.between(vcpu.done, vcpu.done + 1)[0]
        if self.logging[_slot_of(page).slot]:
            if self.rings:
                self._pushed[vcpu.id].append(page)
            else:
                self._dirty.add(page)
        vcpu.phase = Phase.READY

    def _leave_guest(self, vcpu: Vcpu) -> None:
        """What an exit from KVM_RUN waits for."""
        if vcpu.phase is Phase.WRITABLE:
            self._finish_fault(vcpu)
        if vcpu.phase is Phase.READY:
            vcpu.phase = Phase.BEFORE

    def _settle(self, vcpu: Vcpu) -> None:
        """Leave the guest; the memory shows whether the write that was in flight is done."""
        self._leave_guest(vcpu)
        vcpu.published = vcpu.done
        if vcpu.phase is Phase.STORED:
            vcpu.phase = Phase.BEFORE

    # --- operations, as generators that yield wherever another thread may run ------------------------------------------------

    def toggle(self, slot: SlotPages, on: bool, stopped: bool = False) -> Iterator[None]:
        """KVM_SET_USER_MEMORY_REGION with or without KVM_MEM_LOG_DIRTY_PAGES."""
        event = Toggle(self.ledger.now(), 0, self._counts(), exact=self._exact(stopped), slot=slot.slot, on=on)
        yield
        if not self._ignores_toggles:
            for vcpu in self.vcpus:  # synchronize_srcu()
                if vcpu.phase is Phase.WRITABLE:
                    self._finish_fault(vcpu)
            changes = self.logging[slot.slot] != on
            self.logging[slot.slot] = on
            if changes:
                self._dirty -= set(slot.range)
            if changes and on and self.initially_set:
                self._dirty |= set(slot.range)
            elif changes and on:
                self._writable -= set(slot.range)
        yield
        self._end(event)

    def zap_all(self) -> Iterator[None]:
        """Delete another slot, so that all SPTEs are zapped."""
        event = ZapAll(self.ledger.now(), 0, self._counts(), exact=self._exact(stopped=False))
        yield
        self._writable.clear()
        yield
        self._end(event)

    def reset(self) -> Iterator[None]:
        """KVM_RESET_DIRTY_RINGS by a thread that harvests nothing."""
        event = Reset(self.ledger.now())
        event.count = yield from self._reset_rings()
        self._end(event)

    def harvest(self, most: int | None = None, stopped: bool = False, last: bool = False) -> Iterator[None]:
        """Harvest all rings, or the first entries of each, and reset what was harvested."""
        event = self._begin(0, NPAGES, stopped)
        event.complete = most is None
        yield
        self._kick(stopped)
        for pushed, harvested in zip(self._pushed, self._harvested, strict=True):
            event.reported.append(pushed[:most])
            harvested += pushed[:most]
            del pushed[:most]
            yield
        # A harvested entry is reset by this call, or by that of another thread, which has to have returned.
        event.reset = yield from self._reset_rings()
        self._end(event, last)

    def collect(self, slot: SlotPages, stopped: bool = False, last: bool = False) -> Iterator[None]:
        """KVM_GET_DIRTY_LOG, and KVM_CLEAR_DIRTY_LOG if the mode has it, of the whole slot or a part of it."""
        pages = slot.range
        if self.mode != "dirty-log" and not stopped and self.draw.random() < 0.5:
            first = self.draw.randrange(slot.first, slot.end)
            pages = range(first, self.draw.randint(first + 1, slot.end))
        event = self._begin(pages.start, pages.stop, stopped)
        yield
        self._kick(stopped)
        reported = self._dirty & set(pages)
        event.refused = not self.logging[slot.slot]
        event.reported.append([] if event.refused else sorted(reported))
        if self.mode != "dirty-log":
            yield
        if self.logging[slot.slot] and not event.refused:
            self._writable -= reported & self._dirty
            self._dirty -= reported
        yield
        self._end(event, last)

    def _reset_rings(self) -> Generator[None, None, int]:
        """Returns how many entries were reset."""
        while self._resetting:
            yield
        self._resetting = True
        count = 0
        for harvested in self._harvested:
            self._writable.difference_update(harvested)
            count += len(harvested)
            harvested.clear()
            yield
        self._resetting = False
        return count

    def _kick(self, stopped: bool) -> None:
        if self.kicks and not stopped:
            for vcpu in self.vcpus:
                self._leave_guest(vcpu)

    # --- a run ------------------------------------------------------------------------------------------------------------

    def run(self, rounds: int, workers: Callable[["ToyKvm"], Sequence[Iterator[Iterator[None]]]]) -> None:
        """Rounds of *workers* beside the vCPUs, each with a last complete collection, with all vCPUs stopped."""
        for slot in SLOTS:
            self._finish(self.toggle(slot, on=True, stopped=True))
        for number in range(rounds):
            self._take_turns([_in_a_row(worker) for worker in workers(self)])
            self._stop()
            self._collect_all()
            if self.fault is not None and number == rounds - 1:
                self._plant(self.fault)
            self.events.append(None)

    def _plant(self, fault: Fault) -> None:
        """Write more at the end, without a collection meanwhile, and falsify the last report."""
        if fault.name == "ignored-on":
            for slot in SLOTS:
                self._finish(self.toggle(slot, on=False, stopped=True))
        self._ignores_toggles = fault.name.startswith("ignored")
        for slot in SLOTS:
            self._finish(self.toggle(slot, on=fault.name != "ignored-off", stopped=True))
        before = [vcpu.done for vcpu in self.vcpus]
        while any(vcpu.done < then + 8 for vcpu, then in zip(self.vcpus, before, strict=True)):
            self.step(self.draw.choice(self.vcpus))
        self._stop()
        fault.planted = True
        self._collect_all(last=True)

    def _collect_all(self, last: bool = False) -> None:
        if self.rings:
            self._finish(self.harvest(stopped=True, last=last))
            return
        for slot in SLOTS:
            self._finish(self.collect(slot, stopped=True, last=last))

    def _take_turns(self, workers: list[Iterator[None]]) -> None:
        while workers:
            running = [vcpu for vcpu in self.vcpus if not vcpu.parked]
            if running and self.draw.random() < 0.8:
                self.step(self.draw.choice(running))
                continue
            worker = self.draw.choice(workers)
            if next(worker, _ENDED) is _ENDED:
                workers.remove(worker)

    def _finish(self, operation: Iterator[None]) -> None:
        for _ in operation:
            pass

    def _stop(self) -> None:
        for vcpu in self.vcpus:
            vcpu.parked = False
            self._settle(vcpu)

    def park(self) -> None:
        """Let some vCPUs wait outside KVM_RUN, as with a full ring."""
        for vcpu in self.vcpus:
            vcpu.parked = self.draw.random() < 0.4
            if vcpu.parked:
                self._settle(vcpu)

    def _counts(self) -> list[int]:
        return [vcpu.published for vcpu in self.vcpus]

    def _exact(self, stopped: bool) -> list[bool]:
        return [stopped or vcpu.parked for vcpu in self.vcpus]

    def _begin(self, first: int, last: int, stopped: bool) -> Collection:
        exact = self._exact(stopped)
        return Collection(self.ledger.now(), 0, self._counts(), exact=exact, first=first, last=last, kicked=self.kicks)

    def _end(self, event: Event, last: bool = False) -> None:
        if isinstance(event, Counted):
            event.after = self._counts()
        if last and self.fault is not None and isinstance(event, Collection):
            falsify(self.fault, event, self)
        event.end = self.ledger.now()
        self.events.append(event)


FAULTS = ["drop", "add", "ignored-on", "ignored-off"]
RING_FAULTS = ["repeat", "other-ring"]


def falsify(fault: Fault, event: Collection, kvm: ToyKvm) -> None:
    """Plant *fault* in the report of the last collection, whose pages were written since the one before."""
    reported = [list(pages) for pages in event.reported]
    if fault.name == "add":
        reported[0].append(next(page for page in sorted(UNWRITTEN) if event.first <= page < event.last))
    source = next((source for source, pages in enumerate(reported) if pages), None)
    if source is not None:
        written = kvm.vcpus[source].stream.between(kvm.vcpus[source].done - 4, kvm.vcpus[source].done)
        page = next((page for page in written if page in reported[source]), reported[source][0])
        if fault.name == "drop":
            reported = [[other for other in pages if other != page] for pages in reported]
        elif fault.name == "repeat":
            reported[source] += [page] * 40
        elif fault.name == "other-ring":
            others = [vcpu for vcpu in kvm.vcpus if page not in vcpu.stream.pages]
            fault.planted = bool(others)
            if others:
                reported[others[0].id].append(page)
    event.reported = [*reported]
    event.reset = event.harvested


def collectors(count: int, toggles: bool = False) -> Callable[[ToyKvm], list[Iterator[Iterator[None]]]]:
    """Workers that collect at random moments, and one that toggles, zaps, or resets."""

    def collecting(kvm: ToyKvm) -> Iterator[Iterator[None]]:
        for _ in range(kvm.draw.randint(1, 4)):
            if kvm.rings:
                yield kvm.harvest(kvm.draw.choice([None, None, kvm.draw.randint(1, 3)]))
            else:
                yield kvm.collect(kvm.draw.choice(SLOTS))

    def changing(kvm: ToyKvm) -> Iterator[Iterator[None]]:
        for _ in range(kvm.draw.randint(1, 4)):
            what = kvm.draw.choice(["zap", "reset", "off"])
            if what == "zap":
                yield kvm.zap_all()
            elif what == "reset" and kvm.rings:
                yield kvm.reset()
            elif toggles:
                slot = kvm.draw.choice(SLOTS)
                yield kvm.toggle(slot, on=False)
                yield kvm.toggle(slot, on=True)

    return lambda kvm: [*(collecting(kvm) for _ in range(count)), changing(kvm)]


def one_collector(kvm: ToyKvm) -> list[Iterator[Iterator[None]]]:
    """As in the matrix: one thread collects while the vCPUs run, or some of them wait with a full ring."""

    def collecting() -> Iterator[Iterator[None]]:
        for _ in range(kvm.draw.randint(1, 4)):
            kvm.park()
            yield from [kvm.harvest()] if kvm.rings else map(kvm.collect, SLOTS)

    return [collecting()]


def _slot_of(page: int) -> SlotPages:
    return next(slot for slot in SLOTS if page in slot.range)


def _in_a_row(operations: Iterator[Iterator[None]]) -> Iterator[None]:
    for operation in operations:
        yield from operation
