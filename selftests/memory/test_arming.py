# SPDX-License-Identifier: GPL-2.0-only
"""Tracking is armed at the right moments: when it begins, and anew by each collection, for each page of any slot."""

import random
from collections.abc import Iterator

import pytest

from dirty_tracking.bitmap import bitmap_of
from dirty_tracking.cell import Settings
from dirty_tracking.tracked_vm import FIRST_GPA, PAGE, TrackedVm
from kvm_util import uapi
from kvm_util.arch import current as arch
from kvm_util.kvm import Kvm
from kvm_util.memory import GIB, MIB, align_up

SLOT = 1
# Of a slot, in pages: around one and two words of the bitmap; in the long form around the 512 pages of a page table too
SIZES = (1, 63, 64, 65, 127, 128, 129)
MORE_SIZES = (2, 191, 192, 193, 511, 512, 513, 1025)
# Of a slot's base gfn from a 2 MiB boundary, in pages
SHIFTS = (0, 1, 63, 511)
MORE_SHIFTS = (2, 31, 32, 33, 62, 64, 65, 127, 448, 449, 510)
# Between two pages, around a word of the bitmap: KVM joins the entries of a ring that are less than 64 pages apart
DISTANCES = (1, 2, 32, 62, 63, 64, 65, 66, 127, 128, 129)


@pytest.fixture
def empty(kvm: Kvm, log_mode: str) -> Iterator[TrackedVm]:
    """Two vCPUs, and no slot yet."""
    with TrackedVm(kvm, log_mode, vcpus=2) as vm:
        yield vm


@pytest.fixture
def chance(settings: Settings) -> random.Random:
    return random.Random(settings.seed)


def patterns(npages: int, chance: random.Random) -> dict[str, list[int]]:
    """Which pages of a slot to write, by name; those that are the same in a small slot come once."""
    edges = {page for word in range(0, npages + 64, 64) for page in (word - 1, word)}
    named = {
        "all pages": list(range(npages)),
        "the first page": [0],
        "the last page": [npages - 1],
        "the edges of words": sorted(edges & set(range(npages))),
        "every second page": list(range(0, npages, 2)),
        "the other pages": list(range(1, npages, 2)),
        "the last word": list(range((npages - 1) // 64 * 64, npages)),
        "some pages": sorted(chance.sample(range(npages), max(1, npages // 10))),
        "most pages": sorted(chance.sample(range(npages), max(1, npages * 9 // 10))),
    }
    return {name: pages for name, pages in named.items() if pages}


def check_slot(vm: TrackedVm, gpa: int, npages: int, chance: random.Random, rounds: int = 2) -> None:
    """A slot of *npages* pages at *gpa*, all mapped writable before it is tracked: each pattern, again and again."""
    where = f"slot of {npages} pages at gfn {gpa // PAGE:#x}"
    vm.add_slot(SLOT, gpa, npages, tracked=False)
    vm.write(SLOT, *range(npages))
    vm.enable_dirty_logging(SLOT)
    vm.assert_dirty(f"{where}, nothing since tracking began", {})
    for name, pages in patterns(npages, chance).items():
        for _ in range(rounds):
            vm.write(SLOT, *pages)
            vm.assert_dirty(f"{where}, {name} written", {SLOT: pages})
    vm.assert_dirty(f"{where}, nothing since the last collection", {})
    vm.remove_slot(SLOT)


def test_pages_that_were_mapped_before_are_tracked(empty: TrackedVm) -> None:
    """All of them writable when tracking begins: the first write of each is seen, and not what was before."""
    npages = 64 + 9
    empty.add_slot(SLOT, FIRST_GPA, npages, tracked=False)
    empty.write(SLOT, *range(npages))
    empty.enable_dirty_logging(SLOT)
    empty.assert_dirty("nothing since tracking began", {})
    empty.write(SLOT, *range(0, npages, 2))
    empty.assert_dirty("writes to every second page", {SLOT: range(0, npages, 2)})
    empty.write(SLOT, *range(1, npages, 2))
    empty.assert_dirty("writes to the others", {SLOT: range(1, npages, 2)})


def test_pages_that_were_mapped_in_advance_are_tracked(
    kvm: Kvm,
    empty: TrackedVm,
) -> None:
    """By KVM_PRE_FAULT_MEMORY, before tracking begins, and while it is on."""
    if not kvm.check_extension(uapi.KVM_CAP_PRE_FAULT_MEMORY):
        pytest.skip(
            "no KVM_CAP_PRE_FAULT_MEMORY: it came with Linux 6.11, for CPUs that translate guest addresses (TDP)"
        )
    npages = 64 + 9
    empty.add_slot(SLOT, FIRST_GPA, npages, tracked=False)
    empty.vm.vcpus[0].pre_fault_memory(FIRST_GPA, npages * PAGE)
    empty.enable_dirty_logging(SLOT)
    empty.assert_dirty("nothing since tracking began", {})
    empty.write(SLOT, *range(0, npages, 3))
    empty.assert_dirty("writes to pages that were mapped before tracking began", {SLOT: range(0, npages, 3)})
    empty.remove_slot(SLOT)
    empty.add_slot(SLOT, FIRST_GPA, npages).memory.populate()
    # So that the vCPU lets go of the page tables of before: with those the ioctl never ends, until "KVM: x86/mmu: Check and
    # free obsolete roots in kvm_mmu_reload()", which 6.12 does not have.
    empty.run()
    empty.vm.vcpus[0].pre_fault_memory(FIRST_GPA, npages * PAGE)
    # What can be mapped writable is, and is reported then, though nothing has written it (make_spte(), mmu/spte.c).
    empty.collect()
    empty.write(SLOT, *range(0, npages, 3))
    empty.assert_dirty("writes to pages that were mapped since", {SLOT: range(0, npages, 3)})


def test_slots_of_any_size_at_any_gfn(empty: TrackedVm, chance: random.Random, thorough: bool) -> None:
    """Sizes that are no multiple of 64 pages, base gfns that are no multiple of 64 or 512: armed page by page."""
    sizes, shifts = (SIZES + MORE_SIZES, SHIFTS + MORE_SHIFTS) if thorough else (SIZES, SHIFTS)
    for index, npages in enumerate(sizes):
        for shift in shifts if thorough else (shifts[index % len(shifts)], shifts[(index + 1) % len(shifts)]):
            check_slot(empty, FIRST_GPA + shift * PAGE, npages, chance)


@pytest.mark.parametrize("boundary", [2 * MIB, GIB, 512 * GIB], ids=["2MiB", "1GiB", "512GiB"])
def test_slots_across_a_boundary_of_the_page_tables(
    kvm: Kvm, empty: TrackedVm, chance: random.Random, boundary: int, thorough: bool
) -> None:
    """A word of the bitmap whose pages are mapped by two page tables, and a word that ends where the first one does."""
    middle = align_up(FIRST_GPA + MIB, boundary)
    if middle + MIB > arch.guest_phys_limit(arch.get_supported_cpuid(kvm.fd)):
        pytest.skip(f"a guest's physical addresses end below {middle + MIB:#x} here (CPUID MAXPHYADDR)")
    for below in (1, 2, 31, 32, 33, 63, 64, 65, 100) if thorough else (1, 33, 64):
        check_slot(empty, middle - below * PAGE, 130, chance)


@pytest.mark.parametrize("npages", [(1 << 16) + 65, (1 << 20) + 3], ids=["2^16", "2^20"])
def test_slots_with_many_pages(empty: TrackedVm, chance: random.Random, npages: int) -> None:
    """Beyond what 16 and 20 bits can count; the memory is sparse, and so are the writes."""
    empty.add_slot(SLOT, 2 * GIB + 3 * PAGE, npages, tracked=False)
    fixed = {0, 63, 64, 65535, 65536, 65537, npages // 2, npages - 65, npages - 1}
    pages = sorted({*fixed, *chance.sample(range(npages), 10)})
    empty.write(SLOT, *pages)
    empty.enable_dirty_logging(SLOT)
    for _ in range(2):
        empty.write(SLOT, *pages)
        empty.assert_dirty("sparse writes", {SLOT: pages})


def test_pages_at_any_distance(empty: TrackedVm, chance: random.Random, thorough: bool) -> None:
    """Two pages, written upward and downward, and a handful in any order: collected together, each is armed anew."""
    npages = 300
    empty.add_slot(SLOT, FIRST_GPA + 5 * PAGE, npages)
    distances = range(1, 131) if thorough else DISTANCES
    orders = [[first, first + step] for step in distances for first in (0, 60, npages - 1 - step)]
    orders += [list(reversed(order)) for order in orders]
    for _ in range(500 if thorough else 25):
        start = chance.randrange(npages - 140)
        orders.append(chance.sample(range(start, start + 140), chance.randint(3, 8)))
    for order in orders:
        for _ in range(2):
            empty.write(SLOT, *order)
            empty.assert_dirty(f"pages {order} written", {SLOT: order})


def test_a_write_right_after_each_collection_is_seen(empty: TrackedVm, thorough: bool) -> None:
    """Page by page, by a vCPU that kept its translation: one that stays writable for a moment loses a write."""
    npages = 64 + 3
    empty.add_slot(SLOT, FIRST_GPA + 7 * PAGE, npages)
    for _ in range(20 if thorough else 2):
        for page in range(npages):
            empty.write(SLOT, page)
            empty.assert_dirty(f"page {page} written", {SLOT: [page]})


def test_every_vcpu_loses_its_translation(empty: TrackedVm, thorough: bool) -> None:
    """Both could write all pages; tracking begins, or one's writes are collected: then the other's next ones are seen."""
    npages = 64 + 3
    everything = range(npages)
    empty.add_slot(SLOT, FIRST_GPA + 7 * PAGE, npages, tracked=False)
    for turn in range(10 if thorough else 2):
        for vcpu in (0, 1):
            empty.write(SLOT, *everything, vcpu=vcpu)
        empty.enable_dirty_logging(SLOT)
        for writer in (0, 1, 1, 0, 1, 0):
            empty.write(SLOT, *everything, vcpu=writer)
            empty.assert_dirty(f"turn {turn}: vCPU {writer} wrote after the other", {SLOT: everything})
        for page in everything:
            empty.write(SLOT, page, vcpu=page % 2)
            empty.assert_dirty(f"turn {turn}: vCPU {page % 2} wrote page {page}", {SLOT: [page]})
        empty.disable_dirty_logging(SLOT)


@pytest.mark.log_modes("clear")
def test_each_clear_arms_its_pages(empty: TrackedVm, chance: random.Random, thorough: bool) -> None:
    """Ranges and masks of any shape: their pages are clean and tracked anew, all others stay as they are."""
    for shift in SHIFTS + MORE_SHIFTS if thorough else SHIFTS:
        for npages in (1, 64, 200):
            empty.add_slot(SLOT, FIRST_GPA + shift * PAGE, npages)
            for _ in range(50 if thorough else 6):
                check_clear(empty, chance, f"slot of {npages} pages, {shift} behind a boundary")
            empty.collect()
            empty.remove_slot(SLOT)


def check_clear(vm: TrackedVm, chance: random.Random, where: str) -> None:
    """Make all pages dirty, clear some that chance chooses, and write them again one word at a time."""
    npages = vm.vm.memslots[SLOT].npages
    vm.write(SLOT, *range(npages))
    first = chance.randrange(0, npages, 64)
    count = min(chance.randrange(64, npages + 64, 64), npages - first)
    mask = sorted(chance.sample(range(first, first + count), chance.choice((1, -(-count // 2), count))))
    vm.vm.clear_dirty_log(SLOT, bitmap_of(mask, count, first), first, count)
    dirty = set(range(npages)) - set(mask)
    vm.assert_bitmap(f"{where}: CLEAR of {count} pages from {first}, mask {mask}", SLOT, dirty)
    for start in range(first, first + count, 64):
        word = [page for page in mask if start <= page < start + 64]
        vm.write(SLOT, *word)
        dirty |= set(word)
        vm.assert_bitmap(f"{where}: pages {word} written after a CLEAR of {mask}", SLOT, dirty)
