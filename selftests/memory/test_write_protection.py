# SPDX-License-Identifier: GPL-2.0-only
"""Every gfn is write-protected when dirty logging is enabled, and again by GET, CLEAR and RESET, in memslots of any shape."""

import random
from collections.abc import Iterator

import pytest

from dirty_tracking.bitmap import bitmap_of
from dirty_tracking.scripted_vm import ScriptedVm
from dirty_tracking.vm import FIRST_GPA, PAGE
from kvm_util.arch import current as arch
from kvm_util.kvm import Kvm
from kvm_util.memory import GIB, HUGE_PAGE_SIZE, align_up, size_text

SLOT = 1
HUGE = HUGE_PAGE_SIZE // PAGE
# Sizes of a memslot in pages: around one and two words of the bitmap; thorough: around the pages of a huge page too
SIZES = (1, 63, 64, 65, 127, 128, 129)
MORE_SIZES = (2, 191, 192, 193, HUGE - 1, HUGE, HUGE + 1, 2 * HUGE + 1)
# Distances of a memslot's base gfn from a huge page's boundary, in pages
SHIFTS = (0, 1, 63, HUGE - 1)
MORE_SHIFTS = (2, 31, 32, 33, 62, 64, 65, 127, HUGE - 64, HUGE - 63, HUGE - 2)
# What a page table of each level maps
BOUNDARIES = [HUGE_PAGE_SIZE * (PAGE // 8) ** level for level in range(3)]
# Distances of two pages, around a word of the bitmap: a reset joins ring entries that are less than 64 pages apart
DISTANCES = (1, 2, 32, 62, 63, 64, 65, 66, 127, 128, 129)


@pytest.fixture
def vm(kvm: Kvm, log_mode: str) -> Iterator[ScriptedVm]:
    """A VM with two vCPUs and no test memslot yet."""
    with ScriptedVm(kvm, log_mode, vcpus=2) as vm:
        yield vm


def patterns(npages: int, rng: random.Random) -> dict[str, list[int]]:
    """Sets of pages of a memslot, by name; in a small memslot some are the same."""
    edges = {page for word in range(0, npages + 64, 64) for page in (word - 1, word)}
    named = {
        "all pages": list(range(npages)),
        "the first page": [0],
        "the last page": [npages - 1],
        "the edges of words": sorted(edges & set(range(npages))),
        "every second page": list(range(0, npages, 2)),
        "the other pages": list(range(1, npages, 2)),
        "the last word": list(range((npages - 1) // 64 * 64, npages)),
        "some pages": sorted(rng.sample(range(npages), max(1, npages // 10))),
        "most pages": sorted(rng.sample(range(npages), max(1, npages * 9 // 10))),
    }
    return {name: pages for name, pages in named.items() if pages}


def check_slot(vm: ScriptedVm, gpa: int, npages: int, rng: random.Random, rounds: int = 2) -> None:
    """Check each pattern of writes in a memslot whose pages are all mapped writable when dirty logging is enabled."""
    where = f"memslot of {npages} pages at gfn {gpa // PAGE:#x}"
    vm.add_slot(SLOT, gpa, npages, logged=False)
    vm.write(SLOT, *range(npages))
    vm.enable_dirty_logging(SLOT)
    vm.assert_dirty(f"{where}, nothing since dirty logging was enabled", {})
    for name, pages in patterns(npages, rng).items():
        for _ in range(rounds):
            vm.write(SLOT, *pages)
            vm.assert_dirty(f"{where}, {name} written", {SLOT: pages})
    vm.assert_dirty(f"{where}, nothing since the last collection", {})
    vm.remove_slot(SLOT)


def test_unaligned_slot_sizes_and_gfns(vm: ScriptedVm, draw: random.Random, thorough: bool) -> None:
    """Memslots are logged page by page when size and base gfn are not multiples of a bitmap word or a huge page."""
    sizes, shifts = (SIZES + MORE_SIZES, SHIFTS + MORE_SHIFTS) if thorough else (SIZES, SHIFTS)
    for index, npages in enumerate(sizes):
        for shift in shifts if thorough else (shifts[index % len(shifts)], shifts[(index + 1) % len(shifts)]):
            check_slot(vm, FIRST_GPA + shift * PAGE, npages, draw)


@pytest.mark.parametrize("boundary", BOUNDARIES, ids=lambda size: size_text(size).replace(" ", ""))
def test_slot_across_page_table_boundary(
    kvm: Kvm, vm: ScriptedVm, draw: random.Random, boundary: int, thorough: bool
) -> None:
    """Pages on both sides of a page table's boundary are logged, within a word of the bitmap and at its end."""
    middle = align_up(FIRST_GPA + PAGE, boundary)
    if middle + HUGE_PAGE_SIZE > arch.guest_phys_limit(kvm.supported_cpuid):
        pytest.skip(f"a guest's physical addresses end below {middle + HUGE_PAGE_SIZE:#x} here")
    for below in (1, 2, 31, 32, 33, 63, 64, 65, 100) if thorough else (1, 33, 64):
        check_slot(vm, middle - below * PAGE, 130, draw)


@pytest.mark.parametrize("npages", [(1 << 16) + 65, (1 << 20) + 3], ids=["2^16", "2^20"])
def test_slot_with_many_pages(vm: ScriptedVm, draw: random.Random, npages: int) -> None:
    """Sparse writes to a memslot of more than 2^16 or 2^20 pages are logged at the right offsets."""
    vm.add_slot(SLOT, 2 * GIB + 3 * PAGE, npages, logged=False)
    fixed = {0, 63, 64, 65535, 65536, 65537, npages // 2, npages - 65, npages - 1}
    pages = sorted({*fixed, *draw.sample(range(npages), 10)})
    vm.write(SLOT, *pages)
    vm.enable_dirty_logging(SLOT)
    for _ in range(2):
        vm.write(SLOT, *pages)
        vm.assert_dirty("sparse writes", {SLOT: pages})


def test_write_protection_at_any_distance(vm: ScriptedVm, draw: random.Random, thorough: bool) -> None:
    """Pages that are reported together, at any distance and in any order, are all write-protected again."""
    npages = 300
    vm.add_slot(SLOT, FIRST_GPA + 5 * PAGE, npages)
    distances = range(1, 131) if thorough else DISTANCES
    orders = [[first, first + step] for step in distances for first in (0, 60, npages - 1 - step)]
    orders += [list(reversed(order)) for order in orders]
    for _ in range(500 if thorough else 25):
        start = draw.randrange(npages - 140)
        orders.append(draw.sample(range(start, start + 140), draw.randint(3, 8)))
    for order in orders:
        for _ in range(2):
            vm.write(SLOT, *order)
            vm.assert_dirty(f"pages {order} written", {SLOT: order})


def test_tlb_flush_reaches_every_vcpu(vm: ScriptedVm, thorough: bool) -> None:
    """No vCPU keeps a writable translation when logging is enabled, or when writes of another vCPU are collected."""
    npages = 64 + 3
    everything = range(npages)
    vm.add_slot(SLOT, FIRST_GPA + 7 * PAGE, npages, logged=False)
    for round_number in range(10 if thorough else 2):
        for vcpu in (0, 1):
            vm.write(SLOT, *everything, vcpu=vcpu)
        vm.enable_dirty_logging(SLOT)
        for writer in (0, 1, 1, 0, 1, 0):
            vm.write(SLOT, *everything, vcpu=writer)
            vm.assert_dirty(f"round {round_number}: vCPU {writer} wrote after the other", {SLOT: everything})
        for page in everything:
            vm.write(SLOT, page, vcpu=page % 2)
            vm.assert_dirty(f"round {round_number}: vCPU {page % 2} wrote page {page}", {SLOT: [page]})
        vm.disable_dirty_logging(SLOT)


@pytest.mark.log_modes("clear")
def test_clear_protects_exactly_its_mask(vm: ScriptedVm, draw: random.Random, thorough: bool) -> None:
    """CLEAR cleans and write-protects the pages of its mask, in any range, and leaves all others dirty."""
    for shift in SHIFTS + MORE_SHIFTS if thorough else SHIFTS:
        for npages in (1, 64, 200):
            vm.add_slot(SLOT, FIRST_GPA + shift * PAGE, npages)
            for _ in range(50 if thorough else 6):
                check_clear(vm, draw, f"memslot of {npages} pages, {shift} after a huge page's boundary")
            vm.collect()
            vm.remove_slot(SLOT)


def check_clear(vm: ScriptedVm, rng: random.Random, where: str) -> None:
    """Dirty all pages, clear random ones, and write these again, one word of the bitmap at a time."""
    npages = vm.vm.memslots[SLOT].npages
    vm.write(SLOT, *range(npages))
    first = rng.randrange(0, npages, 64)
    count = min(rng.randrange(64, npages + 64, 64), npages - first)
    mask = sorted(rng.sample(range(first, first + count), rng.choice((1, -(-count // 2), count))))
    vm.vm.clear_dirty_log(SLOT, bitmap_of(mask, count, first), first, count)
    dirty = set(range(npages)) - set(mask)
    vm.assert_bitmap(f"{where}: CLEAR of {count} pages from {first}, mask {mask}", SLOT, dirty)
    for start in range(first, first + count, 64):
        word = [page for page in mask if start <= page < start + 64]
        vm.write(SLOT, *word)
        dirty |= set(word)
        vm.assert_bitmap(f"{where}: pages {word} written after a CLEAR of {mask}", SLOT, dirty)
