# SPDX-License-Identifier: GPL-2.0-only
"""The rules of docs/contract.md, one by one, on ledgers that are made up."""

import random
import re
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from dirty_tracking.judge import Judge
from dirty_tracking.ledger import Collection, Event, Ledger, Reset, SlotPages, Toggle, ZapAll
from dirty_tracking.memory_check import WORDS_PER_PAGE, MemoryCheck, writes_done
from dirty_tracking.violations import Kind, Violation
from dirty_tracking.write_stream import WriteStream
from selftests.unit.toy_kvm import FAULTS, MODES, RING_FAULTS, Fault, ToyKvm, collectors, one_collector

NPAGES = 16
SLOT = 1


class Run:
    """A run whose collections come one after the other, with vCPUs that were kicked, as in the matrix."""

    def __init__(self, *streams: Sequence[int], ring: bool = False, initially_set: bool = False) -> None:
        loops = [WriteStream(array("I", pages), 0) for pages in streams]
        self.ledger = Ledger(loops, [SlotPages(SLOT, 0, NPAGES)], ring, initially_set)
        self.judge = Judge(self.ledger)
        writes, exact = [0 for _ in streams], [True for _ in streams]
        self.ledger.record(Toggle(self.ledger.now(), self.ledger.now(), writes, writes, exact, SLOT, on=True))

    def collect(
        self, reported: Sequence[Sequence[int]], before: list[int], after: list[int], exact: list[bool],
        slots: Sequence[int] | None = None, reset: int | None = None, gap: int = 0, iteration: int = 1,
    ) -> list[Violation]:  # fmt: skip
        """What is wrong with one collection more; *slots* are those of the single ring's entries."""
        event = Collection(self.ledger.now(), 0, before, after, exact, last=NPAGES, kicked=True, iteration=iteration)
        for pages in reported:
            if slots is not None:
                event.add(*self.ledger.entry_numbers(slots, list(pages)))
            else:
                event.add(*self.ledger.page_numbers(SLOT, list(pages)))
        event.reset = event.harvested if reset is None else reset
        event.behind_gap = [gap for _ in reported]
        event.end = self.ledger.now()
        self.ledger.record(event)
        return self.judge.verify()

    def stopped(self, pages: Sequence[int], before: int, **named: Any) -> list[Violation]:
        """Of a single vCPU that is out of its guest after so many writes."""
        return self.collect([pages], [before], [before], [True], **named)


def kinds(found: Sequence[Violation]) -> list[Kind]:
    return [violation.kind for violation in found]


def test_rules_cited_and_documented() -> None:
    """Each rule number that lib/ cites is in docs/contract.md, and each one there is cited."""
    root = Path(__file__).resolve().parent.parent.parent
    cited = {
        number for path in (root / "lib").rglob("*.py") for number in re.findall(r"\b[RE]\d{1,2}\b", path.read_text())
    }
    rules = re.findall(r"^\| ([RE]\d+) \|", (root / "docs" / "contract.md").read_text(), re.MULTILINE)
    assert len(rules) == len(set(rules))
    assert cited == set(rules)


# --- one collection after the other ---------------------------------------------------------------------------------------


PAGES = [3, 1, 4, 5, 9]  # what the vCPU writes
ALL = range(NPAGES)
# Pages reported; how many writes were published before, and after; None after those of a stopped vCPU
Report = tuple[Sequence[int], int, int | None]


@pytest.mark.parametrize(
    ("reports", "expected"),
    [
        pytest.param([([3, 1, 4], 3, None)], None, id="exact"),
        pytest.param([([3, 1], 3, None)], (Kind.LOST, 4, "R1"), id="missing"),
        pytest.param([([3, 1, 4, 9], 3, None)], (Kind.SPURIOUS, 9, "R3"), id="extra"),
        pytest.param([([3, 1, NPAGES], 2, None)], (Kind.BAD_OFFSET, NPAGES, "R7"), id="beyond-the-slot"),
        pytest.param([([3], 2, 3)], (Kind.LOST, 1, "R1"), id="missing-while-running"),
        # the write in flight
        pytest.param([([3, 1, 4], 2, None)], None, id="in-flight"),
        pytest.param([([3, 1, 5], 2, None)], (Kind.SPURIOUS, 5, "R3"), id="after-the-one-in-flight"),
        pytest.param([([3, 1, 4], 2, None), ([5], 4, None)], (Kind.LOST, 4, "R1"), id="in-flight-and-not-made"),
        pytest.param([([3, 1, 4], 2, None), ([], 2, 2), ([5], 4, 4)], (Kind.LOST, 4, "R1"), id="early-when-stopped"),
        pytest.param([([3, 1, 4], 2, 2), ([], 2, None), ([5], 4, 4)], (Kind.LOST, 4, "R1"), id="early-before-a-stop"),
        # a write during a collection
        pytest.param([([3, 1], 2, 3), ([4, 5], 4, None)], None, id="meanwhile-in-the-next"),
        pytest.param([([3, 1, 4], 2, 3), ([5], 4, None)], None, id="meanwhile-in-the-first"),
        pytest.param([([3, 1, 4, 5], 2, 3), ([4], 4, None)], None, id="meanwhile-in-both"),
        pytest.param([([3, 1], 2, 3), ([5], 4, None)], (Kind.LOST, 4, "R1"), id="meanwhile-in-none"),
        pytest.param([([3, 1], 2, 3), ([3, 4, 5], 4, None)], (Kind.SPURIOUS, 3, "R3"), id="reported-twice"),
        # a write that is not published for several collections
        pytest.param([([3, 1, 4], 2, 2), ([], 2, 2), ([], 2, 2), ([5], 4, 4)], None, id="unpublished-in-the-first"),
        pytest.param([([3, 1], 2, 2), ([4], 2, 2), ([], 2, 2), ([5], 4, 4)], None, id="unpublished-in-the-second"),
        pytest.param([([3, 1], 2, 2), ([], 2, 2), ([4], 2, 2), ([5], 4, 4)], None, id="unpublished-in-the-third"),
        pytest.param([([3, 1], 2, 2), ([], 2, 2), ([], 2, 2), ([4, 5], 4, 4)], None, id="unpublished-in-the-last"),
        pytest.param([([3, 1, 4], 2, 2), ([], 2, 3), ([5], 4, 4)], None, id="published-after-its-report"),
        pytest.param(
            [([3, 1], 2, 2), ([], 2, 2), ([], 2, 2), ([5], 4, 4)], (Kind.LOST, 4, "R1"), id="unpublished-in-none"
        ),
    ],
)  # fmt: skip
def test_reports_of_one_vcpu(reports: list[Report], expected: tuple[Kind, int, str] | None) -> None:
    """Each write is in the collection that must have it, or in one that may, and nothing else is."""
    check_reports(Run(PAGES), reports, expected)


@pytest.mark.parametrize(
    ("reports", "expected"),
    [
        pytest.param([(ALL, 1, 1), ([1], 2, None)], None, id="all-and-then-written-ones"),
        pytest.param([(ALL[1:], 1, 1)], (Kind.LOST, 0, "R2"), id="one-missing"),
        pytest.param([([*ALL[:3], *ALL[4:]], 1, None)], (Kind.LOST, 3, "R2"), id="one-missing-that-was-written"),
        pytest.param([(ALL, 1, 1), ([1], 2, None), ([4, 3], 3, None)], (Kind.SPURIOUS, 3, "R3"), id="one-again"),
    ],
)
def test_reports_when_initially_set(reports: list[Report], expected: tuple[Kind, int, str] | None) -> None:
    """With KVM_DIRTY_LOG_INITIALLY_SET the first collection has all pages, and the second only written ones."""
    check_reports(Run(PAGES, initially_set=True), reports, expected)


def check_reports(run: Run, reports: list[Report], expected: tuple[Kind, int, str] | None) -> None:
    """Judge each of a vCPU's reports; the last one has the *expected* violation, and no other has any."""
    found = [run.collect([pages], [before], [after or before], [after is None]) for pages, before, after in reports]
    assert not any(found[:-1])
    assert [(violation.kind, *violation.pages, violation.rule) for violation in found[-1]] == (
        [expected] if expected else []
    )


def test_bitmap_of_several_vcpus() -> None:
    """A bitmap has the writes of all vCPUs, and a missing one is LOST by the vCPU that made it."""
    run = Run([3, 1], [4, 5])
    assert not run.collect([[3, 4]], [1, 1], [1, 1], [True, True])
    (found,) = run.collect([[1]], [2, 2], [2, 2], [True, True])
    assert (found.kind, found.vcpu, found.pages) == (Kind.LOST, 1, (5,))


def test_ring_has_its_own_vcpus_writes() -> None:
    """A page in the ring of a vCPU that did not write it is SPURIOUS."""
    found = Run([3, 1], [4, 5], ring=True).collect([[4], [3]], [1, 1], [1, 1], [True, True])
    assert [(violation.kind, violation.vcpu) for violation in found] == [(Kind.SPURIOUS, 0), (Kind.SPURIOUS, 1)]


def test_page_of_two_vcpus_in_one_ring() -> None:
    """A page that two vCPUs wrote must be in either ring, as only the store that makes it writable is pushed."""
    for first, second in (([3, 1], []), ([1], [3])):
        assert not Run([3, 1], [3], ring=True).collect([first, second], [2, 1], [2, 1], [True, True])
    found = Run([3, 1, 9], [3, 8], ring=True).collect([[1, 9], []], [2, 1], [2, 1], [True, True])
    assert kinds(found) == [Kind.LOST, Kind.LOST]
    assert [(violation.vcpu, violation.pages) for violation in found] == [(0, (3,)), (1, (3,))]


@pytest.mark.parametrize(
    ("pages", "before", "named", "expected"),
    [
        ([3, 1, 3], 3, {}, []),
        ([3, 1, 1, 3], 3, {}, ["R5"]),
        ([3, 1, 3], 3, {"slots": [SLOT, SLOT, 2]}, ["R6"]),
        ([3, 1], 2, {"slots": [SLOT, 1 << 16 | SLOT]}, ["R6", "R1"]),
        ([3, 1], 2, {"reset": 1}, ["R8"]),
        ([3, 1], 2, {"reset": 3}, ["R8"]),
        ([3, 1], 2, {"gap": 7}, ["R9"]),
    ],
)
def test_violations_of_ring_entries(pages: list[int], before: int, named: dict[str, Any], expected: list[str]) -> None:
    """Repeated entries, entries of other slots, wrong reset counts and gaps are violations of their rules."""
    found = Run([3, 1, 3, 9], ring=True).stopped(pages, before, **named)
    assert [violation.rule for violation in found] == expected


@pytest.mark.parametrize(
    ("others", "exact", "expected"),
    [([5], False, []), ([], False, [Kind.DUPLICATE]), ([5], True, [Kind.DUPLICATE])],
    ids=["reset", "not-in-the-other-ring", "not-in-flight"],
)
def test_two_entries_by_another_vcpus_reset(others: list[int], exact: bool, expected: list[Kind]) -> None:
    """A write in flight may be logged again when another vCPU's entry of its page is reset."""
    run = Run([3, 5, 1, 1], [5, 2, 2, 2], ring=True)
    before = [1, len(others)]
    assert not run.collect([[3], others], before, before, [exact, exact])
    found = run.collect([[5, 5], [] if others else [5]], [2, 1], [2, 1], [True, True])
    assert kinds(found) == expected


@pytest.mark.parametrize(("reset", "right"), [([5, 1], True), ([1, 2], False)])
def test_two_entries_by_its_own_reset(reset: list[int], right: bool) -> None:
    """A write in flight may be logged again when its own vCPU's entry of the page is reset."""
    run = Run([*reset, 5, 2], ring=True)
    assert not run.collect([reset], [2], [2], [False])
    assert kinds(run.collect([[5, 5]], [3], [3], [True])) == ([] if right else [Kind.DUPLICATE])


def test_page_that_a_kicked_vcpu_writes_next() -> None:
    """A page is LOST if it was written and only a kicked vCPU was about to write it too."""
    (found,) = Run([5, 1, 1], [5, 3, 1]).collect([[]], [1, 0], [1, 0], [True, False])
    assert (found.kind, found.vcpu, found.pages) == (Kind.LOST, 0, (5,))


def test_text_of_a_violation() -> None:
    """A violation's text has iteration, collection, slot, vCPU, rule, pages and the writes concerned."""
    run = Run([3, 1, 4])
    (first,) = run.stopped([], before=1)
    (second,) = run.stopped([], before=3)
    lost = "slot 1, vCPU 0: LOST [R1] (written but not reported)"
    assert str(first) == f"iteration 1, collection 1, {lost}: 1 page, of 1 written since dirty logging was enabled: 3"
    assert str(second) == f"iteration 1, collection 2, {lost}: 2 pages, of 2 written since the collection before: 1, 4"


# --- collections that overlap, toggles, and what threads do at once -------------------------------------------------------

LINE = WriteStream(array("I", range(64)), 0)
LINE_SLOT = SlotPages(SLOT, 0, 64)
# Two vCPUs that both write page 5, the second one first
TWO = [WriteStream(array("I", [3, 5, 1, 1]), 0), WriteStream(array("I", [5, 2, 2, 2]), 0)]


def line(ring: bool = False, initially_set: bool = False) -> Ledger:
    """The ledger of a vCPU that writes 64 pages in a row, with dirty logging enabled from its first write on."""
    ledger = Ledger([LINE], [LINE_SLOT], ring, initially_set)
    ledger.record(Toggle(0, 1, [0], [0], [True], SLOT, on=True))
    return ledger


def two(ring: bool) -> Ledger:
    """The ledger of the vCPUs that write TWO."""
    ledger = Ledger(TWO, [LINE_SLOT], ring, initially_set=False)
    ledger.record(Toggle(0, 1, [0, 0], [0, 0], [True, True], SLOT, on=True))
    return ledger


def collection(
    start: int, end: int, before: int, after: int, pages: list[int], exact: bool = False, reset: int | None = None,
    **named: Any,
) -> Collection:  # fmt: skip
    """A collection of the vCPU that writes LINE; *reset* entries were reset, or those that it harvested."""
    event = Collection(start, end, [before], [after], [exact], 0, 64, [pages], **named)
    event.reset = event.harvested if reset is None else reset
    return event


def of_both(
    start: int, counts: list[int], reported: list[Sequence[int]], exact: bool = False, kicked: bool = False
) -> Collection:
    """A collection of two vCPUs, neither of which writes meanwhile."""
    event = Collection(start, start + 1, counts, counts, [exact, exact], 0, 64, reported, kicked=kicked)
    event.reset = event.harvested
    return event


def judged(ledger: Ledger, *events: Event) -> list[Kind]:
    """The kinds of the violations, all judged at the end."""
    for event in events:
        ledger.record(event)
    return kinds(Judge(ledger).verify())


def test_write_in_an_overlapping_collection() -> None:
    """A collection may lack a write that an overlapping one reported."""
    assert not judged(
        line(),
        collection(2, 5, 4, 8, [0, 1, 2, 3, 4]),
        collection(3, 4, 5, 6, []),
        collection(6, 7, 8, 8, [5, 6, 7], exact=True),
    )


def test_rewrite_after_a_collection() -> None:
    """A page that was written again after a collection reported it must be in the next one."""
    first = collection(2, 3, 60, 60, [*range(60)])
    assert judged(line(), first, collection(4, 5, 66, 66, [1, 60, 61, 62, 63], exact=True)) == [Kind.LOST]


def test_repeated_page_is_spurious() -> None:
    """A page is SPURIOUS if a complete collection had it and it was not written since."""
    first = collection(2, 3, 4, 4, [0, 1, 2, 3])
    assert judged(line(), first, collection(4, 5, 5, 5, [3, 4], exact=True)) == [Kind.SPURIOUS]


def test_page_left_by_a_partial_collection() -> None:
    """A page that a partial collection left may be in the next one."""
    first = collection(2, 3, 4, 4, [0, 1], complete=False)
    assert not judged(line(), first, collection(4, 5, 5, 5, [2, 3, 4], exact=True))


@pytest.mark.parametrize(
    ("kicked", "last", "expected"),
    [(False, [3, 5], []), (True, [3, 5], [Kind.LOST]), (False, [3], [Kind.LOST, Kind.LOST])],
    ids=["later", "kicked", "never"],
)
def test_page_that_another_vcpu_logs_later(kicked: bool, last: list[int], expected: list[Kind]) -> None:
    """A page that another vCPU is about to log may be in the next collection, unless all vCPUs were kicked."""
    first = of_both(2, [2, 0], [[3]], kicked=kicked)
    last = [page for page in last if page != 3]
    assert judged(two(ring=False), first, of_both(4, [2, 1], [last], exact=True)) == expected


ZAP = ZapAll(2, 3, [2], [2], [False])


@pytest.mark.parametrize(
    ("events", "right"),
    [
        ([ZAP, collection(4, 5, 4, 4, [0, 1, 2, 2, 3], exact=True)], True),
        ([collection(4, 5, 4, 4, [0, 1, 2, 2, 3], exact=True)], False),
        ([ZAP, collection(4, 5, 4, 4, [0, 1, 1, 2, 3], exact=True)], False),
        ([ZAP, collection(4, 5, 2, 2, [0, 1]), collection(6, 7, 3, 3, [2, 2], exact=True)], True),
        ([ZAP, collection(4, 5, 65, 65, [*range(64), 0]), collection(6, 7, 67, 67, [1, 2, 2], exact=True)], False),
        ([ZAP, collection(4, 5, 2, 2, [0, 1], exact=True), collection(6, 7, 3, 3, [2, 2], exact=True)], False),
        ([ZAP, collection(4, 5, 2, 2, [0, 1], kicked=True), collection(6, 7, 3, 3, [2, 2], exact=True)], False),
    ],
    ids=["zap", "no-zap", "write-done", "in-flight-in-a-harvest", "done-before-it", "exact-harvest", "kicked-harvest"],
)
def test_two_entries_by_a_zap(events: list[Event], right: bool) -> None:
    """A write that was in flight as page tables were zapped, and in each harvest since, may have two entries; no other."""
    assert judged(line(ring=True), *events) == ([] if right else [Kind.DUPLICATE])


@pytest.mark.parametrize(("reported", "right"), [(range(32, 64), True), (range(32, 63), False)])
def test_all_pages_are_dirty_until_collected(reported: range, right: bool) -> None:
    """With KVM_DIRTY_LOG_INITIALLY_SET pages stay dirty until a collection of their range."""
    half = Collection(2, 3, [0], [0], [True], 0, 32, [[*range(32)]])
    found = judged(line(initially_set=True), half, collection(4, 5, 0, 0, [*reported], exact=True))
    assert found == ([] if right else [Kind.LOST])


def test_required_pages_of_one_slot() -> None:
    """A collection requires no pages of other slots."""
    ledger = Ledger([LINE], [SlotPages(1, 0, 32), SlotPages(2, 32, 64)], per_vcpu=False, initially_set=False)
    ledger.record(Toggle(0, 1, [0], [0], [True], 2, on=True))
    ledger.record(Collection(2, 3, [8], [8], [True], 32, 64, [[]]))
    judge = Judge(ledger)
    assert not judge.verify()
    assert judge.pages_required == 0


@pytest.mark.parametrize(("entries", "right"), [(3, True), (4, False)])
def test_one_entry_per_reset_entry(entries: int, right: bool) -> None:
    """A write in flight may have as many entries as entries of its page were reset, and one more."""
    found = judged(
        line(ring=True),
        Toggle(2, 3, [2], [2], [True], SLOT, on=False),
        Toggle(4, 5, [64], [64], [True], SLOT, on=True),
        collection(6, 7, 65, 65, [0, 1, 0, 1]),
        collection(8, 9, 66, 66, [1] * entries, exact=True),
    )
    assert found == ([] if right else [Kind.DUPLICATE])


def test_own_reset_is_no_reason() -> None:
    """The reset of a collection is no reason for repeated entries in that same collection."""
    harvests = collection(2, 3, 2, 4, [0, 1, 2, 2, 2]), collection(4, 5, 4, 4, [3], exact=True)
    assert judged(line(ring=True), *harvests) == [Kind.DUPLICATE]


@pytest.mark.parametrize("overlapped", [True, False])
def test_reset_beside_a_harvest(overlapped: bool) -> None:
    """Another thread's reset during a harvest is a reason for a repeated entry in it."""
    resets = [Reset(3, 4, 0)] if overlapped else []
    harvest = Collection(2, 5, [1, 1], [2, 1], [False, False], 0, 64, [[3, 5, 5], [5]], reset=4)
    found = judged(two(ring=True), *resets, harvest, of_both(6, [2, 1], [[], []], exact=True))
    assert found == ([] if overlapped else [Kind.DUPLICATE])


@pytest.mark.parametrize(("on", "refused", "kind"), [(True, True, Kind.LOST), (False, False, Kind.SPURIOUS)])
def test_bitmap_only_with_logging_enabled(on: bool, refused: bool, kind: Kind) -> None:
    """GET fails if and only if dirty logging is disabled; else it is a violation of R4."""
    ledger = Ledger([LINE], [LINE_SLOT], per_vcpu=False, initially_set=False)
    ledger.record(Toggle(0, 1, [0], [0], [True], SLOT, on=on))
    ledger.record(collection(2, 3, 0, 0, [], exact=True, refused=refused))
    (found,) = Judge(ledger).verify()
    assert (found.kind, found.rule) == (kind, "R4")


@pytest.mark.parametrize(("first", "last", "right"), [(3, 1, True), (2, 1, False), (3, 2, False)])
def test_reset_counts_of_overlapping_threads(first: int, last: int, right: bool) -> None:
    """Reset counts are compared with harvested entries as sums of all operations that overlap."""
    overlapping = collection(2, 4, 2, 2, [0, 1], reset=first), collection(3, 6, 2, 3, [2], reset=0)
    found = judged(line(ring=True), *overlapping, collection(9, 10, 4, 4, [3], exact=True, reset=last))
    assert found == ([] if right else [Kind.RESET_COUNT])


@pytest.mark.parametrize(
    "reset", [Reset(3, 4, 2), Reset(6, 7, 2), collection(6, 7, 4, 4, [2, 3], exact=True, reset=4)],
    ids=["beside-it", "later", "in-a-later-harvest"],
)  # fmt: skip
def test_reset_counts_that_cancel_out(reset: Reset | Collection) -> None:
    """A wrong reset count and a later one are two violations, although their sum is right; one beside it is part of it."""
    harvest = collection(2, 5, 2, 2, [0, 1], exact=True, reset=0)
    expected = [] if reset.overlaps(harvest) else [Kind.RESET_COUNT, Kind.RESET_COUNT]
    assert judged(line(ring=True), harvest, reset) == expected


def test_incremental_verification() -> None:
    """The violations are the same whether the ledger is verified after each collection or at the end."""
    events = [
        collection(2, 3, 4, 4, [0, 1, 2, 3], exact=True),
        collection(4, 5, 6, 7, [4, 5, 6]),
        collection(6, 7, 8, 8, [7], exact=True),
        collection(8, 9, 10, 10, [8], exact=True),
        collection(10, 11, 11, 11, [0, 10], exact=True),
    ]
    ledger = line()
    judge = Judge(ledger)
    found = []
    for event in events:
        ledger.record(event)
        found += judge.verify()
    assert kinds(found) == [Kind.LOST, Kind.SPURIOUS]
    assert [violation.collection for violation in found] == [4, 5]
    assert judged(line(), *events) == [Kind.LOST, Kind.SPURIOUS]


# --- memory, and what reports say of a page -------------------------------------------------------------------------------


def memory_check(*streams: Sequence[int]) -> tuple[MemoryCheck, memoryview]:
    words = memoryview(array("Q", bytes(8 * NPAGES * WORDS_PER_PAGE)))
    return MemoryCheck(NPAGES, [WriteStream(array("I", pages), 0) for pages in streams], words), words


def test_memory_has_the_last_writes() -> None:
    """Every page of each vCPU's column is compared with its last write, or with 0 if there was none."""
    check, words = memory_check([3, 1, 3], [3, 1])
    words[3 * WORDS_PER_PAGE], words[1 * WORDS_PER_PAGE], words[3 * WORDS_PER_PAGE + 1] = 3, 2, 1
    assert not check.check(1, [3, 1])
    words[9 * WORDS_PER_PAGE] = 1
    (found,) = check.check(2, [3, 1])
    assert (found.kind, found.vcpu, found.pages, found.rule) == (Kind.VALUE, 0, (9,), "R11")
    assert "page 9 expected 0x0 found 1 (iteration 1)" in found.detail


def test_unpublished_write_in_memory() -> None:
    """A write that is in memory and not published yet counts as done."""
    words = [0] * NPAGES
    stream = WriteStream(array("I", [3, 1, 4]), 0)
    assert writes_done(stream, 1, words.__getitem__) == 1
    words[1] = 2
    assert writes_done(stream, 1, words.__getitem__) == 2


def test_last_write_and_report_of_a_page() -> None:
    """A page's history has its last write, with vCPU and iteration, and its last report."""
    check, words = memory_check([3, 1])
    words[3 * WORDS_PER_PAGE] = 1
    check.check(1, [1])
    run = Run([3, 1])
    run.stopped([3], before=1)
    assert check.last_writes(3) == "last written by write 1 of vCPU 0 (iteration 1)"
    assert run.ledger.last_report(3) == "last reported in collection 1 (iteration 1)"
    assert check.last_writes(5) == "last written by nobody"
    assert run.ledger.last_report(5) == "not reported in the last 1 collection"


# --- ledgers of a toy KVM, sound and broken -------------------------------------------------------------------------------

WORK = {
    "one-collector": one_collector,
    "collectors": collectors(3),
    "collectors-and-toggles": collectors(2, toggles=True),
}


def toy_run(mode: str, work: str, seed: int, fault: Fault | None = None) -> list[Violation]:
    """What the judge finds in a run of a toy KVM, with *fault* in its last collection."""
    draw = random.Random(f"{seed}/{mode}/{work}/{fault}")
    kvm = ToyKvm(draw, mode, draw.randint(1, 3), kicks=work == "one-collector" or seed % 3 == 0, fault=fault)
    kvm.run(draw.randint(1, 3), WORK[work])
    judge = Judge(kvm.ledger)
    found = []
    for event in kvm.events:
        if event is not None:
            kvm.ledger.record(event)
        else:
            found += judge.verify()
    return found


@pytest.mark.parametrize("work", WORK)
@pytest.mark.parametrize("mode", MODES)
def test_toy_kvm_without_a_fault(mode: str, work: str) -> None:
    """A correct toy KVM, whose steps are as small as the kernel's, has no violation."""
    for seed in range(80):
        assert not toy_run(mode, work, seed), f"seed {seed}"


@pytest.mark.parametrize(
    ("mode", "fault"),
    [(mode, fault) for mode in MODES for fault in (*FAULTS, *(RING_FAULTS if mode == "dirty-ring" else ()))],
)
def test_toy_kvm_with_a_fault(mode: str, fault: str) -> None:
    """Each fault in the last collection of a toy KVM is a violation."""
    planted = 0
    for seed in range(8):
        for work in WORK:
            broken = Fault(fault)
            found = toy_run(mode, work, seed, broken)
            planted += broken.planted
            assert found or not broken.planted, f"seed {seed}, {work}"
    assert planted


def test_enabling_is_no_reason_for_twins() -> None:
    """A first enabling with all vCPUs stopped does not excuse a second entry of the page that is written first."""
    run = Run([3, 4, 5, 6], ring=True)
    assert kinds(run.stopped([3, 3, 4], 2)) == [Kind.DUPLICATE]
