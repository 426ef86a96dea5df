# SPDX-License-Identifier: GPL-2.0-only
"""The rules of dirty logging, applied to a ledger: what must be reported, what may be, and how often.

The numbers of rules and exemptions are those of docs/contract.md, which has the source of each in the kernel. They hold
for memory whose mapping the host does not change (``opt_out_of_numa_balancing()`` of lib/kvm_util/host.py).
"""

from array import array
from collections import Counter
from collections.abc import Collection as Pages
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass, field
from itertools import compress

from dirty_tracking.ledger import Collection, Counted, Event, Ledger, Reset, SlotPages, Toggle, ZapAll
from dirty_tracking.violations import Kind, Violation
from kvm_util.wording import counted

_SHOWN = 8
# A page's mark when a report is compared with the pages that it had to have: the last of the two that was set
_REPORTED, _REQUIRED = 1, 2
_ONLY_REPORTED = bytes(mark == _REPORTED for mark in range(256))
_NEVER = 1 << 62

# The writes of a vCPU from an index up to, and without, another one
Span = tuple[int, int]


@dataclass
class _SlotState:
    """What is known of one memslot.

    :ivar collections: those that the rules still need
    :ivar judged: those of them that are complete and judged
    :ivar deferred: writes that a later collection still has to report (E2): the last one of each vCPU to a page
    """

    pages: SlotPages
    toggles: list[Toggle] = field(default_factory=list)
    collections: list[Collection] = field(default_factory=list)
    judged: list[Collection] = field(default_factory=list)
    deferred: dict[tuple[int, int], int] = field(default_factory=dict)
    logged: list[list[Span]] = field(default_factory=list)
    unlogged: list[list[Span]] = field(default_factory=list)

    def concerns(self, collection: Collection) -> bool:
        """Whether *collection* collected any page of the slot."""
        return collection.first < self.pages.end and self.pages.first < collection.last

    def last_enabled(self, event: Event) -> Toggle | None:
        """The last time before *event* that dirty logging was enabled."""
        return next((toggle for toggle in reversed(self.toggles) if toggle.on and toggle.end < event.start), None)

    def toggled_during(self, event: Event) -> bool:
        """Whether dirty logging was enabled or disabled at the same time as *event*."""
        return any(toggle.overlaps(event) for toggle in self.toggles)

    def update_spans(self, vcpus: range) -> None:
        """Find which writes were certainly made with dirty logging enabled, and which certainly without."""
        self.logged = [list(self._spans(vcpu, on=True)) for vcpu in vcpus]
        self.unlogged = [list(self._spans(vcpu, on=False)) for vcpu in vcpus]
        if self.toggles and self.toggles[0].on:
            for vcpu in vcpus:
                self.unlogged[vcpu].insert(0, (0, self.toggles[0].before[vcpu]))

    def _spans(self, vcpu: int, on: bool) -> Iterator[Span]:
        for index, toggle in enumerate(self.toggles):
            if toggle.on == on:
                # Writes during the call may be logged or not (E7). So may the write in flight at its end: it may have been
                # made during the call, or, if that disabled dirty logging, have been logged before it is made (E1).
                in_flight = not (on and toggle.exact[vcpu])
                end = self.toggles[index + 1].before[vcpu] if index + 1 < len(self.toggles) else _NEVER
                yield toggle.after[vcpu] + in_flight, end

    def forget(self) -> Collection | None:
        """Drop what no rule needs after a complete collection of all pages with all vCPUs out of KVM_RUN; returns that one."""
        covering = [
            collection for collection in self.judged
            if all(collection.exact) and collection.first <= self.pages.first and self.pages.end <= collection.last
        ]  # fmt: skip
        if not covering:
            return None
        last = max(covering, key=lambda collection: collection.start)
        self.collections = [collection for collection in self.collections if collection.end >= last.start]
        self.judged = [collection for collection in self.judged if collection.end >= last.start]
        before = [toggle for toggle in self.toggles if toggle.end < last.start]
        self.toggles = [*before[-1:], *(toggle for toggle in self.toggles if toggle.end >= last.start)]
        return last


@dataclass(frozen=True)
class _Report:
    """What one source reported of a slot, beside the pages that it had to report.

    :ivar entries: the page numbers that were reported
    :ivar distinct: how many different pages these are
    :ivar required: how many different pages had to be reported
    :ivar complete: whether all of these were
    :ivar extra: the pages that were reported and did not have to be
    """

    entries: Sequence[int]
    distinct: int
    required: int
    complete: bool
    extra: set[int]

    @classmethod
    def compare(cls, entries: Sequence[int], required: Sequence[Sequence[int]], end: int) -> "_Report":
        """Compare *entries* with the pages *required*; all numbers are less than *end*."""
        # A byte a page: sets take five times as long for pages in random order.
        marks = bytearray(end)
        for page in entries:
            marks[page] = _REPORTED
        distinct = marks.count(_REPORTED)
        for pages in required:
            for page in pages:
                marks[page] = _REQUIRED
        needed, more = marks.count(_REQUIRED), marks.count(_REPORTED)
        extra = set(compress(range(end), marks.translate(_ONLY_REPORTED))) if more else set()
        return cls(entries, distinct, needed, needed == distinct - more, extra)


class Judge:
    """Verifies the events of *ledger* as they come.

    :ivar pages_required: how many pages had to be reported, summed over collections and their sources
    """

    def __init__(self, ledger: Ledger) -> None:
        self.pages_required = 0
        self._ledger = ledger
        self._vcpus = range(len(ledger.streams))
        self._slots = [_SlotState(pages) for pages in ledger.slots if pages.known]
        self._zaps: list[ZapAll] = []
        self._resets: list[Reset] = []
        self._found: list[Violation] = []

    def verify(self) -> list[Violation]:
        """Verify what was recorded since the last call; returns the violations in the order of their collections.

        No operation may be in progress. A missing write is found for certain only if the last collections are complete, with
        all vCPUs out of KVM_RUN.
        """
        events = self._ledger.take()
        collections = [event for event in events if isinstance(event, Collection)]
        self._resets = [event for event in events if isinstance(event, Reset)]
        self._zaps += [event for event in events if isinstance(event, ZapAll)]
        toggles = [event for event in events if isinstance(event, Toggle)]
        for state in self._slots:
            state.toggles += [toggle for toggle in toggles if toggle.slot == state.pages.slot]
            state.toggles.sort(key=lambda toggle: toggle.start)
            state.update_spans(self._vcpus)
            state.collections += filter(state.concerns, collections)
        for collection in collections:
            self._check_strays(collection)
            for state in self._slots:
                if state.concerns(collection):
                    self._check_collection(collection, state)
            self._check_gaps(collection)
        if self._ledger.per_vcpu:
            self._check_reset_counts(sorted([*collections, *self._resets], key=lambda event: event.start))
        self._forget()
        found, self._found = self._found, []
        return sorted(found, key=lambda violation: violation.collection)

    def _forget(self) -> None:
        last = [state.forget() for state in self._slots]
        if all(last):
            since = min(collection.start for collection in last if collection is not None)
            self._zaps = [zap for zap in self._zaps if zap.end >= since]

    def _check_collection(self, collection: Collection, state: _SlotState) -> None:
        if not self._ledger.per_vcpu and not self._is_answered(collection, state):
            return
        is_judged = collection.complete and (self._ledger.per_vcpu or not state.toggled_during(collection))
        scope = range(max(collection.first, state.pages.first), min(collection.last, state.pages.end))
        spans = [self._spans_to_report(collection, state, vcpu) if is_judged else [] for vcpu in self._vcpus]
        written = [self._written(vcpu, spans[vcpu], scope) for vcpu in self._vcpus]
        of_sources = [[pages] for pages in written] if self._ledger.per_vcpu else [written]
        reports = [
            _Report.compare(self._of_slot(entries, state), required, self._ledger.slots[-1].end)
            for entries, required in zip(collection.reported, of_sources, strict=True)
        ]
        self._check_spurious(collection, state, reports)
        if is_judged:
            self._check_lost(collection, state, scope, spans, written, reports)
            state.judged.append(collection)

    # --- R1, R2: what must be reported ------------------------------------------------------------------------------------

    def _spans_to_report(self, collection: Collection, state: _SlotState, vcpu: int) -> list[Span]:
        """The writes of *vcpu* that were made with dirty logging enabled, and that no earlier collection had to report."""
        oldest = self._oldest(state.last_enabled(collection), vcpu)
        since = max((last.before[vcpu] for last in state.judged if last.covers(collection)), default=0)
        return [
            (max(since, first), min(end, collection.before[vcpu])) for first, end in state.logged[vcpu] if end > oldest
        ]

    def _oldest(self, enabled: Toggle | None, vcpu: int) -> int:
        """The first write that can be reported: disabling dirty logging discards a bitmap's pages (E5)."""
        return enabled.after[vcpu] if enabled is not None and not self._ledger.per_vcpu else -1

    def _check_lost(
        self, collection: Collection, state: _SlotState, scope: range, spans: list[list[Span]],
        written: list[Sequence[int]], reports: list["_Report"],
    ) -> None:  # fmt: skip
        """Check that each page is reported that was *written* in *spans*, which is looked at for each vCPU."""
        enabled = state.last_enabled(collection)
        absent = self._absent_at_first(collection, state, enabled, scope)
        if absent:
            self._find("R2", Kind.LOST, collection, state, None, absent, ": all pages are dirty at first")
        self.pages_required += sum(report.required for report in reports)
        deferred = {key: write for key, write in state.deferred.items() if key[1] not in scope}
        if len(deferred) == len(state.deferred) and all(report.complete for report in reports):
            return
        for vcpu in self._vcpus:
            oldest = self._oldest(enabled, vcpu)
            owed = {page: write for (writer, page), write in state.deferred.items() if writer == vcpu and page in scope}
            required = set(written[vcpu])
            required.update(page for page, write in owed.items() if write >= oldest)
            missing = required - collection.pages
            if missing and (lost := self._lost(collection, state, vcpu, missing, spans[vcpu], owed, deferred) - absent):
                begin = "the collection before" if state.judged else "dirty logging was enabled"
                detail = f", of {len(required)} written since {begin}"
                self._find("R1", Kind.LOST, collection, state, vcpu, lost, detail)
        state.deferred = deferred

    def _lost(
        self, collection: Collection, state: _SlotState, vcpu: int, missing: set[int], spans: Sequence[Span],
        owed: dict[int, int], deferred: dict[tuple[int, int], int],
    ) -> set[int]:  # fmt: skip
        """Those of the *missing* pages that no other collection reports; *deferred* gets those that a later one may report."""
        # The last write to each page is enough: a report of that one covers those before it.
        writes = {page: write for page, write in owed.items() if page in missing}
        for first, end in spans:
            writes |= self._ledger.streams[vcpu].last_writes(missing, first, end)
        oldest = min(writes.values())
        for other in state.collections:
            if other is not collection and other.start < collection.end and other.after[vcpu] >= oldest:
                last, pages = self._last_write_by(other, vcpu, state), other.pages
                writes = {page: write for page, write in writes.items() if write > last or page not in pages}
        later = {page for page in writes if self._is_about_to_be_logged(vcpu, page, collection)}
        deferred.update(((vcpu, page), writes[page]) for page in later)
        return writes.keys() - later

    def _last_write_by(self, other: Collection, vcpu: int, state: _SlotState) -> int:
        """The last write that *other* may report: that may have been made by the end of *other*."""
        write = other.after[vcpu]
        if other.exact[vcpu]:
            return write - 1
        # It was in flight. A vCPU that is out of KVM_RUN afterwards shows whether it was made (E1).
        for events in (state.collections, state.toggles):
            if any(event.start >= other.end and event.exact[vcpu] and event.before[vcpu] <= write for event in events):
                return write - 1
        return write

    def _is_about_to_be_logged(self, vcpu: int, page: int, collection: Collection) -> bool:
        """Whether another vCPU may have made the page writable without having logged it yet (E2)."""
        return not collection.kicked and any(
            self._in_flight(other, page, collection)
            for other in self._vcpus
            if other != vcpu and not collection.exact[other]
        )

    def _absent_at_first(
        self, collection: Collection, state: _SlotState, enabled: Toggle | None, scope: range
    ) -> set[int]:
        """The pages not reported since dirty logging was enabled, if *collection* was the last that could (R2)."""
        if enabled is None or not self._ledger.initially_set:
            return set()
        if any(last.start > enabled.end and last.covers(collection) for last in state.judged):
            return set()
        reported = (
            other.pages for other in state.collections if enabled.start < other.end and other.start < collection.end
        )
        return set(scope).difference(*reported)

    # --- R3: what may be reported, and R5: how often -----------------------------------------------------------------------

    def _check_spurious(self, collection: Collection, state: _SlotState, reports: list["_Report"]) -> None:
        """Check that each page that is reported may be."""
        rings = self._ledger.per_vcpu
        enabled = state.last_enabled(collection)
        free = self._pages_still_set(collection, state)
        if len(free) == len(state.pages.range):
            return
        for source, report in enumerate(reports):
            spans: list[tuple[int, Span]] = []
            for vcpu in (source,) if rings else self._vcpus:
                since = max(
                    (
                        last.before[vcpu]
                        for last in state.judged
                        if last.end < collection.start and last.covers(collection)
                    ),
                    default=0,
                )
                if enabled is not None and not rings:
                    since = max(since, enabled.before[vcpu])
                # The write in flight may be reported before it is made (E1).
                spans += ((vcpu, span) for span in _without(since, collection.after[vcpu] + 1, state.unlogged[vcpu]))
            spurious = report.extra.difference(free)
            for vcpu, span in spans:
                if not spurious:
                    break
                spurious.difference_update(self._ledger.streams[vcpu].written(*span))
            if spurious:
                detail = f", of {report.distinct} reported"
                self._find("R3", Kind.SPURIOUS, collection, state, source if rings else None, spurious, detail)
            if rings and report.distinct < len(report.entries):
                self._check_duplicates(collection, state, source, report.entries, spurious, [span for _, span in spans])

    def _check_duplicates(
        self, collection: Collection, state: _SlotState, vcpu: int, entries: Sequence[int], spurious: set[int],
        spans: Sequence[Span],
    ) -> None:  # fmt: skip
        """KVM pushes an entry for a write, so a page cannot have more entries than the vCPU may have made writes."""
        counts = {page: count for page, count in Counter(entries).items() if count > 1 and page not in spurious}
        writes: Counter[int] = Counter()
        for span in spans:
            writes += self._ledger.streams[vcpu].counts(counts.keys(), *span)
        each = self._ledger.entries_per_write  # E4
        excess = set()
        for page, count in counts.items():
            more = count - writes[page] * each
            # This is rare, and looking for reasons is slow.
            if more > 0 and more > self._times_protected_in_flight(collection, state, vcpu, page) * each:
                excess.add(page)
        if excess:
            self._find("R5", Kind.DUPLICATE, collection, state, vcpu, excess)

    def _times_protected_in_flight(self, collection: Collection, state: _SlotState, vcpu: int, page: int) -> int:
        """How often the page may have been write-protected again while *vcpu*'s write to it was in flight (E3).

        What was logged before the last complete collection is in that one, so events before it are no reason for a second
        entry after it. The exception is a write that was in flight all the time and whose first entry was not logged yet:
        unless vCPUs are kicked, no harvest waits for it (E2).
        """
        earlier = [last for last in state.judged if last.end < collection.start]
        since = 0
        if earlier:
            last = max(earlier, key=lambda last: last.start)
            if last.exact[vcpu]:
                since = last.end
            elif last.kicked or not self._in_flight(vcpu, page, last):
                since = last.start
        times = 0
        reasons: list[Counted] = [*state.collections, *(toggle for toggle in state.toggles if toggle.on), *self._zaps]
        for event in reasons:
            if not (since < event.end and event.start < collection.end and self._in_flight(vcpu, page, event)):
                continue
            if event is state.toggles[0] and state.toggles[0].exact[vcpu]:
                continue  # nothing was logged before, and the write was not made meanwhile
            if not isinstance(event, Collection):
                times += 1
            elif event is not collection:
                times += sum(ring[page] for ring in event.rings)
            elif self._is_overlapped(collection, state):
                # Another thread may reset the entries of the other rings before this ring is read.
                times += sum(ring[page] for owner, ring in enumerate(collection.rings) if owner != vcpu)
        return times

    def _is_overlapped(self, collection: Collection, state: _SlotState) -> bool:
        others: list[Event] = [*state.collections, *self._resets]
        return any(other.overlaps(collection) for other in others if other is not collection)

    def _pages_still_set(self, collection: Collection, state: _SlotState) -> Set[int] | range:
        """The pages that may be dirty because dirty logging was enabled, and were not cleared after that (E6)."""
        if not self._ledger.initially_set:
            return set()
        enabled = state.last_enabled(collection)
        if enabled is None or any(toggle.on and toggle.overlaps(collection) for toggle in state.toggles):
            return state.pages.range
        cleared = [last for last in state.judged if enabled.end < last.start and last.end < collection.start]
        if not cleared:
            return state.pages.range
        if any(last.first <= state.pages.first and last.last >= state.pages.end for last in cleared):
            return set()
        return set(state.pages.range).difference(*(range(last.first, last.last) for last in cleared))

    # --- R4, R6 to R9: answers, entries and counts -------------------------------------------------------------------------

    def _is_answered(self, collection: Collection, state: _SlotState) -> bool:
        """Whether KVM returned a bitmap; a violation if it did although dirty logging was disabled, or the reverse (R4)."""
        before = [toggle for toggle in state.toggles if toggle.end < collection.start]
        enabled = bool(before) and before[-1].on
        if collection.refused == enabled and not state.toggled_during(collection):
            answer, state_text = ("ENOENT", "enabled") if collection.refused else ("a bitmap", "disabled")
            detail = f"KVM answered with {answer} while dirty logging was {state_text}"
            kind = Kind.LOST if collection.refused else Kind.SPURIOUS
            self._add("R4", kind, detail, collection, state.pages.slot)
        return not collection.refused

    def _check_strays(self, collection: Collection) -> None:
        npages = {pages.slot: len(pages.range) for pages in self._ledger.slots}
        for source in dict.fromkeys(source for source, _, _ in collection.strays):
            vcpu = source if self._ledger.per_vcpu else None
            named: dict[int, list[int]] = {}
            for origin, slot, offset in collection.strays:
                if origin == source:
                    named.setdefault(slot, []).append(offset)
            for slot, offsets in named.items():
                some = ", ".join(map(str, sorted(offsets)[:_SHOWN]))
                if slot in npages:
                    detail = f"{counted(len(offsets), 'page')}, the slot has {npages[slot]}: {some}"
                    self._add("R7", Kind.BAD_OFFSET, detail, collection, slot, vcpu, offsets)
                else:
                    detail = f"{counted(len(offsets), 'entry says', 'entries say')} slot {slot:#x}, offset {some}"
                    self._add("R6", Kind.WRONG_SLOT, detail, collection, None, vcpu, offsets)

    def _check_gaps(self, collection: Collection) -> None:
        for vcpu, beyond in enumerate(collection.behind_gap):
            if beyond:
                detail = f"a harvest in order does not reach {counted(beyond, 'entry', 'entries')}"
                self._add("R9", Kind.GAP, detail, collection, None, vcpu)

    def _check_reset_counts(self, events: Sequence[Event]) -> None:
        """Whenever no collection and no reset is in progress, as many entries were reset as were harvested (R8)."""
        harvested = reset = end = 0
        last: Collection | None = None

        def settle() -> None:
            if harvested != reset:
                self._add("R8", Kind.RESET_COUNT, f"harvested {harvested}, reset {reset}", last)

        for event in events:
            if event.start > end:
                settle()
                harvested = reset = 0
            end = max(end, event.end)
            if isinstance(event, Collection):
                last = event
                harvested += event.harvested
                reset += event.reset
            elif isinstance(event, Reset):
                reset += event.count
        settle()

    # --- what the rules have in common -------------------------------------------------------------------------------------

    def _in_flight(self, vcpu: int, page: int, event: Counted) -> bool:
        """Whether *vcpu*'s write to *page* may have been in flight during *event*."""
        return page in self._ledger.streams[vcpu].written(event.before[vcpu], event.after[vcpu] + 1)

    def _written(self, vcpu: int, spans: Sequence[Span], scope: range) -> Sequence[int]:
        """The pages of *scope* that *vcpu* wrote in *spans*, each at least once."""
        pages = array("I")
        for first, end in spans:
            if first < end:
                pages += self._ledger.streams[vcpu].written(first, end)
        return pages if self._is_all(scope) else [page for page in pages if page in scope]

    def _of_slot(self, entries: Sequence[int], state: _SlotState) -> Sequence[int]:
        pages = state.pages.range
        return entries if self._is_all(pages) else [page for page in entries if page in pages]

    def _is_all(self, scope: range) -> bool:
        """Whether these are all pages that the vCPUs may write."""
        slots = self._ledger.slots
        return scope.start <= slots[0].first and scope.stop >= slots[-1].end

    def _find(
        self, rule: str, kind: Kind, collection: Collection, state: _SlotState, vcpu: int | None, pages: Pages[int],
        detail: str = "",
    ) -> None:  # fmt: skip
        """Add a violation about *pages*, which are numbers of the streams."""
        offsets = sorted(page - state.pages.first for page in pages)
        some = ", ".join(map(str, offsets[:_SHOWN]))
        self._add(
            rule, kind, f"{counted(len(offsets), 'page')}{detail}: {some}", collection, state.pages.slot, vcpu, offsets
        )

    def _add(
        self, rule: str, kind: Kind, detail: str, collection: Collection | None, slot: int | None = None,
        vcpu: int | None = None, offsets: Sequence[int] = (),
    ) -> None:  # fmt: skip
        iteration, number = (collection.iteration, collection.number) if collection is not None else (0, 0)
        pages = tuple(sorted(offsets))
        self._found.append(Violation(kind, detail, slot, pages, vcpu, iteration, number, rule))


def _without(start: int, end: int, holes: Sequence[Span]) -> list[Span]:
    """What is left of the span *start* to *end* - 1 without *holes*, which are in order."""
    left = []
    for first, last in (*holes, (end, end)):
        if start < min(first, end):
            left.append((start, min(first, end)))
        start = max(start, last)
    return left
