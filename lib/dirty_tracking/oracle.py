# SPDX-License-Identifier: GPL-2.0-only
"""The oracle: it knows every write that the guest made, and holds KVM's reports and the guest's memory to it.

A collection of dirty pages (here a "reap") is not an instant: the guest goes on writing while it lasts. What is known of each
vCPU is the number of writes that were done before the reap began (*before*) and the number done after it ended (*after*), and
one write more that may be under way at either moment. So, for the reaps k-1 and k of a vCPU:

- writes after the end of k-1 and before the start of k **must** be in k;
- writes during k-1 must be in k-1 or in k;
- nothing but the writes since the start of k-1 **may** be in k.

Of a vCPU that is out of its guest for the whole reap (stopped, or waiting with a full ring) both numbers are one and exact,
since the memory tells whether the write under way is done: then all three rules are exact. So they are for every vCPU in
the last reap of an iteration.

KVM may make a page writable for one vCPU, and only then log it (``fast_pf_fix_direct_spte()``, arch/x86/kvm/mmu/mmu.c): a
store of another vCPU in between is logged with the first one's. That needs no exemption here: every vCPU leaves KVM_RUN
between the count of the writes and the collection (``LogMode.collect()`` of modes.py), so what it has to log is
logged by then.

With a ring for each vCPU, "in k" means in any of the rings for what must be reported, and in the vCPU's own for what may.

Exemptions, in full, for memory that the host leaves where it is (``keep_memory_in_place()`` of lib/kvm_util/host.py):

- The write under way may be reported before it is done, and once more when it is: KVM logs a page when it makes it
  writable, and the vCPU may exit (ring full, signal) before it repeats the store. The C test's ``dirty_ring_last_page``
  exempts the same (kernel commit "KVM: selftests: Tighten checks around prev iter's last dirty page in ring", 2020d3b77a5a).
- With rings, the write under way may also have an entry more for each of its page in the reap before, in any ring: taking one
  back write-protects the page while this vCPU, which KVM has logged, is about to repeat its store (``kvm_reset_dirty_gfn()``,
  virt/kvm/dirty_ring.c).
- With PML one write may make two ring entries: KVM logs the page when it makes it writable, and the CPU once more when it
  sets the dirty bit (the comment in ``fast_pf_fix_direct_spte()``, arch/x86/kvm/mmu/mmu.c).
- With KVM_DIRTY_LOG_INITIALLY_SET the first reap reports every page (api.rst 7.18); here it must.
"""

from array import array
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from dirty_tracking.report import DirtyReport, Source
from dirty_tracking.violations import Kind, Violation
from dirty_tracking.write_stream import WriteStream
from kvm_util.wording import counted

WORDS_PER_PAGE = 512

# How many reaps back the history of a page goes
_REMEMBERED_REAPS = 64

_Found = Callable[[Kind, int | None, Iterable[int], str], None]


@dataclass(frozen=True)
class Reap:
    """One collection, and the writes that each vCPU was known to have done before it began and after it ended.

    :ivar exact: for each vCPU, whether it was out of its guest all the time, so that both counts are exact
    """

    iteration: int
    before: list[int]
    after: list[int]
    exact: list[bool]
    report: DirtyReport


@dataclass
class _Seen:
    """What the oracle keeps of one vCPU's last reap.

    :ivar early: those of the writes *before* and *after*, by index, whose page was reported when they may have been under
        way: a vCPU that does not get to run may publish a write only many reaps after it was done and reported
    """

    before: int = 0
    after: int = 0
    exact: bool = True
    early: frozenset[int] = frozenset()


class Oracle:
    """Checks the reaps and the memory of one run.

    :param npages: size of the test slot
    :param streams: what each vCPU writes; vCPU *v* writes word *v* of a page
    :param per_vcpu: whether each vCPU has a source (ring) of its own
    :param initially_set: whether the first reap has to report every page
    :param slot: the slot field that ring entries must have
    :param may_log_twice: whether one write may make two entries
    """

    def __init__(
        self,
        npages: int,
        streams: Sequence[WriteStream],
        per_vcpu: bool,
        initially_set: bool,
        slot: int,
        may_log_twice: bool = False,
    ) -> None:
        self.npages = npages
        self._reports: deque[tuple[int, array[int]]] = deque(maxlen=_REMEMBERED_REAPS)
        self._streams = streams
        self._slot = slot
        self._entries_per_write = 2 if may_log_twice else 1
        self._initially_set = initially_set
        everyone = range(len(streams))
        self._sources = [(vcpu,) for vcpu in everyone] if per_vcpu else [tuple(everyone)]
        self._per_vcpu = per_vcpu
        self._seen = [_Seen() for _ in streams]
        self._reported_before: set[int] = set()
        self._rings_before: list[Counter[int]] = [Counter() for _ in self._sources]
        self._expected = [array("Q", bytes(8 * npages)) for _ in streams]
        self._checked_writes = [0 for _ in streams]
        self._iteration_ends: list[list[int]] = [[] for _ in streams]
        self._reap_iterations: list[int] = []

    def done(self, vcpu: int, published: int, words: memoryview) -> int:
        """How many writes *vcpu*, out of its guest, has done: *published*, and one more when its value is in memory."""
        next_page = self._streams[vcpu].between(published, published + 1)[0]
        return published + (words[next_page * WORDS_PER_PAGE + vcpu] == published + 1)

    def check_reap(self, reap: Reap) -> list[Violation]:
        """Check one reap; they must come in the order in which they were made."""
        self._reap_iterations.append(reap.iteration)
        findings: list[Violation] = []

        def found(kind: Kind, vcpu: int | None, pages: Iterable[int], detail: str) -> None:
            findings.append(
                Violation(
                    kind,
                    detail,
                    None,
                    tuple(sorted(pages)),
                    vcpu,
                    reap.iteration,
                    collection=len(self._reap_iterations),
                )
            )

        reported: set[int] = set()
        for index, vcpus in enumerate(self._sources):
            reported |= self._check_source(reap, index, vcpus, found)
        self._check_lost(reap, reported, found)
        if self._per_vcpu:
            harvested = reap.report.harvested
            if reap.report.reset != harvested:
                found(Kind.RESET_COUNT, None, (), f"harvested {harvested}, reset {reap.report.reset}")
        self._reports.append((len(self._reap_iterations), array("I", reported)))
        self._reported_before = reported
        self._rings_before = [Counter(source.offsets) for source in reap.report.sources] if self._per_vcpu else []
        for vcpu, stream in enumerate(self._streams):
            before, after, exact = reap.before[vcpu], reap.after[vcpu], reap.exact[vcpu]
            early = self._seen[vcpu].early & {before, after}
            if stream.between(after, after + 1)[0] in reported:
                early |= {after}
            self._seen[vcpu] = _Seen(before, after, exact, frozenset() if exact else early)
        return findings

    def check_memory(self, iteration: int, done: Sequence[int], words: memoryview) -> list[Violation]:
        """Check every page's words after an iteration, with all vCPUs stopped and *done* from :meth:`done`."""
        findings = []
        for vcpu, stream in enumerate(self._streams):
            expected = self._expected[vcpu]
            first = self._checked_writes[vcpu]
            for value, page in enumerate(stream.between(first, done[vcpu]), first + 1):
                expected[page] = value
            self._checked_writes[vcpu] = done[vcpu]
            self._iteration_ends[vcpu].append(done[vcpu])
            # Comparing two views of 64-bit words is a loop in C that makes no copy: as fast as memory is.
            actual = words[vcpu::WORDS_PER_PAGE]
            if actual != memoryview(expected):
                wrong = [page for page in range(self.npages) if actual[page] != expected[page]]
                detail = f"{counted(len(wrong), 'page')}; " + "; ".join(
                    f"page {page} expected {self._value_text(vcpu, expected[page])}"
                    f" found {self._value_text(vcpu, actual[page])}"
                    for page in wrong[:8]
                )
                findings.append(Violation(Kind.VALUE, detail, None, tuple(wrong), vcpu, iteration))
        return findings

    def writes_seen(self, vcpu: int) -> int:
        """How many writes of *vcpu* were known to be done when its last reap ended."""
        return self._seen[vcpu].after

    def history(self, page: int) -> str:
        """When *page* was last written and last reported, as far as the checks got."""
        writes = [
            f"write {column[page]} of vCPU {vcpu} (iteration {self._iteration_of(vcpu, column[page])})"
            for vcpu, column in enumerate(self._expected)
            if column[page]
        ]
        reap = next((number for number, pages in reversed(self._reports) if page in pages), 0)
        if reap:
            reported = f"last reported in collection {reap} (iteration {self._reap_iterations[reap - 1]})"
        else:
            reported = f"not reported in the last {counted(len(self._reports), 'collection')}"
        return f"page {page}: last written by {', '.join(writes) or 'nobody'}; {reported}"

    def _check_source(self, reap: Reap, index: int, vcpus: Sequence[int], found: _Found) -> set[int]:
        """Check what one bitmap or ring reports: nothing but what its vCPUs wrote; returns the reported pages."""
        vcpu = vcpus[0] if self._per_vcpu else None
        source = reap.report.sources[index]
        entries = self._check_slots(vcpu, source, found)
        reported = set(entries)
        if reported and max(reported) >= self.npages:
            beyond = [page for page in reported if page >= self.npages]
            found(Kind.BAD_OFFSET, vcpu, beyond, f"{counted(len(beyond), 'page')}, the slot has {self.npages}")
            reported.difference_update(beyond)
        if not self._first_of_all_set:
            may: set[int] = set()
            for writer in vcpus:
                may.update(self._streams[writer].between(self._seen[writer].before, reap.after[writer] + 1))
            false = reported - may
            if false:
                found(Kind.SPURIOUS, vcpu, false, f"{len(false)} of {counted(len(reported), 'reported page')}")
        if vcpu is not None and len(reported) < len(entries):
            self._check_duplicates(reap, vcpu, entries, found)
        if source.behind_gap:
            found(
                Kind.GAP,
                vcpu,
                (),
                f"a harvest in order does not reach {counted(source.behind_gap, 'entry', 'entries')}",
            )
        return reported

    def _check_lost(self, reap: Reap, reported: set[int], found: _Found) -> None:
        """Check that every write is reported.

        By any ring: KVM pushes an entry for the store that makes a page writable, and none for another vCPU's store to
        the page while it stays so.
        """
        if self._first_of_all_set:
            absent = [page for page in range(self.npages) if page not in reported]
            if absent:
                detail = f"{counted(len(absent), 'page')} not in the first collection, which must report all"
                found(Kind.LOST, None, absent, detail)
            return
        for vcpu, (stream, seen) in enumerate(zip(self._streams, self._seen, strict=True)):
            before = reap.before[vcpu]
            missing: set[int] = set()
            if not seen.exact:
                during = enumerate(stream.between(seen.before, min(seen.after + 1, before)), seen.before)
                missing.update(
                    page
                    for write, page in during
                    if page not in reported and page not in self._reported_before and write not in seen.early
                )
            since = seen.before if seen.exact else seen.after + 1
            must = set(stream.between(since, max(since, before)))
            missing |= must - reported
            if missing:
                begin = "the collection before" if len(self._reap_iterations) > 1 else "tracking began"
                detail = f"{counted(len(missing), 'page')}; {counted(len(must), 'page')} written since {begin}"
                found(Kind.LOST, vcpu, missing, detail)

    @property
    def _first_of_all_set(self) -> bool:
        """Whether the reap being checked is the one that has to report every page."""
        return self._initially_set and len(self._reap_iterations) == 1

    def _check_slots(self, vcpu: int | None, source: Source, found: _Found) -> list[int]:
        """The entries that name the test slot; a finding for the others."""
        entries = source.of_slot(self._slot)
        if len(entries) == len(source.offsets):
            return entries
        wrong = [(page, slot) for page, slot in zip(source.offsets, source.slots, strict=True) if slot != self._slot]
        named = ", ".join(f"{slot:#x}" for slot in sorted({slot for _, slot in wrong})[:4])
        detail = f"{counted(len(wrong), 'entry says', 'entries say')} {named}, not {self._slot:#x}"
        found(Kind.WRONG_SLOT, vcpu, [page for page, _ in wrong], detail)
        return entries

    def _check_duplicates(self, reap: Reap, vcpu: int, entries: list[int], found: _Found) -> None:
        """KVM pushes an entry for a write, so a page cannot have more entries than the vCPU may have made writes."""
        may = Counter(self._streams[vcpu].between(self._seen[vcpu].before, reap.after[vcpu] + 1))
        seen, each = self._seen[vcpu], self._entries_per_write
        under_way = set() if seen.exact else set(self._streams[vcpu].between(seen.before, seen.after + 1))
        excess = []
        for page, count in Counter(entries).items():
            if count > 1 and may[page]:
                again = sum(ring[page] for ring in self._rings_before) if page in under_way else 0
                if count > (may[page] + again) * each:
                    excess.append(page)
        if excess:
            found(Kind.DUPLICATE, vcpu, excess, counted(len(excess), "page"))

    def _value_text(self, vcpu: int, value: int) -> str:
        iteration = self._iteration_of(vcpu, value)
        return f"{value} (iteration {iteration})" if iteration else f"{value:#x}"

    def _iteration_of(self, vcpu: int, value: int) -> int:
        """The iteration in which *vcpu* wrote *value*; 0 when it did not yet."""
        ends = self._iteration_ends[vcpu]
        index = bisect_left(ends, value)
        return index + 1 if value and index < len(ends) else 0
