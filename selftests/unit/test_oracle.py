# SPDX-License-Identifier: GPL-2.0-only
"""The oracle's rules, one by one, on made-up reports and a made-up guest."""

from array import array
from collections.abc import Sequence

import pytest

from dirty_tracking.oracle import WORDS_PER_PAGE, Oracle, Reap
from dirty_tracking.report import DirtyReport, Source
from dirty_tracking.violations import Kind, Violation
from dirty_tracking.write_stream import WriteStream

NPAGES = 16
SLOT = 1


def oracle(*streams: Sequence[int], ring: bool = False, initially_set: bool = False) -> Oracle:
    return Oracle(NPAGES, [WriteStream(array("I", pages), 0) for pages in streams], ring, initially_set, SLOT)


def reap(pages: Sequence[int], before: int, after: int | None = None, iteration: int = 1) -> Reap:
    """A reap of a bitmap; with *after* one that was made while the single vCPU ran."""
    return Reap(iteration, [before], [before if after is None else after], [after is None], report(pages))


def report(*sources: Sequence[int], rings: bool = False, reset: int | None = None) -> DirtyReport:
    """A report of the slot, of a bitmap or of rings, of which all entries were reset or *reset* of them."""
    made = DirtyReport(
        [Source([SLOT] * len(its), list(its), vcpu if rings else None) for vcpu, its in enumerate(sources)]
    )
    made.reset = made.harvested if reset is None else reset
    return made


def ring_reap(
    pages: Sequence[int], before: int, slots: Sequence[int] = (), reset: int | None = None, gap: int = 0
) -> Reap:
    """A reap of one ring, with the vCPU stopped."""
    slots = slots or [SLOT] * len(pages)
    reset = len(pages) if reset is None else reset
    return Reap(1, [before], [before], [True], DirtyReport([Source(list(slots), list(pages), 0, gap)], reset))


def kinds(findings: Sequence[Violation]) -> list[Kind]:
    return [finding.kind for finding in findings]


def test_exactly_what_was_written_is_right() -> None:
    assert not oracle([3, 1, 4, 1]).check_reap(reap([1, 3, 4], before=4))


def test_a_missing_page_is_lost() -> None:
    (finding,) = oracle([3, 1, 4]).check_reap(reap([1, 3], before=3))
    assert (finding.kind, finding.pages) == (Kind.LOST, (4,))


def test_an_extra_page_is_false() -> None:
    (finding,) = oracle([3, 1, 4, 5, 9]).check_reap(reap([1, 3, 4, 9], before=3))
    assert (finding.kind, finding.pages) == (Kind.SPURIOUS, (9,))


def test_a_page_beyond_the_slot_is_an_error_of_its_own() -> None:
    """A bit in the tail of the last word, or an offset that the slot does not have."""
    assert kinds(oracle([3, 1]).check_reap(reap([3, NPAGES], before=1))) == [Kind.BAD_OFFSET]


def test_the_write_under_way_may_be_reported_and_must_be_when_it_is_done() -> None:
    """The exemption covers the one write after the published ones, at that reap only."""
    checks = oracle([3, 1, 4, 5])
    assert not checks.check_reap(reap([3, 1, 4], before=2))
    assert kinds(checks.check_reap(reap([5], before=4))) == [Kind.LOST]  # page 4: its write was not done before
    assert kinds(oracle([3, 1, 4, 5]).check_reap(reap([3, 1, 5], before=2))) == [Kind.SPURIOUS]


def test_a_write_during_a_reap_must_be_in_it_or_in_the_next() -> None:
    """Writes between the two counts of a running reap belong to either, but not to neither."""
    for first, second in (([3, 1], [4, 5]), ([3, 1, 4], [5]), ([3, 1, 4, 5], [4])):
        checks = oracle([3, 1, 4, 5, 9])
        assert not checks.check_reap(reap(first, before=2, after=3))
        assert not checks.check_reap(reap(second, before=4))
    checks = oracle([3, 1, 4, 5, 9])
    assert not checks.check_reap(reap([3, 1], before=2, after=3))
    assert kinds(checks.check_reap(reap([5], before=4))) == [Kind.LOST]


def test_a_write_before_the_last_reap_began_may_not_come_again() -> None:
    checks = oracle([3, 1, 4, 5, 9])
    assert not checks.check_reap(reap([3, 1], before=2, after=3))
    assert kinds(checks.check_reap(reap([3, 4, 5], before=4))) == [Kind.SPURIOUS]


def test_a_running_reap_may_not_miss_what_was_done_before_it_began() -> None:
    assert kinds(oracle([3, 1, 4, 5]).check_reap(reap([3], before=2, after=3))) == [Kind.LOST]


def test_initially_set_demands_every_page_once() -> None:
    """The first reap reports all pages, the second only what was written."""
    checks = oracle([3, 1, 4, 9], initially_set=True)
    assert kinds(checks.check_reap(reap(range(1, NPAGES), before=1, after=1))) == [Kind.LOST]
    checks = oracle([3, 1, 4, 9], initially_set=True)
    assert not checks.check_reap(reap(range(NPAGES), before=1, after=1))
    assert not checks.check_reap(reap([1], before=2))
    assert kinds(checks.check_reap(reap([4, 3], before=3))) == [Kind.SPURIOUS]


def test_one_bitmap_reports_for_all_vcpus() -> None:
    checks = oracle([3, 1], [4, 5])
    assert not checks.check_reap(Reap(1, [1, 1], [1, 1], [True, True], report([3, 4])))
    (finding,) = checks.check_reap(Reap(1, [2, 2], [2, 2], [True, True], report([1])))
    assert (finding.kind, finding.vcpu, finding.pages) == (Kind.LOST, 1, (5,))


def two_rings(first: list[int], second: list[int], before: list[int]) -> Reap:
    return Reap(
        1,
        before,
        before,
        [True, True],
        report(first, second, rings=True, reset=2),
    )


def test_a_ring_reports_for_its_own_vcpu_only() -> None:
    found = oracle([3, 1], [4, 5], ring=True).check_reap(two_rings([4], [3], [1, 1]))
    assert [(finding.kind, finding.vcpu) for finding in found] == [(Kind.SPURIOUS, 0), (Kind.SPURIOUS, 1)]


def test_a_page_of_two_vcpus_is_in_one_ring_at_least() -> None:
    """Either ring will do: the second store to a page that is writable already makes no entry."""
    for first, second in (([3, 1], []), ([1], [3])):
        assert not oracle([3, 1], [3], ring=True).check_reap(two_rings(first, second, [2, 1]))
    found = oracle([3, 1, 9], [3, 8], ring=True).check_reap(two_rings([1, 9], [], [2, 1]))
    assert [(finding.kind, finding.vcpu, finding.pages) for finding in found] == [
        (Kind.LOST, 0, (3,)),
        (Kind.LOST, 1, (3,)),
    ]


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        (ring_reap([3, 1, 3], before=3), []),
        (ring_reap([3, 1, 1, 3], before=3), [Kind.DUPLICATE]),
        (ring_reap([3, 1, 3], before=3, slots=[SLOT, SLOT, 2]), [Kind.WRONG_SLOT]),
        (ring_reap([3, 1], before=2, slots=[SLOT, 1 << 16 | SLOT]), [Kind.WRONG_SLOT, Kind.LOST]),
        (ring_reap([3, 1], before=2, reset=1), [Kind.RESET_COUNT]),
        (ring_reap([3, 1], before=2, reset=3), [Kind.RESET_COUNT]),
        (ring_reap([3, 1], before=2, gap=7), [Kind.GAP]),
    ],
)
def test_ring_entries(made: Reap, expected: list[Kind]) -> None:
    """Slot, number and order of entries, and the number that KVM took back."""
    assert kinds(oracle([3, 1, 3, 9], ring=True).check_reap(made)) == expected


@pytest.mark.parametrize(
    ("others", "exact", "expected"),
    [([5], False, []), ([], False, [Kind.DUPLICATE]), ([5], True, [Kind.DUPLICATE])],
    ids=["taken-back", "not-in-the-other-ring", "not-under-way"],
)
def test_a_write_under_way_may_come_twice_when_another_entry_of_its_page_was_taken_back(
    others: list[int], exact: bool, expected: list[Kind]
) -> None:
    checks = oracle([3, 5, 1, 1], [5, 2, 2, 2], ring=True)

    def made(first: list[int], second: list[int], before: list[int], exact: bool) -> Reap:
        return Reap(1, before, before, [exact, exact], report(first, second, rings=True))

    assert not checks.check_reap(made([3], others, [1, len(others)], exact))
    assert kinds(checks.check_reap(made([5, 5], [] if others else [5], [2, 1], True))) == expected


def test_memory_must_hold_the_last_write_of_each_vcpu() -> None:
    """Every page of every vCPU's column is compared, written or not."""
    words = memoryview(array("Q", bytes(8 * NPAGES * WORDS_PER_PAGE)))
    words[3 * WORDS_PER_PAGE], words[1 * WORDS_PER_PAGE], words[3 * WORDS_PER_PAGE + 1] = 3, 2, 1
    checks = oracle([3, 1, 3], [3, 1])
    assert not checks.check_memory(1, [3, 1], words)
    words[9 * WORDS_PER_PAGE] = 1
    (finding,) = checks.check_memory(2, [3, 1], words)
    assert (finding.kind, finding.vcpu, finding.pages) == (Kind.VALUE, 0, (9,))
    assert "page 9 expected 0x0 found 1 (iteration 1)" in finding.detail


def test_a_write_not_yet_published_counts_when_it_is_in_memory() -> None:
    """A vCPU stopped between its store and the publication has done one write more than it says."""
    words = memoryview(array("Q", bytes(8 * NPAGES * WORDS_PER_PAGE)))
    checks = oracle([3, 1, 4])
    assert checks.done(0, 1, words) == 1
    words[1 * WORDS_PER_PAGE] = 2
    assert checks.done(0, 1, words) == 2


def test_a_write_done_but_not_published_is_reported_once_however_many_reaps_later() -> None:
    """The vCPU stays between store and publication for several reaps: its report in any of them will do, but one must be."""
    for reports in ([[3, 1, 4], [], [], [5]], [[3, 1], [4], [], [5]], [[3, 1], [], [4], [5]], [[3, 1], [], [], [4, 5]]):
        checks = oracle([3, 1, 4, 5, 9])
        counts = [(2, 2), (2, 2), (2, 2), (4, 4)]
        assert not [checks.check_reap(reap(pages, *count)) for pages, count in zip(reports, counts, strict=True)][-1]
    checks = oracle([3, 1, 4, 5, 9])  # published during a reap, after it was reported in the one before
    for pages, before, after in (([3, 1, 4], 2, 2), ([], 2, 3), ([5], 4, 4)):
        assert not checks.check_reap(reap(pages, before, after))
    checks = oracle([3, 1, 4, 5, 9])
    for pages in ([3, 1], [], []):
        assert not checks.check_reap(reap(pages, 2, 2))
    (finding,) = checks.check_reap(reap([5], 4, 4))
    assert (finding.kind, finding.pages) == (Kind.LOST, (4,))


@pytest.mark.parametrize(("taken_back", "right"), [([5, 1], True), ([1, 2], False)])
def test_a_write_under_way_has_an_entry_for_each_of_its_own_that_is_taken_back(
    taken_back: list[int], right: bool
) -> None:
    """The page was in the ring that was taken back while its next write was under way: that may have two entries."""
    checks = oracle([*taken_back, 5, 2], ring=True)
    assert not checks.check_reap(Reap(1, [2], [2], [False], report(taken_back, rings=True, reset=2)))
    findings = checks.check_reap(Reap(1, [3], [3], [True], report([5, 5], rings=True, reset=2)))
    assert kinds(findings) == ([] if right else [Kind.DUPLICATE])


def test_a_page_that_another_vcpu_is_about_to_write_is_lost_all_the_same() -> None:
    """VCPU 0 has written page 5, which is not reported, while vCPU 1 was about to write it: what that has to log is logged."""
    checks = oracle([5, 1, 1], [5, 3, 1])
    (finding,) = checks.check_reap(Reap(1, [1, 0], [1, 0], [True, False], report([])))
    assert (finding.kind, finding.vcpu, finding.pages) == (Kind.LOST, 0, (5,))


def test_a_vcpu_out_of_its_guest_has_no_benefit_of_the_doubt() -> None:
    """What was under way and reported while it waited with a full ring must be reported again when it is done later."""
    checks = oracle([3, 1, 4, 5, 9])
    assert not checks.check_reap(reap([3, 1, 4], before=2))  # exact: write 2 was reported but not done
    assert not checks.check_reap(reap([], 2, 2))
    assert kinds(checks.check_reap(reap([5], 4, 4))) == [Kind.LOST]


def test_history_tells_the_last_write_and_report() -> None:
    words = memoryview(array("Q", bytes(8 * NPAGES * WORDS_PER_PAGE)))
    words[3 * WORDS_PER_PAGE] = 1
    checks = oracle([3, 1])
    checks.check_reap(reap([3], before=1, iteration=1))
    checks.check_memory(1, [1], words)
    assert (
        checks.history(3)
        == "page 3: last written by write 1 of vCPU 0 (iteration 1); last reported in collection 1 (iteration 1)"
    )
    assert checks.history(5) == "page 5: last written by nobody; not reported in the last 1 collection"


def test_findings_in_words_of_the_field() -> None:
    """Singular and plural, and which writes a collection was to report."""
    checks = oracle([3, 1, 4])
    (first,) = checks.check_reap(reap([], before=1))
    (second,) = checks.check_reap(reap([], before=3))
    lost = "vCPU 0: LOST (written but not reported)"
    assert str(first) == f"iteration 1, collection 1, {lost}: 1 page; 1 page written since tracking began"
    assert str(second) == f"iteration 1, collection 2, {lost}: 2 pages; 2 pages written since the collection before"
