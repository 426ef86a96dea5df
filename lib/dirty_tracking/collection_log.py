# SPDX-License-Identifier: GPL-2.0-only
"""What several collectors got while vCPUs wrote and tracking was switched on and off, and whether that can be right.

oracle.py holds one collection after the other to the writes in between. Here they overlap. Each has a start and an end on
one clock, and the numbers of writes that each vCPU was known to have done at its start (*before*) and at its end (*after*).
Then

- of what was written before a complete collection began, each page has to be in it, or in another one that began before it
  ended and ended after the write may have been made;
- nothing may be in a collection but what may have been written since the start of the last complete one that had
  ended when it began; and nothing that was certainly written while tracking was off.

Exemptions, in full, beside those of lib/dirty_tracking/oracle.py (the write under way; PML):

- With a page that two vCPUs write, KVM may make it writable for the one, and only then log it: ``fast_pf_fix_direct_spte()``,
  arch/x86/kvm/mmu/mmu.c, exchanges the page-table entry and then calls ``mark_page_dirty_in_slot()``. A store of the other
  vCPU in between is logged with the first one's. So it may be missing in a collection that found another vCPU at the same
  page; then it has to be in the next that does not find one there, and in the last one anyway.
- With rings, the write under way may have a second entry when its page is tracked anew before the store is repeated: because
  tracking is switched on, because other entries of the same page are taken back (oracle.py has the same; of the same
  harvest, another thread may take back those of the other rings before this one is read), or because
  a slot is moved or deleted, which drops the page tables of all slots (``kvm_mmu_zap_all_fast()``, arch/x86/kvm/mmu/mmu.c).
- What a bitmap had not told when tracking was switched off is gone with the bitmap.
- With KVM_DIRTY_LOG_INITIALLY_SET all pages are dirty when tracking is switched on, until they are cleared.
"""

import threading
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from dirty_tracking.violations import ContractViolation, Kind, Violation
from dirty_tracking.write_stream import WriteStream
from kvm_util.wording import counted

_SHOWN = 8


@dataclass
class Event:
    """Something that lasted from *start* to *end*, with each vCPU's number of writes before and after it.

    :ivar exact: all vCPUs were out of their guests, and the numbers are exact
    """

    start: int
    before: list[int]
    exact: bool
    end: int = 0
    after: list[int] = field(default_factory=list)


@dataclass
class Toggle(Event):
    """Tracking of the slot that begins with page *first* was switched on or off."""

    on: bool = False
    first: int = 0


@dataclass
class Drop(Event):
    """A slot that no vCPU writes was moved or deleted, and KVM dropped its page tables for all slots."""


@dataclass
class Collection(Event):
    """What was collected of the pages *first* to *last* - 1.

    :ivar reported: pages from each source: one bitmap for all vCPUs, or one ring per vCPU
    :ivar complete: whether all was taken that was logged when it began
    :ivar refused: KVM said that the slot is not tracked (ENOENT)
    """

    first: int = 0
    last: int = 0
    reported: list[list[int]] = field(default_factory=list)
    complete: bool = True
    refused: bool = False

    def __post_init__(self) -> None:
        self.pages: set[int] = set()
        self.rings: list[Counter[int]] = []

    def covers(self, other: "Collection") -> bool:
        """Whether it was asked for all that *other* was."""
        return self.first <= other.first and other.last <= self.last


class CollectionLog:
    """The log of one VM's collections and toggles; :meth:`now` and :meth:`add` may be called by any thread.

    :param streams: what each vCPU writes
    :param per_vcpu: whether each vCPU has a ring of its own
    :param initially_set: whether all pages are dirty when tracking is switched on
    :param may_log_twice: whether one write may make two ring entries (PML)
    :ivar demanded: how many pages had to be reported, summed over collections and vCPUs
    """

    def __init__(
        self, streams: Sequence[WriteStream], per_vcpu: bool, initially_set: bool, may_log_twice: bool = False
    ) -> None:
        self.demanded = 0
        self._streams = streams
        self._vcpus = range(len(streams))
        self._per_vcpu = per_vcpu
        self._initially_set = initially_set
        self._entries_per_write = 2 if may_log_twice else 1
        self._lock = threading.Lock()
        self._clock = 0
        self._collections: list[Collection] = []
        self._last: dict[tuple[int, int], Collection] = {}
        self._toggles: list[Toggle] = []
        self._drops: list[Drop] = []
        self._findings: list[Violation] = []

    def now(self) -> int:
        """The next moment."""
        with self._lock:
            self._clock += 1
            return self._clock

    def add(self, event: Collection | Toggle | Drop) -> None:
        """Add what has ended."""
        with self._lock:
            if isinstance(event, Toggle):
                self._toggles.append(event)
            elif isinstance(event, Drop):
                self._drops.append(event)
            else:
                event.rings = [Counter(pages) for pages in event.reported]
                event.pages = set().union(*event.rings)
                self._collections.append(event)

    def check(self, areas: Iterable[tuple[int, int]]) -> None:
        """Hold all that was collected to the writes; the last collections must have been exact, and complete.

        :param areas: the slots, by first page and end
        :raises ContractViolation: something cannot be right
        """
        for first, last in areas:
            self._check_area(
                [one for one in self._collections if one.first < last and first < one.last],
                [one for one in self._last.values() if one.first < last and first < one.last],
                [one for one in self._toggles if one.first == first],
                range(first, last),
            )
        self._last |= {
            (one.first, one.last): one for one in self._collections if one.exact and one.complete and not one.refused
        }
        self._collections = []
        self._drops = []
        latest = {toggle.first: toggle for toggle in sorted(self._toggles, key=lambda toggle: toggle.end)}
        self._toggles = [*latest.values()]
        if self._findings:
            findings, self._findings = self._findings, []
            raise ContractViolation(findings)

    def _check_area(
        self, collections: list[Collection], checked: list[Collection], toggles: list[Toggle], area: range
    ) -> None:
        """Check what was collected since the last check of a slot; what was *checked* before is known to be right."""
        toggles.sort(key=lambda toggle: toggle.start)
        collections.sort(key=lambda one: one.end)
        on_ranges = [self._surely_on(vcpu, toggles) for vcpu in self._vcpus]
        off_ranges = [self._surely_off(vcpu, toggles) for vcpu in self._vcpus]
        owed: list[tuple[int, int, int]] = []
        for one in collections:
            if not self._per_vcpu and not self._check_refusal(one, toggles):
                continue
            since = self._tracked_since(one, toggles)
            self._check_false(one, [*self._last.values(), *collections], checked, toggles, off_ranges, area)
            if self._is_complete(one, toggles):
                owed = self._check_lost(one, collections, checked, since, on_ranges, owed, area)
                checked.append(one)

    def _check_refusal(self, one: Collection, toggles: Sequence[Toggle]) -> bool:
        """Whether KVM answered; a finding when its answer does not fit to the tracking's being on or off."""
        if not self._overlaps(one, toggles) and one.refused == self._is_on(one, toggles):
            state = "on" if one.refused else "off"
            answer = "ENOENT" if one.refused else "a bitmap"
            text = f"collection at {one.start}: KVM answered with {answer} while tracking was {state}"
            self._findings.append(Violation(Kind.LOST if one.refused else Kind.SPURIOUS, text))
        return not one.refused

    def _check_false(
        self, one: Collection, collections: Sequence[Collection], checked: Sequence[Collection],
        toggles: Sequence[Toggle], off_ranges: Sequence[Sequence[tuple[int, int]]], area: range,
    ) -> None:  # fmt: skip
        """Nothing is reported but what may have been written since it was collected last."""
        free = self._pages_still_set(one, checked, toggles, area)
        last_complete = max(
            (last for last in checked if last.end < one.start), key=lambda last: last.start, default=None
        )
        events: list[Collection | Toggle | Drop] = [
            *collections,
            *(toggle for toggle in toggles if toggle.on),
            *self._drops,
        ]
        events = [event for event in events if event.start < one.end]
        since = self._tracked_since(one, toggles)
        for source, entries in enumerate(one.reported):
            pages = [page for page in entries if page in area]
            reported = set(pages)
            may: set[int] = set()
            ranges: list[tuple[int, int, int]] = []
            for vcpu in (source,) if self._per_vcpu else self._vcpus:
                start = max(
                    (last.before[vcpu] for last in checked if last.end < one.start and last.covers(one)), default=0
                )
                if since is not None and not self._per_vcpu:
                    start = max(start, since.before[vcpu])
                ranges += ((vcpu, *part) for part in _without(start, one.after[vcpu] + 1, off_ranges[vcpu]))
            for vcpu, first, end in ranges:
                may.update(self._streams[vcpu].last_writes(first, end))
            if false := reported.difference(may, free):
                self._find(Kind.SPURIOUS, one, source if self._per_vcpu else None, false)
            if self._per_vcpu and len(reported) < len(pages):
                excess = set()
                for page, count in Counter(pages).items():
                    if count > 1 and page in may:
                        writes = sum(self._streams[vcpu].count(page, first, end) for vcpu, first, end in ranges)
                        more = count - writes * self._entries_per_write
                        if more > 0:  # seldom; to look for the reasons takes long
                            again = self._times_tracked_anew(source, page, one, events, last_complete)
                            if more > again * self._entries_per_write:
                                excess.add(page)
                if excess:
                    self._find(Kind.DUPLICATE, one, source, excess)

    def _times_tracked_anew(
        self, vcpu: int, page: int, one: Collection, events: Iterable[Collection | Toggle | Drop],
        last_complete: Collection | None,
    ) -> int:  # fmt: skip
        """How often *events* may have tracked the page anew while *vcpu*'s write to it was under way: see the exemptions.

        What was logged before the last complete collection was in that one: an event before it is no reason for a second
        entry after it, unless the write was under way all the time, with its first entry still to be logged
        (``fast_pf_fix_direct_spte()`` again: no harvest waits for a vCPU).
        """
        since = 0
        if last_complete is not None and not self._under_way(vcpu, page, last_complete):
            since = last_complete.start
        return sum(
            sum(ring[page] for its, ring in enumerate(event.rings) if event is not one or its != vcpu)
            if isinstance(event, Collection)
            else 1
            for event in events
            if since < event.end and self._under_way(vcpu, page, event)
        )

    def _check_lost(
        self, one: Collection, collections: Sequence[Collection], checked: Sequence[Collection], since: Toggle | None,
        on_ranges: Sequence[Sequence[tuple[int, int]]], owed: list[tuple[int, int, int]], area: range,
    ) -> list[tuple[int, int, int]]:  # fmt: skip
        """All that was written before *one* began is reported; returns what may still come in a later one."""
        if (
            since is not None
            and self._initially_set
            and not any(last.start > since.end and last.covers(one) for last in checked)
        ):
            told = set().union(
                *(other.pages for other in collections if since.start < other.end and other.start < one.end)
            )
            if absent := {page for page in area if one.first <= page < one.last} - told:
                self._find(Kind.LOST, one, None, absent, "all pages are dirty at first")
        still_owed: list[tuple[int, int, int]] = []
        for vcpu in self._vcpus:
            start = max((last.before[vcpu] for last in checked if last.covers(one)), default=0)
            # With its bitmap, what was owed goes too.
            oldest = since.after[vcpu] if since is not None and not self._per_vcpu else 0
            # Of each page the last write is enough: what has that one has those before.
            due = {page: write for its, write, page in owed if its == vcpu and write >= oldest}
            for first, end in on_ranges[vcpu]:
                if since is not None and not self._per_vcpu and end <= since.after[vcpu]:
                    continue
                low, high = max(start, first), min(end, one.before[vcpu])
                if low < high:
                    due |= self._streams[vcpu].last_writes(low, high)
            lost: set[int] = set()
            for page in due.keys() - one.pages:
                if page not in area:
                    continue
                write = due[page]
                if not one.first <= page < one.last:
                    if (vcpu, write, page) in owed:
                        still_owed.append((vcpu, write, page))
                elif not self._reported_elsewhere(vcpu, write, page, one, collections):
                    if self._about_to_be_written(vcpu, page, one):
                        still_owed.append((vcpu, write, page))
                    else:
                        lost.add(page)
            self.demanded += sum(one.first <= page < one.last and page in area for page in due)
            if lost:
                self._find(Kind.LOST, one, vcpu, lost)
        return still_owed

    def _reported_elsewhere(
        self, vcpu: int, write: int, page: int, one: Collection, collections: Sequence[Collection]
    ) -> bool:
        """Whether another collection has the page, one that ended after the write may have been made."""
        return any(
            page in other.pages
            and other.start < one.end
            and (write < other.after[vcpu] or (write == other.after[vcpu] and not other.exact))
            for other in collections
        )

    def _about_to_be_written(self, vcpu: int, page: int, one: Collection) -> bool:
        """Whether another vCPU may have been making the page writable when it was collected: see the exemptions."""
        return not one.exact and any(self._under_way(other, page, one) for other in self._vcpus if other != vcpu)

    def _under_way(self, vcpu: int, page: int, event: Event) -> bool:
        """Whether *vcpu*'s write to *page* may have been under way during *event*."""
        return page in self._streams[vcpu].last_writes(event.before[vcpu], event.after[vcpu] + 1)

    def _pages_still_set(
        self, one: Collection, checked: Sequence[Collection], toggles: Sequence[Toggle], area: range
    ) -> set[int]:
        """The pages that may be dirty since tracking was switched on, and not cleared since."""
        if not self._initially_set:
            return set()
        since = self._tracked_since(one, toggles)
        if since is None or any(toggle.on and self._overlap(one, toggle) for toggle in toggles):
            return set(area)
        free = set(area)
        for last in checked:
            if since.end < last.start and last.end < one.start:
                free.difference_update(range(last.first, last.last))
        return free

    def _is_complete(self, one: Collection, toggles: Sequence[Toggle]) -> bool:
        if not one.complete:
            return False
        return self._per_vcpu or not self._overlaps(one, toggles)

    @staticmethod
    def _overlap(one: Event, other: Event) -> bool:
        return one.start < other.end and other.start < one.end

    def _overlaps(self, one: Event, toggles: Sequence[Toggle]) -> bool:
        return any(self._overlap(one, toggle) for toggle in toggles)

    @staticmethod
    def _is_on(one: Event, toggles: Sequence[Toggle]) -> bool:
        """Whether tracking is on when *one* begins."""
        before = [toggle for toggle in toggles if toggle.end < one.start]
        return bool(before) and before[-1].on

    @staticmethod
    def _tracked_since(one: Event, toggles: Sequence[Toggle]) -> Toggle | None:
        """The last time before *one* that tracking was switched on."""
        return next((toggle for toggle in reversed(toggles) if toggle.on and toggle.end < one.start), None)

    def _surely_on(self, vcpu: int, toggles: Sequence[Toggle]) -> list[tuple[int, int]]:
        """The writes of *vcpu* that were certainly made while tracking was on, as ranges [first, end)."""
        ranges = []
        for index, toggle in enumerate(toggles):
            if toggle.on:
                end = toggles[index + 1].before[vcpu] if index + 1 < len(toggles) else 1 << 62
                ranges.append((toggle.after[vcpu] + (not toggle.exact), end))
        return ranges

    def _surely_off(self, vcpu: int, toggles: Sequence[Toggle]) -> list[tuple[int, int]]:
        """The writes of *vcpu* that were certainly made while tracking was off, as ranges [first, end)."""
        ranges = [(0, toggles[0].before[vcpu])] if toggles and toggles[0].on else []
        for index, toggle in enumerate(toggles):
            if not toggle.on:
                end = toggles[index + 1].before[vcpu] if index + 1 < len(toggles) else 1 << 62
                ranges.append((toggle.after[vcpu] + 1, end))
        return ranges

    def _find(self, kind: Kind, one: Collection, vcpu: int | None, pages: set[int], why: str = "") -> None:
        some = ", ".join(map(str, sorted(pages)[:_SHOWN]))
        writes = f"writes {one.before} to {one.after}" + (", all vCPUs stopped" if one.exact else "")
        text = (
            f"{why + ': ' if why else ''}collection at {one.start} to {one.end} of pages {one.first} to {one.last - 1},"
            f" {writes}: {counted(len(pages), 'page')}: {some}"
        )
        self._findings.append(Violation(kind, text, None, tuple(sorted(pages)), vcpu))


def _without(start: int, end: int, holes: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """What is left of the range *start* to *end* - 1 without *holes*, which are in order."""
    left = []
    for first, last in (*holes, (end, end)):
        if start < min(first, end):
            left.append((start, min(first, end)))
        start = max(start, last)
    return left
