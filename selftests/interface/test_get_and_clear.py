# SPDX-License-Identifier: GPL-2.0-only
"""KVM_GET_DIRTY_LOG and KVM_CLEAR_DIRTY_LOG: which bits they give, which they take, and what they leave alone."""

import ctypes
import errno
import mmap
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from dirty_tracking.bitmap import bitmap_of, new_bitmap, set_pages
from dirty_tracking.modes import LOG_MODES
from dirty_tracking.tracked_vm import FIRST_GPA, PAGE, TrackedVm
from kvm_util import uapi
from kvm_util.ioctl import raw_ioctl
from kvm_util.kvm import Kvm

SLOT, OTHER = 1, 2
MANUAL, INITIALLY_SET = uapi.KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE, uapi.KVM_DIRTY_LOG_INITIALLY_SET
# Three whole words of the bitmap and a partial one
NPAGES = 3 * 64 + 5
ALL = list(range(NPAGES))
GUARD = 0xC3
GUARD_SIZE = 64
PROT_NONE = 0  # <linux/mman.h>


def make_vm(kvm: Kvm, mode: str) -> TrackedVm:
    vm = TrackedVm(kvm, mode)
    vm.add_slot(SLOT, FIRST_GPA, NPAGES)
    vm.add_slot(OTHER, FIRST_GPA + NPAGES * PAGE, NPAGES)
    return vm


@pytest.fixture
def manual(kvm: Kvm) -> Iterator[TrackedVm]:
    """A VM in which GET only reads, and CLEAR clears."""
    if reason := LOG_MODES["clear-log-unset"].supported(kvm):
        pytest.skip(reason)
    with make_vm(kvm, "clear-log-unset") as vm:
        yield vm


@pytest.fixture
def automatic(kvm: Kvm) -> Iterator[TrackedVm]:
    """A VM in which GET reads and clears."""
    with make_vm(kvm, "dirty-log") as vm:
        yield vm


def test_get_clears_by_itself(automatic: TrackedVm) -> None:
    automatic.write(SLOT, 3, 70)
    assert automatic.read_bitmap(SLOT) == [3, 70]
    assert automatic.read_bitmap(SLOT) == []


def test_manual_mode_keeps_bits_until_they_are_cleared(manual: TrackedVm) -> None:
    manual.write(SLOT, 3, 70)
    assert [manual.read_bitmap(SLOT) for _ in range(2)] == [[3, 70]] * 2
    manual.write(SLOT, 4)
    assert manual.read_bitmap(SLOT) == [3, 4, 70]
    manual.vm.clear_dirty_log(SLOT, bitmap_of([3, 70], NPAGES), 0, NPAGES)
    assert manual.read_bitmap(SLOT) == [4]


@pytest.mark.log_modes("clear-log")
def test_all_pages_are_set_at_first_where_that_is_asked_for(kvm: Kvm) -> None:
    """KVM_DIRTY_LOG_INITIALLY_SET sets the bits of the slot's pages, and none beyond the last."""
    with TrackedVm(kvm, "clear-log") as vm:
        vm.add_slot(SLOT, FIRST_GPA, NPAGES, tracked=False)
        vm.enable_dirty_logging(SLOT, assert_initial=False)
        assert vm.read_bitmap(SLOT) == ALL
        vm.vm.clear_dirty_log(SLOT, bitmap_of([0, 64], NPAGES), 0, NPAGES)
        assert vm.read_bitmap(SLOT) == [page for page in ALL if page not in (0, 64)]
        vm.write(SLOT, 64)
        assert vm.read_bitmap(SLOT) == ALL[1:]


# first_page and num_pages: aligned starts, and lengths that are whole words or reach the slot's end
RANGES = [
    (first, count)
    for first in range(0, NPAGES, 64)
    for count in (*range(64, NPAGES - first + 1, 64), NPAGES - first)
    if count
]


@pytest.mark.parametrize(("first", "count"), RANGES)
def test_a_range_is_cleared_and_nothing_else(manual: TrackedVm, first: int, count: int) -> None:
    """Each legal range, all bits of the mask set: its pages are clean and tracked anew, the others stay dirty."""
    manual.write(SLOT, *ALL)
    inside = list(range(first, first + count))
    manual.vm.clear_dirty_log(SLOT, bitmap_of(inside, count, first), first, count)
    assert manual.read_bitmap(SLOT) == [page for page in ALL if page not in inside]
    manual.write(SLOT, *inside)
    assert manual.read_bitmap(SLOT) == ALL


MASKS = {
    "first": [0],
    "last": [NPAGES - 1],
    "word-edges": [63, 64, 127, 128],
    "every-second": ALL[::2],
    "one-word": list(range(64, 128)),
    "all-but-one": [page for page in ALL if page != 100],
    "none": [],
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=list(MASKS))
def test_only_the_pages_of_the_mask_are_cleared(manual: TrackedVm, mask: list[int]) -> None:
    """And only they are tracked anew: at once, from a vCPU that kept its translations."""
    manual.write(SLOT, *ALL)
    manual.vm.clear_dirty_log(SLOT, bitmap_of(mask, NPAGES), 0, NPAGES)
    assert manual.read_bitmap(SLOT) == [page for page in ALL if page not in mask]
    manual.write(SLOT, *mask)
    assert manual.read_bitmap(SLOT) == ALL


def test_clean_pages_and_bits_beyond_the_slot_are_no_error(manual: TrackedVm) -> None:
    """Bits of pages that are clean, or that do not exist, change nothing."""
    manual.write(SLOT, 5, NPAGES - 1)
    mask = bitmap_of([6, 7], NPAGES)
    mask[-1] = 0xFF
    manual.vm.clear_dirty_log(SLOT, mask, 0, NPAGES)
    assert manual.read_bitmap(SLOT) == [5, NPAGES - 1]


@pytest.mark.parametrize("page", [0, 63, 64, NPAGES - 1])
def test_a_write_right_after_the_clear_is_seen(manual: TrackedVm, page: int) -> None:
    """Again and again: a translation that stays writable for a moment loses a write."""
    for _ in range(20):
        manual.write(SLOT, page)
        assert manual.read_bitmap(SLOT) == [page]
        manual.vm.clear_dirty_log(SLOT, bitmap_of([page], NPAGES), 0, NPAGES)


def test_slots_are_not_mixed_up(manual: TrackedVm) -> None:
    manual.write(SLOT, 1, NPAGES - 1)
    manual.write(OTHER, 0, 2)
    manual.vm.clear_dirty_log(OTHER, bitmap_of(ALL, NPAGES), 0, NPAGES)
    assert manual.read_bitmap(SLOT) == [1, NPAGES - 1]
    assert manual.read_bitmap(OTHER) == []
    manual.write(OTHER, 3)
    assert manual.read_bitmap(SLOT) == [1, NPAGES - 1]
    assert manual.read_bitmap(OTHER) == [3]


@pytest.mark.parametrize("npages", [1, 64, 65, NPAGES])
@pytest.mark.log_modes("dirty-log", "clear-log")
def test_get_writes_whole_words_and_nothing_around_them(kvm: Kvm, log_mode: str, npages: int) -> None:
    """What the buffer held before is overwritten, guard bytes before and behind it stay.

    In manual log_mode it is another bitmap of the kernel's that is copied (kvm_get_dirty_log_protect()).
    """
    with TrackedVm(kvm, log_mode) as vm:
        vm.add_slot(SLOT, FIRST_GPA, npages)
        vm.write(SLOT, 0, npages - 1)
        size = len(new_bitmap(npages))
        buffer = bytearray([GUARD]) * (size + 2 * GUARD_SIZE)
        start = ctypes.addressof(ctypes.c_char.from_buffer(buffer)) + GUARD_SIZE
        request = uapi.kvm_dirty_log(slot=SLOT, dirty_bitmap=start)
        assert raw_ioctl(vm.vm.fd, uapi.KVM_GET_DIRTY_LOG, ctypes.byref(request)) == (0, 0)
        assert set_pages(buffer[GUARD_SIZE : GUARD_SIZE + size]) == sorted({0, npages - 1})
        assert set(buffer[:GUARD_SIZE] + buffer[GUARD_SIZE + size :]) == {GUARD}


def test_clear_leaves_its_mask_alone(manual: TrackedVm) -> None:
    manual.write(SLOT, *ALL)
    mask = bitmap_of(ALL[::3], NPAGES)
    before = bytes(mask)
    manual.vm.clear_dirty_log(SLOT, mask, 0, NPAGES)
    assert bytes(mask) == before


def unmapped_address() -> int:
    """An address at which this process has no memory."""
    with mmap.mmap(-1, PAGE) as mapped:
        return ctypes.addressof(ctypes.c_char.from_buffer(mapped))


@contextmanager
def ones_before_nothing() -> Iterator[int]:
    """The end of a page in which all bits are set; what is behind it cannot be read."""
    with mmap.mmap(-1, 2 * PAGE) as mapped:
        mapped[:] = b"\xff" * len(mapped)
        end = ctypes.addressof(ctypes.c_char.from_buffer(mapped)) + PAGE
        ctypes.CDLL(None).mprotect(ctypes.c_void_p(end), PAGE, PROT_NONE)
        yield end


def test_a_get_that_cannot_write_loses_nothing_in_manual_mode(manual: TrackedVm) -> None:
    """EFAULT for a buffer that is not there; the bits are there for the next."""
    manual.write(SLOT, 9)
    request = uapi.kvm_dirty_log(slot=SLOT, dirty_bitmap=unmapped_address())
    assert raw_ioctl(manual.vm.fd, uapi.KVM_GET_DIRTY_LOG, ctypes.byref(request)) == (-1, errno.EFAULT)
    assert manual.read_bitmap(SLOT) == [9]


def test_a_get_that_cannot_write_loses_its_bits_in_automatic_mode(automatic: TrackedVm) -> None:
    """It has cleared them by the time it finds out (kvm_get_dirty_log_protect()); but the pages are tracked anew."""
    automatic.write(SLOT, 9)
    request = uapi.kvm_dirty_log(slot=SLOT, dirty_bitmap=unmapped_address())
    assert raw_ioctl(automatic.vm.fd, uapi.KVM_GET_DIRTY_LOG, ctypes.byref(request)) == (-1, errno.EFAULT)
    assert automatic.read_bitmap(SLOT) == []
    automatic.write(SLOT, 9, 10)
    assert automatic.read_bitmap(SLOT) == [9, 10]


def test_a_clear_that_cannot_read_its_mask_clears_nothing(manual: TrackedVm) -> None:
    """Also where only the mask's second half is not there."""
    manual.write(SLOT, *ALL)
    # The kernel reads the mask as a whole before it clears the first bit.
    with ones_before_nothing() as end:
        for start in (end - 8, end):
            request = uapi.kvm_clear_dirty_log(slot=SLOT, first_page=0, num_pages=NPAGES, dirty_bitmap=start)
            answer = raw_ioctl(manual.vm.fd, uapi.KVM_CLEAR_DIRTY_LOG, ctypes.byref(request))
            assert answer == (-1, errno.EFAULT)
    assert manual.read_bitmap(SLOT) == ALL


@pytest.mark.parametrize(("first", "count"), RANGES)
def test_a_clear_reads_no_more_than_its_mask(manual: TrackedVm, first: int, count: int) -> None:
    """A bit per page of the range, in whole words: nothing has to be behind them.

    Before Linux 5.2 it was a bit per page of the slot ("KVM: Fix the bitmap range to copy during clear dirty").
    """
    manual.write(SLOT, *ALL)
    with ones_before_nothing() as end:
        start = end - len(new_bitmap(count))
        request = uapi.kvm_clear_dirty_log(slot=SLOT, first_page=first, num_pages=count, dirty_bitmap=start)
        assert raw_ioctl(manual.vm.fd, uapi.KVM_CLEAR_DIRTY_LOG, ctypes.byref(request)) == (0, 0)
    assert manual.read_bitmap(SLOT) == [page for page in ALL if page not in range(first, first + count)]


def test_manual_mode_can_be_switched_off_again(manual: TrackedVm) -> None:
    """KVM_ENABLE_CAP with no flags: GET clears by itself from then on (api.rst, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2)."""
    manual.write(SLOT, 3)
    assert [manual.read_bitmap(SLOT) for _ in range(2)] == [[3]] * 2
    manual.vm.enable_cap(uapi.KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, 0)
    assert [manual.read_bitmap(SLOT) for _ in range(2)] == [[3], []]
    manual.write(SLOT, 3)
    assert manual.read_bitmap(SLOT) == [3]


@pytest.mark.log_modes("clear-log-unset")
def test_manual_mode_can_be_switched_on_late(automatic: TrackedVm) -> None:
    """With slots, vCPUs and dirty pages there: GET only reads from then on, and forgets nothing of before."""
    automatic.write(SLOT, 3)
    automatic.vm.enable_cap(uapi.KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, MANUAL)
    assert [automatic.read_bitmap(SLOT) for _ in range(2)] == [[3]] * 2
    automatic.vm.clear_dirty_log(SLOT, bitmap_of([3], NPAGES), 0, NPAGES)
    assert automatic.read_bitmap(SLOT) == []
    automatic.write(SLOT, 3, 4)
    assert automatic.read_bitmap(SLOT) == [3, 4]


@pytest.mark.log_modes("clear-log")
def test_initially_set_is_for_bitmaps_that_are_made_afterwards(
    automatic: TrackedVm,
) -> None:
    """Those that are there stay what they are when it is switched on, and off; a slot's is made when its tracking begins."""
    vm, cap = automatic, uapi.KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2
    vm.write(OTHER, *ALL)
    vm.disable_dirty_logging(OTHER)
    vm.write(SLOT, 3)
    vm.vm.enable_cap(cap, MANUAL | INITIALLY_SET)
    assert vm.read_bitmap(SLOT) == [3]
    vm.enable_dirty_logging(OTHER, assert_initial=False)
    assert vm.read_bitmap(OTHER) == ALL
    vm.vm.enable_cap(cap, MANUAL)
    assert [vm.read_bitmap(slot) for slot in (SLOT, OTHER)] == [[3], ALL]
    # Where all bits were set no page was tracked when that began; each is by the CLEAR of its bit, whatever came between.
    vm.vm.clear_dirty_log(OTHER, bitmap_of(ALL, NPAGES), 0, NPAGES)
    vm.write(OTHER, 7)
    assert vm.read_bitmap(OTHER) == [7]
    vm.disable_dirty_logging(OTHER)
    vm.enable_dirty_logging(OTHER, assert_initial=False)
    assert vm.read_bitmap(OTHER) == []


def test_clear_works_without_manual_mode(automatic: TrackedVm, kvm: Kvm) -> None:
    """KVM has CLEAR wherever it has the capability, enabled or not (api.rst 4.117)."""
    if not kvm.check_extension(uapi.KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2):
        pytest.skip("no KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2")
    automatic.write(SLOT, 3, 70)
    automatic.vm.clear_dirty_log(SLOT, bitmap_of([3], NPAGES), 0, NPAGES)
    automatic.write(SLOT, 5)
    assert automatic.read_bitmap(SLOT) == [5, 70]
