# SPDX-License-Identifier: GPL-2.0-only
"""KVM_GET_DIRTY_LOG and KVM_CLEAR_DIRTY_LOG: which bits they report, which they clear, and which they leave set."""

import ctypes
import errno
import mmap
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from dirty_tracking.bitmap import bitmap_of, new_bitmap, set_pages
from dirty_tracking.scripted_vm import ScriptedVm
from dirty_tracking.vm import FIRST_GPA, PAGE
from kvm_util import uapi
from kvm_util.ioctl import raw_ioctl
from kvm_util.kvm import Kvm
from selftests.interface.slots import NPAGES, OTHER, SLOT

MANUAL, INITIALLY_SET = uapi.KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE, uapi.KVM_DIRTY_LOG_INITIALLY_SET
ALL = list(range(NPAGES))
GUARD = 0xC3
GUARD_SIZE = 64
PROT_NONE = 0  # <linux/mman.h>


def test_get_clears_reported_bits(dirty_log_vm: ScriptedVm) -> None:
    """Without manual protection, GET clears the bits that it reports."""
    dirty_log_vm.write(SLOT, 3, 70)
    assert dirty_log_vm.read_bitmap(SLOT) == [3, 70]
    assert dirty_log_vm.read_bitmap(SLOT) == []


def test_manual_protect_keeps_bits_until_clear(manual_vm: ScriptedVm) -> None:
    """With manual protection, bits stay set over any number of GETs until CLEAR clears them."""
    manual_vm.write(SLOT, 3, 70)
    assert [manual_vm.read_bitmap(SLOT) for _ in range(2)] == [[3, 70]] * 2
    manual_vm.write(SLOT, 4)
    assert manual_vm.read_bitmap(SLOT) == [3, 4, 70]
    manual_vm.vm.clear_dirty_log(SLOT, bitmap_of([3, 70], NPAGES), 0, NPAGES)
    assert manual_vm.read_bitmap(SLOT) == [4]


@pytest.mark.log_modes("clear-log")
def test_initially_set_sets_each_page(kvm: Kvm) -> None:
    """With KVM_DIRTY_LOG_INITIALLY_SET, enabling dirty logging sets the bit of each page of the slot, and none beyond."""
    with ScriptedVm(kvm, "clear-log") as vm:
        vm.add_slot(SLOT, FIRST_GPA, NPAGES, logged=False)
        vm.enable_dirty_logging(SLOT, assert_initial=False)
        assert vm.read_bitmap(SLOT) == ALL
        vm.vm.clear_dirty_log(SLOT, bitmap_of([0, 64], NPAGES), 0, NPAGES)
        assert vm.read_bitmap(SLOT) == [page for page in ALL if page not in (0, 64)]
        vm.write(SLOT, 64)
        assert vm.read_bitmap(SLOT) == ALL[1:]


# first_page and num_pages: aligned starts, and lengths that are whole words or end with the slot
RANGES = [
    (first, count)
    for first in range(0, NPAGES, 64)
    for count in (*range(64, NPAGES - first + 1, 64), NPAGES - first)
    if count
]


@contextmanager
def ones_before_unreadable_page() -> Iterator[int]:
    """The end address of a page in which all bits are set; the page after it cannot be read."""
    with mmap.mmap(-1, 2 * PAGE) as mapped:
        mapped[:] = b"\xff" * len(mapped)
        end = ctypes.addressof(ctypes.c_char.from_buffer(mapped)) + PAGE
        ctypes.CDLL(None).mprotect(ctypes.c_void_p(end), PAGE, PROT_NONE)
        yield end


@pytest.mark.parametrize(("first", "count"), RANGES)
def test_clear_affects_only_its_range(manual_vm: ScriptedVm, first: int, count: int) -> None:
    """For each valid range, CLEAR clears and write-protects the pages in it, and the bits of the others stay set."""
    manual_vm.write(SLOT, *ALL)
    inside = list(range(first, first + count))
    manual_vm.vm.clear_dirty_log(SLOT, bitmap_of(inside, count, first), first, count)
    assert manual_vm.read_bitmap(SLOT) == [page for page in ALL if page not in inside]
    manual_vm.write(SLOT, *inside)
    assert manual_vm.read_bitmap(SLOT) == ALL


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
def test_clear_affects_only_its_mask(manual_vm: ScriptedVm, mask: list[int]) -> None:
    """CLEAR clears and write-protects the pages in its mask, which it only reads.

    That holds for a vCPU that has cached their translations, too.
    """
    manual_vm.write(SLOT, *ALL)
    bitmap = bitmap_of(mask, NPAGES)
    manual_vm.vm.clear_dirty_log(SLOT, bitmap, 0, NPAGES)
    assert bitmap == bitmap_of(mask, NPAGES)
    assert manual_vm.read_bitmap(SLOT) == [page for page in ALL if page not in mask]
    manual_vm.write(SLOT, *mask)
    assert manual_vm.read_bitmap(SLOT) == ALL


def test_clear_ignores_clean_and_absent_pages(manual_vm: ScriptedVm) -> None:
    """CLEAR ignores bits of its mask whose pages are clean or lie beyond the slot."""
    manual_vm.write(SLOT, 5, NPAGES - 1)
    mask = bitmap_of([6, 7], NPAGES)
    mask[-1] = 0xFF
    manual_vm.vm.clear_dirty_log(SLOT, mask, 0, NPAGES)
    assert manual_vm.read_bitmap(SLOT) == [5, NPAGES - 1]


@pytest.mark.parametrize("page", [0, 63, 64, NPAGES - 1])
def test_write_right_after_clear(manual_vm: ScriptedVm, page: int) -> None:
    """A write right after a CLEAR of its page is reported."""
    for _ in range(20):  # a translation that stays writable for a moment loses a write only now and then
        manual_vm.write(SLOT, page)
        assert manual_vm.read_bitmap(SLOT) == [page]
        manual_vm.vm.clear_dirty_log(SLOT, bitmap_of([page], NPAGES), 0, NPAGES)


def test_slots_have_separate_bitmaps(manual_vm: ScriptedVm) -> None:
    """Writes to one slot, and a CLEAR of it, do not change the bitmap of another."""
    manual_vm.write(SLOT, 1, NPAGES - 1)
    manual_vm.write(OTHER, 0, 2)
    manual_vm.vm.clear_dirty_log(OTHER, bitmap_of(ALL, NPAGES), 0, NPAGES)
    assert manual_vm.read_bitmap(SLOT) == [1, NPAGES - 1]
    assert manual_vm.read_bitmap(OTHER) == []
    manual_vm.write(OTHER, 3)
    assert manual_vm.read_bitmap(SLOT) == [1, NPAGES - 1]
    assert manual_vm.read_bitmap(OTHER) == [3]


@pytest.mark.parametrize("npages", [1, 64, 65, NPAGES])
@pytest.mark.log_modes("dirty-log", "clear-log")
def test_get_writes_whole_words_only(kvm: Kvm, log_mode: str, npages: int) -> None:
    """GET overwrites each word of the slot's bitmap in the buffer, and no byte before or after them.

    With manual protection the kernel copies another bitmap than without (kvm_get_dirty_log_protect()).
    """
    with ScriptedVm(kvm, log_mode) as vm:
        vm.add_slot(SLOT, FIRST_GPA, npages)
        vm.write(SLOT, 0, npages - 1)
        size = len(new_bitmap(npages))
        buffer = bytearray([GUARD]) * (size + 2 * GUARD_SIZE)
        start = ctypes.addressof(ctypes.c_char.from_buffer(buffer)) + GUARD_SIZE
        request = uapi.kvm_dirty_log(slot=SLOT, dirty_bitmap=start)
        assert raw_ioctl(vm.vm.fd, uapi.KVM_GET_DIRTY_LOG, ctypes.byref(request)) == (0, 0)
        assert set_pages(buffer[GUARD_SIZE : GUARD_SIZE + size]) == sorted({0, npages - 1})
        assert set(buffer[:GUARD_SIZE] + buffer[GUARD_SIZE + size :]) == {GUARD}


def unmapped_address() -> int:
    """An address at which this process has no memory."""
    with mmap.mmap(-1, PAGE) as mapped:
        return ctypes.addressof(ctypes.c_char.from_buffer(mapped))


def test_failed_get_keeps_bits_if_manual(manual_vm: ScriptedVm) -> None:
    """With manual protection, a GET that fails with EFAULT loses no bit: the next GET reports them all."""
    manual_vm.write(SLOT, 9)
    request = uapi.kvm_dirty_log(slot=SLOT, dirty_bitmap=unmapped_address())
    assert raw_ioctl(manual_vm.vm.fd, uapi.KVM_GET_DIRTY_LOG, ctypes.byref(request)) == (-1, errno.EFAULT)
    assert manual_vm.read_bitmap(SLOT) == [9]


def test_failed_get_still_write_protects(dirty_log_vm: ScriptedVm) -> None:
    """Without manual protection, a GET that fails with EFAULT loses its bits, but write-protects their pages again.

    It clears the bits before it copies them to user space (kvm_get_dirty_log_protect()).
    """
    dirty_log_vm.write(SLOT, 9)
    request = uapi.kvm_dirty_log(slot=SLOT, dirty_bitmap=unmapped_address())
    assert raw_ioctl(dirty_log_vm.vm.fd, uapi.KVM_GET_DIRTY_LOG, ctypes.byref(request)) == (-1, errno.EFAULT)
    assert dirty_log_vm.read_bitmap(SLOT) == []
    dirty_log_vm.write(SLOT, 9, 10)
    assert dirty_log_vm.read_bitmap(SLOT) == [9, 10]


def test_clear_with_unreadable_mask(manual_vm: ScriptedVm) -> None:
    """A CLEAR that cannot read all of its mask fails with EFAULT and clears no bit."""
    manual_vm.write(SLOT, *ALL)
    # The kernel copies the whole mask before it clears the first bit.
    with ones_before_unreadable_page() as end:
        for start in (end - 8, end):
            request = uapi.kvm_clear_dirty_log(slot=SLOT, first_page=0, num_pages=NPAGES, dirty_bitmap=start)
            answer = raw_ioctl(manual_vm.vm.fd, uapi.KVM_CLEAR_DIRTY_LOG, ctypes.byref(request))
            assert answer == (-1, errno.EFAULT)
    assert manual_vm.read_bitmap(SLOT) == ALL


@pytest.mark.parametrize(("first", "count"), RANGES)
def test_clear_dirty_log_copies_only_the_mask(manual_vm: ScriptedVm, first: int, count: int) -> None:
    """CLEAR reads one bit for each page of its range, in whole words, and no memory after them.

    Before Linux 5.2 it read a bit for each page of the slot ("KVM: Fix the bitmap range to copy during clear dirty").
    """
    manual_vm.write(SLOT, *ALL)
    with ones_before_unreadable_page() as end:
        start = end - len(new_bitmap(count))
        request = uapi.kvm_clear_dirty_log(slot=SLOT, first_page=first, num_pages=count, dirty_bitmap=start)
        assert raw_ioctl(manual_vm.vm.fd, uapi.KVM_CLEAR_DIRTY_LOG, ctypes.byref(request)) == (0, 0)
    assert manual_vm.read_bitmap(SLOT) == [page for page in ALL if page not in range(first, first + count)]


def test_manual_protect_can_be_disabled(manual_vm: ScriptedVm) -> None:
    """After KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 was enabled with no bits set, GET clears what it reports (api.rst 7.18)."""
    manual_vm.write(SLOT, 3)
    assert [manual_vm.read_bitmap(SLOT) for _ in range(2)] == [[3]] * 2
    manual_vm.vm.enable_cap(uapi.KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, 0)
    assert [manual_vm.read_bitmap(SLOT) for _ in range(2)] == [[3], []]
    manual_vm.write(SLOT, 3)
    assert manual_vm.read_bitmap(SLOT) == [3]


@pytest.mark.log_modes("clear-log-unset")
def test_manual_protect_can_be_enabled_late(dirty_log_vm: ScriptedVm) -> None:
    """Manual protection that is enabled on a VM with slots, vCPUs and dirty pages loses no dirty page."""
    dirty_log_vm.write(SLOT, 3)
    dirty_log_vm.vm.enable_cap(uapi.KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, MANUAL)
    assert [dirty_log_vm.read_bitmap(SLOT) for _ in range(2)] == [[3]] * 2
    dirty_log_vm.vm.clear_dirty_log(SLOT, bitmap_of([3], NPAGES), 0, NPAGES)
    assert dirty_log_vm.read_bitmap(SLOT) == []
    dirty_log_vm.write(SLOT, 3, 4)
    assert dirty_log_vm.read_bitmap(SLOT) == [3, 4]


@pytest.mark.log_modes("clear-log")
def test_initially_set_affects_only_new_bitmaps(dirty_log_vm: ScriptedVm) -> None:
    """Switching KVM_DIRTY_LOG_INITIALLY_SET on or off changes no bitmap of a slot whose dirty logging is enabled."""
    vm, cap = dirty_log_vm, uapi.KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2
    vm.write(OTHER, *ALL)
    vm.disable_dirty_logging(OTHER)
    vm.write(SLOT, 3)
    vm.vm.enable_cap(cap, MANUAL | INITIALLY_SET)
    assert vm.read_bitmap(SLOT) == [3]
    vm.enable_dirty_logging(OTHER, assert_initial=False)
    assert vm.read_bitmap(OTHER) == ALL
    vm.vm.enable_cap(cap, MANUAL)
    assert [vm.read_bitmap(slot) for slot in (SLOT, OTHER)] == [[3], ALL]
    # With all bits initially set, enabling logging write-protects no page; the CLEAR of its bit must, whatever came between.
    vm.vm.clear_dirty_log(OTHER, bitmap_of(ALL, NPAGES), 0, NPAGES)
    vm.write(OTHER, 7)
    assert vm.read_bitmap(OTHER) == [7]
    vm.disable_dirty_logging(OTHER)
    vm.enable_dirty_logging(OTHER, assert_initial=False)
    assert vm.read_bitmap(OTHER) == []


def test_clear_without_manual_protect(dirty_log_vm: ScriptedVm, kvm: Kvm) -> None:
    """CLEAR works wherever KVM has the capability for it, also when a VM has not enabled it (api.rst 4.117)."""
    if not kvm.check_extension(uapi.KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2):
        pytest.skip("no KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2")
    dirty_log_vm.write(SLOT, 3, 70)
    dirty_log_vm.vm.clear_dirty_log(SLOT, bitmap_of([3], NPAGES), 0, NPAGES)
    dirty_log_vm.write(SLOT, 5)
    assert dirty_log_vm.read_bitmap(SLOT) == [5, 70]
