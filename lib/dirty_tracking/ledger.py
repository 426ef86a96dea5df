# SPDX-License-Identifier: GPL-2.0-only
"""The ledger of one VM: collections, resets, toggles and zaps, each with its time and the writes of each vCPU until then.

Any thread may record. judge.py verifies what was recorded; docs/contract.md has the rules. A ledger that is dumped as lines
of JSON is a trace, which can be verified on any machine.
"""

import json
import threading
from array import array
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, TextIO

from dirty_tracking.write_stream import WriteStream
from kvm_util.wording import counted

# How many collections the history of a page covers
_REMEMBERED = 64

# A slot and an offset, as a report has them
Entry = tuple[int, int]


@dataclass(frozen=True)
class SlotPages:
    """A memslot whose pages have the numbers from *first* to *end* - 1 in the vCPUs' streams.

    :ivar known: whether all writes to it are in the streams
    """

    slot: int
    first: int
    end: int
    known: bool = True

    @property
    def range(self) -> range:
        """The numbers of its pages."""
        return range(self.first, self.end)


@dataclass
class Event:
    """Something that lasted from *start* to *end*, two moments of the ledger's clock."""

    start: int = 0
    end: int = 0

    def overlaps(self, other: "Event") -> bool:
        """Whether the two overlap in time."""
        return self.start < other.end and other.start < self.end


@dataclass
class Reset(Event):
    """A call of KVM_RESET_DIRTY_RINGS by a thread that had harvested nothing itself.

    :ivar count: how many entries KVM says that it reset
    """

    count: int = 0


@dataclass
class Counted(Event):
    """An event for which the writes of the vCPUs were counted.

    :ivar before: how many writes each vCPU was known to have done at *start*; one more may be in flight
    :ivar after: the same at *end*
    :ivar exact: for each vCPU, whether it was out of KVM_RUN from *start* to *end*, so that both counts are exact
    """

    before: list[int] = field(default_factory=list)
    after: list[int] = field(default_factory=list)
    exact: list[bool] = field(default_factory=list)


@dataclass
class Toggle(Counted):
    """Dirty logging of *slot* was enabled or disabled."""

    slot: int = 0
    on: bool = False


@dataclass
class ZapAll(Counted):
    """A slot that no vCPU writes was moved or deleted, and KVM zapped the page tables of all slots."""


@dataclass
class Collection(Counted):
    """The pages *first* to *last* - 1 were collected: reported, and write-protected again.

    :ivar reported: page numbers from each source: one bitmap for all vCPUs, or one ring per vCPU, in the ring's order
    :ivar strays: source, slot and offset of what was reported and is no page of the ledger's slots
    :ivar reset: how many entries KVM says that it reset, in all calls of this collection
    :ivar behind_gap: for each ring, how many dirty entries are behind one that is not dirty; empty if that was not checked
    :ivar complete: whether it asked for all that was logged when it began
    :ivar refused: KVM_GET_DIRTY_LOG failed with ENOENT
    :ivar kicked: each vCPU left KVM_RUN between *start* and the moment at which KVM was asked
    :ivar iteration: the iteration of the run, counted from 1; 0 if the test has no iterations
    :ivar number: its number in the ledger, counted from 1
    """

    first: int = 0
    last: int = 0
    reported: list[Sequence[int]] = field(default_factory=list)
    strays: list[tuple[int, int, int]] = field(default_factory=list)
    reset: int = 0
    behind_gap: list[int] = field(default_factory=list)
    complete: bool = True
    refused: bool = False
    kicked: bool = False
    iteration: int = 0
    number: int = 0

    def add(self, pages: Sequence[int], strays: Iterable[Entry]) -> None:
        """Add what the next source reported: page numbers, and entries that are no page of the ledger."""
        self.strays += ((len(self.reported), slot, offset) for slot, offset in strays)
        self.reported.append(pages)

    def covers(self, other: "Collection") -> bool:
        """Whether it asked for all pages that *other* asked for."""
        return self.first <= other.first and other.last <= self.last

    @property
    def harvested(self) -> int:
        """How many pages or entries were reported in all."""
        return sum(map(len, self.reported)) + len(self.strays)

    @cached_property
    def pages(self) -> set[int]:
        """The page numbers of all sources."""
        return set().union(*self.reported)

    @cached_property
    def rings(self) -> list[Counter[int]]:
        """How often each page is in each source."""
        return [Counter(pages) for pages in self.reported]


_KINDS: dict[str, type[Event]] = {kind.__name__: kind for kind in (Reset, Toggle, ZapAll, Collection)}


class Ledger:
    """Recorder of one VM's events.

    :param streams: what each vCPU writes
    :param slots: the memslots that the streams' page numbers stand for, in ascending order
    :param per_vcpu: whether each vCPU has a ring of its own
    :param initially_set: whether all pages are dirty when dirty logging is enabled (KVM_DIRTY_LOG_INITIALLY_SET)
    :param entries_per_write: how many ring entries one write may make: 2 with PML
    :ivar collections: how many were recorded
    :ivar harvested: how many pages or ring entries they had in all
    """

    def __init__(
        self,
        streams: Sequence[WriteStream],
        slots: Sequence[SlotPages],
        per_vcpu: bool,
        initially_set: bool,
        entries_per_write: int = 1,
    ) -> None:
        self.streams = streams
        self.slots = slots
        self._places = {pages.slot: (pages.first, pages.end - pages.first) for pages in slots}
        self.per_vcpu = per_vcpu
        self.initially_set = initially_set
        self.entries_per_write = entries_per_write
        self.collections = 0
        self.harvested = 0
        self._lock = threading.Lock()
        self._clock = 0
        self._events: list[Event] = []
        self._trace: TextIO | None = None
        self._recent: deque[tuple[int, int, list[array[int]]]] = deque(maxlen=_REMEMBERED)

    def now(self) -> int:
        """The next moment."""
        with self._lock:
            self._clock += 1
            return self._clock

    def record(self, event: Event) -> None:
        """Record *event*, which has ended."""
        with self._lock:
            if isinstance(event, Collection):
                self.collections += 1
                self.harvested += event.harvested
                event.number = self.collections
            self._events.append(event)
            if self._trace is not None:
                self._write(event)

    def take(self) -> list[Event]:
        """What was recorded since the last call, in the order of its end."""
        with self._lock:
            events, self._events = self._events, []
        events.sort(key=lambda event: event.end)
        for event in events:
            if isinstance(event, Collection):
                pages = [array("I", numbers) for numbers in event.reported]
                self._recent.append((event.number, event.iteration, pages))
        return events

    def page_numbers(self, slot: int, offsets: Sequence[int]) -> tuple[Sequence[int], list[Entry]]:
        """The numbers of a slot's pages, and the entries whose page does not exist.

        >>> slots = [SlotPages(1, 0, 8), SlotPages(2, 8, 12)]
        >>> Ledger([], slots, per_vcpu=False, initially_set=False).page_numbers(2, [0, 3, 4])
        ([8, 11], [(2, 4)])
        """
        first, npages = self._places.get(slot, (0, 0))
        strays: list[Entry] = []
        if offsets and max(offsets) >= npages:
            strays = [(slot, offset) for offset in offsets if offset >= npages]
            offsets = [offset for offset in offsets if offset < npages]
        return [first + offset for offset in offsets] if first else offsets, strays

    def entry_numbers(self, slots: Sequence[int], offsets: Sequence[int]) -> tuple[Sequence[int], list[Entry]]:
        """As :meth:`page_numbers`, for the entries of a ring, each with a slot of its own."""
        if slots[1:] == slots[:-1]:
            return self.page_numbers(slots[0], offsets) if slots else ([], [])
        numbers: list[int] = []
        strays: list[Entry] = []
        for slot, offset in zip(slots, offsets, strict=True):
            first, npages = self._places.get(slot, (0, 0))
            if offset < npages:
                numbers.append(first + offset)
            else:
                strays.append((slot, offset))
        return numbers, strays

    def last_report(self, page: int) -> str:
        """In which verified collection *page* was last reported."""
        for number, iteration, reported in reversed(self._recent):
            if any(page in pages for pages in reported):
                return f"last reported in collection {number}" + (f" (iteration {iteration})" if iteration else "")
        return f"not reported in the last {counted(len(self._recent), 'collection')}"

    def dump(self, file: TextIO) -> None:
        """Write what is recorded to *file*, and later events as they are recorded."""
        header = {
            "streams": [{"pages": stream.pages.tolist(), "loop": stream.loop} for stream in self.streams],
            "slots": [asdict(one) for one in self.slots],
            "per_vcpu": self.per_vcpu,
            "initially_set": self.initially_set,
            "entries_per_write": self.entries_per_write,
        }
        with self._lock:
            self._trace = file
            file.write(json.dumps(header) + "\n")
            for event in self._events:
                self._write(event)

    @classmethod
    def load(cls, file: TextIO) -> "Ledger":
        """The ledger that :meth:`dump` wrote to *file*.

        :raises ValueError: it is no such file
        """
        header: dict[str, Any] = json.loads(file.readline())
        streams = [WriteStream(array("I", one["pages"]), one["loop"]) for one in header.pop("streams")]
        ledger = cls(streams, [SlotPages(**one) for one in header.pop("slots")], **header)
        for line in file:
            event = json.loads(line)
            ledger.record(_KINDS[event.pop("event")](**event))
        return ledger

    def _write(self, event: Event) -> None:
        assert self._trace is not None
        self._trace.write(json.dumps({"event": type(event).__name__} | asdict(event), default=array.tolist) + "\n")
