# SPDX-License-Identifier: GPL-2.0-only
"""The model of the contract: what it demands, what it allows, and what it refuses. No KVM here."""

from collections.abc import Sequence

import pytest

from dirty_tracking.model import Access, BitmapModel, Entry, RingModel
from dirty_tracking.violations import ContractViolation, Kind

STORE, LOAD, RETRIED = Access.STORE, Access.LOAD, Access.RETRIED


def bitmaps(manual: bool = False, initially_set: bool = False, emulates: bool = False) -> BitmapModel:
    model = BitmapModel(manual, initially_set, emulates)
    model.create(1, 70, logged=True)
    return model


def rings(emulates: bool = False) -> RingModel:
    model = RingModel(2, 192, emulates)
    model.create(1, 70, logged=True)
    return model


def store(model: RingModel, page: int, pushed: Sequence[Entry], vcpu: int = 0) -> None:
    model.ran(vcpu, 1, [(STORE, page)], pushed)


def take(model: RingModel, entries: Sequence[Entry], vcpu: int = 0) -> None:
    model.harvested(vcpu, len(entries), entries)
    model.reset(sum(len(ring.harvested) for ring in model.rings))


def test_bitmap_has_stores_until_get() -> None:
    """A bitmap has exactly the stored pages, until a GET returns them."""
    model = bitmaps()
    model.ran(0, 1, [(STORE, 3), (STORE, 69)], [])
    model.reported(1, [3, 69])
    model.reported(1, [])
    model.ran(1, 1, [(STORE, 3)], [])
    with pytest.raises(ContractViolation, match=r"LOST .*: page 3\b"):
        model.reported(1, [])
    with pytest.raises(ContractViolation, match=r"SPURIOUS .*: pages 4, 70"):
        model.reported(1, [3, 4, 70])


def test_bitmap_has_stores_until_clear() -> None:
    """With manual protection, pages are in the bitmap until they are cleared."""
    model = bitmaps(manual=True)
    model.ran(0, 1, [(STORE, 3), (STORE, 4)], [])
    model.reported(1, [3, 4])
    model.cleared(1, [4, 5])
    model.reported(1, [3])
    with pytest.raises(ContractViolation, match=r"SPURIOUS .*: page 4"):
        model.reported(1, [3, 4])


def test_initially_set_bitmap() -> None:
    """With KVM_DIRTY_LOG_INITIALLY_SET, all pages are dirty each time that dirty logging is enabled."""
    model = bitmaps(manual=True, initially_set=True)
    model.reported(1, range(70))
    model.cleared(1, range(70))
    model.set_dirty_logging(1, enable=False)
    model.set_dirty_logging(1, enable=True)
    with pytest.raises(ContractViolation, match=r"LOST .*: pages 0, 1, 2, 3, 4, 5, 6, 7 and 62 more"):
        model.reported(1, [])


def test_load_of_an_unmapped_page() -> None:
    """A load may be reported once, if its page was not mapped."""
    for answer in ([], [3]):
        model = bitmaps()
        model.ran(0, 1, [(LOAD, 3)], [])
        model.reported(1, answer)
        model.ran(0, 1, [(LOAD, 3)], [])
        with pytest.raises(ContractViolation, match=r"SPURIOUS .*: page 3"):
            model.reported(1, [3])
    model.create(2, 64, logged=False)
    model.delete(2)
    model.ran(0, 1, [(LOAD, 3)], [])
    model.reported(1, [3])


def test_emulated_load_is_not_reported() -> None:
    """With a backend that emulates, a load that is reported is SPURIOUS."""
    model = bitmaps(emulates=True)
    model.ran(0, 1, [(LOAD, 3)], [])
    with pytest.raises(ContractViolation, match=r"SPURIOUS .*: page 3"):
        model.reported(1, [3])


def test_bitmap_in_the_life_of_a_slot() -> None:
    """Moving a slot and setting the same flags keep its bitmap; disabling dirty logging and deletion discard it."""
    model = bitmaps()
    model.ran(0, 1, [(STORE, 3)], [])
    model.set_dirty_logging(1, enable=True)
    model.move(1)
    model.reported(1, [3])
    model.ran(0, 1, [(STORE, 3)], [])
    model.set_dirty_logging(1, enable=False)
    model.ran(0, 1, [(STORE, 4)], [])
    model.set_dirty_logging(1, enable=True)
    model.reported(1, [])
    model.ran(0, 1, [(STORE, 3)], [])
    model.delete(1)
    model.create(1, 70, logged=True)
    model.reported(1, [])


def test_one_entry_per_page_until_reset() -> None:
    """A page is pushed by one vCPU, once, until its entry is reset."""
    model = rings()
    with pytest.raises(ContractViolation, match="lacks"):
        store(model, 3, [])
    store(model, 3, [(1, 3)])
    for vcpu in (0, 1):
        with pytest.raises(ContractViolation, match="none of its accesses"):
            store(model, 3, [(1, 3)], vcpu)
        store(model, 3, [], vcpu)
    model.harvested(0, 10, [(1, 3)])
    store(model, 3, [])
    model.reset(1)
    store(model, 3, [(1, 3)], vcpu=1)


def test_emulated_stores_are_all_pushed() -> None:
    """A backend that emulates pushes an entry for every store, and none for a load."""
    model = rings(emulates=True)
    store(model, 3, [(1, 3)])
    store(model, 3, [(1, 3)])
    with pytest.raises(ContractViolation, match="lacks"):
        store(model, 3, [])
    with pytest.raises(ContractViolation, match="none of its accesses"):
        model.ran(0, 1, [(LOAD, 4)], [(1, 4)])


def test_order_and_ring_of_entries() -> None:
    """Entries are in the order of the stores, in the ring of the vCPU that made them."""
    for pushed, kind in (
        ([(1, 4), (1, 3)], Kind.OTHER),
        ([(1, 3)], Kind.LOST),
        ([(1, 9), (1, 3), (1, 4)], Kind.SPURIOUS),
        ([(1, 3), (1, 3), (1, 4)], Kind.DUPLICATE),
        ([(1, 3), (1, 4), (1, 4)], Kind.DUPLICATE),
        ([(1, 3), (1, 4), (1, 9)], Kind.SPURIOUS),
    ):
        with pytest.raises(ContractViolation) as caught:
            rings().ran(0, 1, [(STORE, 3), (STORE, 4)], pushed)
        assert caught.value.kinds == {kind}
    model = rings()
    model.ran(0, 1, [(STORE, 3), (STORE, 4)], [(1, 3), (1, 4)])
    with pytest.raises(ContractViolation, match="the harvest returned"):
        model.harvested(1, 10, [(1, 3)])
    with pytest.raises(ContractViolation, match="the harvest returned"):
        model.harvested(0, 1, [(1, 4)])


def test_partial_harvest_and_its_reset() -> None:
    """A reset frees as many entries as were harvested, also after a partial harvest."""
    model = rings()
    model.ran(0, 1, [(STORE, page) for page in range(4)], [(1, page) for page in range(4)])
    take(model, [(1, 0), (1, 1)])
    assert model.rings[0].used == 2
    with pytest.raises(ContractViolation, match=r"RESET_COUNT .*: 0 harvested, 1 reset"):
        model.reset(1)
    store(model, 2, [])
    store(model, 1, [(1, 1)])
    take(model, [(1, 2), (1, 3), (1, 1)])


def test_zap_of_all_slots_by_a_deletion() -> None:
    """When a slot is deleted, a writable page of another slot may be pushed once more, and not twice."""
    for pushed in ([], [(1, 3)]):
        model = rings()
        model.create(2, 64, logged=False)
        store(model, 3, [(1, 3)])
        model.delete(2)
        store(model, 3, pushed)
        with pytest.raises(ContractViolation, match="none of its accesses"):
            store(model, 3, [(1, 3)])


def test_moved_slot_is_mapped_again() -> None:
    """A store to a page of a moved slot is pushed, although the page was writable before."""
    model = rings()
    store(model, 3, [(1, 3)])
    model.move(1)
    with pytest.raises(ContractViolation, match="lacks"):
        store(model, 3, [])


def test_retried_store_of_a_full_ring() -> None:
    """The store that filled a ring may be pushed again when it is retried."""
    for pushed in ([], [(1, 3)]):
        model = rings()
        store(model, 3, [(1, 3)])
        take(model, [(1, 3)])
        model.ran(0, 1, [(RETRIED, 3), (STORE, 4)], [*pushed, (1, 4)])


def test_entries_outlive_their_slot() -> None:
    """Entries of a deleted slot are harvested and reset as any other."""
    model = rings()
    store(model, 69, [(1, 69)])
    model.delete(1)
    take(model, [(1, 69)])


def test_ring_with_too_many_entries() -> None:
    """A ring that holds more entries than can be used without KVM_EXIT_DIRTY_RING_FULL breaks the contract."""
    model = RingModel(1, 2, emulates=False, most_used=2)
    model.create(1, 70, logged=True)
    store(model, 1, [(1, 1)])
    store(model, 2, [(1, 2)])
    with pytest.raises(ContractViolation, match="its ring has 3 used entries, 2 fill it"):
        store(model, 3, [(1, 3)])


@pytest.mark.parametrize(
    ("stale", "others", "uncertain"),
    [
        (69, [60], [60]),
        (69, [5], []),  # further than a mask reaches
        (69, [6, 5], [6]),  # page 5 does not fit into the mask of 6 and 69
        (63, [60], []),  # not beyond the end
    ],
)
def test_reset_that_drops_a_mask(stale: int, others: list[int], uncertain: list[int]) -> None:
    """Only pages whose entries a reset joins with one beyond the end of a slot made smaller may stay writable."""
    for drops_masks in (False, True):
        model = RingModel(1, 192, emulates=False, drops_masks=drops_masks)
        model.create(1, 70, logged=True)
        store(model, stale, [(1, stale)])
        model.delete(1)
        model.create(1, 64, logged=True)
        for page in others:
            store(model, page, [(1, page)])
        take(model, [(1, stale), *((1, page) for page in others)])
        for page in others:
            if drops_masks and page in uncertain:
                store(model, page, [])
            else:
                with pytest.raises(ContractViolation, match="lacks"):
                    store(model, page, [])
