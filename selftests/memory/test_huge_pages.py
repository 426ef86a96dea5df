# SPDX-License-Identifier: GPL-2.0-only
"""Memory in huge pages: reported by 4 KiB pages all the same, mapped huge before and after tracking, and split for it."""

import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import pytest

from dirty_tracking.bitmap import bitmap_of
from dirty_tracking.cell import Settings
from dirty_tracking.mapping_sizes import MappingSizes, huge_pages
from dirty_tracking.modes import LOG_MODES
from dirty_tracking.platform import splits_eagerly, uses_tdp
from dirty_tracking.tracked_vm import FIRST_GPA, PAGE, Operation, TrackedVm
from dirty_tracking.violations import Kind, violated
from kvm_util import uapi
from kvm_util.arch import current as arch
from kvm_util.binary_stats import BinaryStats
from kvm_util.host import Host
from kvm_util.kvm import Kvm
from kvm_util.memory import BACKINGS, GIB, MIB, size_text

SLOT = 1
MANUAL = uapi.KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE
RET = 0xC3


@dataclass(frozen=True)
class Layout:
    """Where a slot lies: *size* is that of the largest pages that KVM can map it with, in bytes."""

    backing: str
    gpa: int
    npages: int
    size: int

    def __str__(self) -> str:
        return f"{self.backing}+{self.gpa % self.size // PAGE}"


def two_mib(backing: str, shift: int) -> Layout:
    """Three huge pages of 2 MiB and a part of one, or two and two parts: *shift* is the base gfn's in its huge page."""
    return Layout(backing, FIRST_GPA + shift * PAGE, 3 * 512 + 7, 2 * MIB)


def within_one_gib(shift: int) -> Layout:
    """Behind the beginning of a page of 1 GiB, so that KVM can map it with pages of 2 MiB only."""
    return Layout("anonymous_hugetlb_1gb", 2 * GIB + shift * PAGE, 3 * 512 + 7, 2 * MIB)


ONE_GIB = Layout("anonymous_hugetlb_1gb", 2 * GIB, GIB // PAGE, GIB)
SMALL_LAYOUTS = [
    two_mib("anonymous_thp", 0),
    two_mib("anonymous_thp", 3),
    two_mib("anonymous_hugetlb_2mb", 0),
    two_mib("anonymous_hugetlb_2mb", 511),
]
# To clear a page of 1 GiB takes long where it is emulated, so not every mode has it.
CASES = [
    *((mode, layout) for mode in LOG_MODES for layout in SMALL_LAYOUTS),
    ("clear-log", ONE_GIB),
    ("dirty-ring", ONE_GIB),
    ("dirty-log", within_one_gib(3)),
]
TWO_MIB_BACKINGS = ["anonymous_thp", "anonymous_hugetlb_2mb"]
UNDER_LARGE_GUEST_PAGES = [(mode, two_mib("anonymous_thp", 3), "48bit-2m") for mode in LOG_MODES]
# Any page of a word of the bitmap can be the first of a huge page, by the base gfn; with a shift of 1 it is the last one.
EDGE_SHIFTS = (0, 1, 3, 63)


Make = Callable[..., AbstractContextManager[TrackedVm]]


@pytest.fixture
def make(
    kvm: Kvm,
    host: Host,
    log_mode: str,
    huge_page_pool: Callable[[], AbstractContextManager[None]],
) -> Make:
    """Call it with a layout for a VM in the log mode with that slot, untracked, all of it in the host's huge pages.

    Unless a guest mode is given, it is one in which KVM can map the slot huge.
    """

    @contextmanager
    def make(layout: Layout, guest_mode: str | None = None) -> Iterator[TrackedVm]:
        backing = BACKINGS[layout.backing]
        guest_mode = guest_mode or huge_guest_mode(kvm, host, layout)
        if reason := backing.missing(0):
            pytest.skip(reason)
        with huge_page_pool() if backing.hugetlb else nullcontext():
            if reason := backing.missing(layout.npages * PAGE + layout.gpa % backing.alignment):
                pytest.skip(reason)
            with TrackedVm(kvm, log_mode, guest_mode=guest_mode) as vm:
                memslot = vm.add_slot(SLOT, layout.gpa, layout.npages, layout.backing, tracked=False)
                memslot.memory.populate()
                needed = len(huge_pages(memslot, layout.size)) * layout.size
                if not backing.hugetlb and memslot.memory.transparent_huge_size() < needed:
                    pytest.skip(
                        f"{backing.name}: the host's memory is fragmented (echo 1 > /proc/sys/vm/compact_memory)"
                    )
                yield vm

    return make


def huge_guest_mode(kvm: Kvm, host: Host, layout: Layout) -> str:
    """The guest mode in which KVM maps *layout* huge: shadow page tables have pages no larger than the guest's own."""
    if uses_tdp(host):
        return "48bit-4k"
    if layout.size == GIB and not arch.GUEST_MODES["48bit-1g"].missing(arch.get_supported_cpuid(kvm.fd)):
        return "48bit-1g"
    return "48bit-2m"


@pytest.fixture
def stats_of(kvm: Kvm, host: Host, emulates: bool) -> Callable[[TrackedVm], BinaryStats]:
    """Call it for the statistics of a VM that maps memory."""
    if emulates:
        pytest.skip(f"{host.backend} emulates each instruction of this guest, and maps no page")
    if not kvm.check_extension(uapi.KVM_CAP_BINARY_STATS_FD):
        pytest.skip("this KVM has no KVM_CAP_BINARY_STATS_FD")
    return lambda vm: BinaryStats(vm.vm.get_stats_fd())


def touched(vm: TrackedVm, layout: Layout) -> list[int]:
    """A page in each huge page, and in what the slot has of others: writing these maps all as large as KVM can."""
    whole = [page[100] for page in huge_pages(vm.vm.memslots[SLOT], layout.size)]
    return sorted({0, *whole, layout.npages - 1})


def edges(vm: TrackedVm, layout: Layout) -> list[int]:
    """The pages on both sides of each huge page's edge, and the slot's first and last."""
    starts = [page for huge in huge_pages(vm.vm.memslots[SLOT], 2 * MIB)[:3] for page in (huge[0], huge[-1] + 1)]
    return sorted(
        {0, layout.npages - 1, *(page + side for page in starts for side in (-1, 0))} & set(range(layout.npages))
    )


@pytest.mark.parametrize(
    ("log_mode", "layout", "guest_mode"),
    [*((*case, "48bit-4k") for case in CASES), *UNDER_LARGE_GUEST_PAGES],
    ids=str,
    indirect=["log_mode"],
)
def test_huge_pages_are_reported_page_by_page(
    make: Make, layout: Layout, guest_mode: str, settings: Settings, thorough: bool
) -> None:
    """Of memory that was mapped huge before tracking began, each page that is written, and no other; again and again."""
    with make(layout, guest_mode) as vm:
        check_reports(vm, layout, settings.seed, rounds=5 if thorough else 1)


def check_reports(vm: TrackedVm, layout: Layout, seed: int, rounds: int) -> None:
    """Map the slot huge, track it, write in patterns, and again after tracking was off."""
    vm.write(SLOT, *touched(vm, layout))
    vm.enable_dirty_logging(SLOT)
    first = huge_pages(vm.vm.memslots[SLOT], 2 * MIB)[0]
    chance = random.Random(seed)
    patterns = {
        "both sides of each edge": edges(vm, layout),
        "one page": [first[100]],
        "the same edges again": edges(vm, layout),
        "sparse ones": sorted(chance.sample(range(layout.npages), 20)),
        "a whole huge page and its neighbours": [page for page in range(first[0] - 1, first[-1] + 2) if page >= 0],
    }
    for _ in range(rounds):
        for what, pages in patterns.items():
            vm.write(SLOT, *pages)
            vm.assert_dirty(what, {SLOT: pages})
    vm.run(Operation("store_8", vm.address(SLOT, first[-1], PAGE - 4)))
    vm.assert_dirty("a store across the edge of a huge page", {SLOT: [first[-1], first[-1] + 1]})
    vm.disable_dirty_logging(SLOT)
    vm.write(SLOT, *edges(vm, layout))
    vm.enable_dirty_logging(SLOT)
    vm.assert_dirty("nothing since tracking began again", {})
    vm.write(SLOT, first[-1])
    vm.assert_dirty("a write into memory that may be mapped huge again", {SLOT: [first[-1]]})


@pytest.mark.parametrize(("log_mode", "layout"), CASES, ids=str, indirect=["log_mode"])
def test_split_when_tracked_and_merged_when_not(
    make: Make, stats_of: Callable[[TrackedVm], BinaryStats], host: Host, layout: Layout
) -> None:
    """Mapped huge until tracking begins, or the first CLEAR; then split, all at once or by writes; huge again after it."""
    with make(layout) as vm, stats_of(vm) as stats:
        check_sizes(vm, stats, host, layout)


def check_sizes(vm: TrackedVm, stats: BinaryStats, host: Host, layout: Layout) -> None:
    """Twice: map the slot huge, track it, write it, and have tracking end."""
    size = mapped_size(vm, host, layout)
    pages = touched(vm, layout)
    count = len(huge_pages(vm.vm.memslots[SLOT], size)) if size == layout.size else GIB // size
    for turn in range(2):
        vm.write(SLOT, *(pages if size == layout.size else range(0, layout.npages, size // PAGE)))
        huge = MappingSizes.read(stats)
        check_huge(huge, size, count, f"turn {turn}: untracked, touched")
        vm.enable_dirty_logging(SLOT, assert_initial=False)
        if vm.mode.initially_set:
            assert MappingSizes.read(stats) == huge, "no page has to be split before the first CLEAR"
            vm.assert_dirty("switching tracking on", {SLOT: range(layout.npages)})
        armed = MappingSizes.read(stats)
        if splits_eagerly(host):
            split = MappingSizes(huge.pages_4k + count * size // PAGE, 0, 0)
            assert armed == split, f"all {count} huge pages were to be split: {huge}, then {armed}"
        else:
            assert armed == huge, f"huge pages are to be split when they are written: {huge}, then {armed}"
        page = pages[1]
        vm.run(Operation("load", vm.address(SLOT, page)))
        vm.assert_dirty("a load", {})
        check_huge(MappingSizes.read(stats), size, armed.huge(size), "a load splits no huge page")
        vm.write(SLOT, page)
        vm.assert_dirty("a write", {SLOT: [page]})
        check_huge(
            MappingSizes.read(stats), size, 0 if splits_eagerly(host) else count - 1, "after a write into one of them"
        )
        vm.disable_dirty_logging(SLOT)


def mapped_size(vm: TrackedVm, host: Host, layout: Layout) -> int:
    """The size of the pages that KVM maps the slot with, while it is not tracked."""
    return layout.size if uses_tdp(host) else min(layout.size, vm.guest.guest_mode.page_size)


def check_huge(found: MappingSizes, size: int, count: int, when: str) -> None:
    """Hold KVM's statistics to *count* mapped pages of *size* bytes."""
    if found.huge(size) != count:
        raise violated(Kind.OTHER, f"{when}: {count} pages of {size_text(size)} were to be mapped, but it is {found}")


def test_memory_that_was_only_read_before(make: Make) -> None:
    """Mapped huge by loads alone: later loads are not reported, and the first store into each huge page is."""
    layout = two_mib("anonymous_thp", 3)
    with make(layout) as vm:
        pages = touched(vm, layout)
        loads = [Operation("load", vm.address(SLOT, page)) for page in pages]
        vm.run(*loads)
        vm.enable_dirty_logging(SLOT)
        vm.run(*loads)
        vm.assert_dirty("loads", {})
        vm.write(SLOT, *pages)
        vm.assert_dirty("stores", {SLOT: pages})


def test_memory_that_is_executed(make: Make) -> None:
    """Huge pages are split for it where kvm.nx_huge_pages is on; what is written in them is reported all the same."""
    layout = two_mib("anonymous_thp", 3)
    with make(layout) as vm:
        code, *_ = (page[100] for page in huge_pages(vm.vm.memslots[SLOT], layout.size))
        vm.write(SLOT, code, code + 1)
        vm.write(SLOT, code, value=RET)
        execute = Operation("execute", vm.address(SLOT, code))
        vm.run(execute)
        vm.enable_dirty_logging(SLOT)
        vm.run(execute)
        vm.assert_dirty("an execution", {})
        # Both first: where a write drops a huge page and maps one small page, the next access to another one is a fault,
        # which maps it writable where it may, and reports it, whatever the access was (make_spte(), arch/x86/kvm/mmu/spte.c).
        for pages in ([code, code + 1], [code + 1], [code]):
            vm.write(SLOT, *pages, value=RET)
            vm.run(execute)
            vm.assert_dirty("stores and an execution", {SLOT: pages})


@pytest.mark.parametrize("backing", TWO_MIB_BACKINGS)
@pytest.mark.log_modes("clear")
def test_a_clear_at_a_huge_page_edge(make: Make, backing: str, thorough: bool) -> None:
    """Whichever pages a CLEAR names at the edge of a huge page: their next writes are seen, the others' bits stay."""
    for shift in range(64) if thorough else EDGE_SHIFTS:
        with make(two_mib(backing, shift)) as vm:
            edge = huge_pages(vm.vm.memslots[SLOT], 2 * MIB)[1][0]
            for mask in masks_at(edge):
                # That case has a test of its own, below.
                if not (vm.mode.initially_set and ends_on_first_page(mask, edge)):
                    check_clear(vm, mask, f"base gfn {shift} pages into a huge page, CLEAR of {mask}")


@pytest.mark.log_modes("clear")
def test_a_clear_within_a_page_of_1_gib(make: Make) -> None:
    """It is split for this CLEAR at the latest: the next writes to its pages are seen, and the others' bits stay."""
    with make(ONE_GIB) as vm:
        check_clear(vm, [511, 512], "CLEAR of both sides of a 2 MiB edge")


@pytest.mark.log_modes("clear-log")
@pytest.mark.parametrize("backing", TWO_MIB_BACKINGS)
def test_a_clear_that_ends_on_the_first_page_of_a_huge_page(make: Make, backing: str, thorough: bool) -> None:
    """When it also names pages of the same word that lie in the huge page before: that first page is tracked too."""
    for shift in range(64) if thorough else EDGE_SHIFTS:
        with make(two_mib(backing, shift)) as vm:
            edge = huge_pages(vm.vm.memslots[SLOT], 2 * MIB)[1][0]
            for mask in filter(lambda mask: ends_on_first_page(mask, edge), masks_at(edge)):
                check_clear(vm, mask, f"base gfn {shift} pages into a huge page, CLEAR of {mask}")


@pytest.mark.log_modes("clear-log")
@pytest.mark.parametrize("later", [MANUAL, 0], ids=["not-initially-set", "automatic"])
def test_all_set_at_first_and_collected_otherwise(make: Make, later: int) -> None:
    """Where all bits were set at first, what takes a page's bit tracks it, also when the VM's mode was changed before."""
    with make(two_mib("anonymous_thp", 3)) as vm:
        pages = touched(vm, two_mib("anonymous_thp", 3))
        vm.write(SLOT, *pages)
        vm.enable_dirty_logging(SLOT, assert_initial=False)
        vm.vm.enable_cap(uapi.KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, later)
        vm.assert_dirty("switching tracking on", {SLOT: range(vm.vm.memslots[SLOT].npages)})
        vm.write(SLOT, *pages)
        vm.assert_dirty("writes into memory that was mapped huge", {SLOT: pages})


def ends_on_first_page(mask: list[int], edge: int) -> bool:
    """Whether *edge* is the last page of its word in *mask*, and not the first."""
    word = [page for page in mask if page // 64 == edge // 64]
    return bool(word) and min(word) < max(word) == edge


def masks_at(edge: int) -> list[list[int]]:
    """Pages of one word of the bitmap, or of two, around the page *edge*."""
    word = edge // 64 * 64
    candidates = (
        [edge], [edge - 1], [edge - 1, edge], [edge, edge + 1], [edge - 2, edge], [edge - 64, edge], [edge - 1, edge + 1],
        list(range(word, word + 64)), list(range(word, edge + 1)), list(range(edge, word + 64)), [word, word + 63],
    )  # fmt: skip
    return [mask for index, mask in enumerate(candidates) if mask and mask not in candidates[:index]]


def check_clear(vm: TrackedVm, mask: list[int], what: str) -> None:
    """From huge mappings and a slot that is dirty around *mask*: clear these pages, and write them."""
    memslot = vm.vm.memslots[SLOT]
    first = min(mask) // 64 * 64
    count = min(memslot.npages, (max(mask) // 64 + 1) * 64) - first
    vm.disable_dirty_logging(SLOT)
    vm.write(SLOT, *(page[100] for page in huge_pages(memslot, 2 * MIB)))
    vm.enable_dirty_logging(SLOT, assert_initial=False)
    around = list(range(first, first + count))
    if not vm.mode.initially_set:
        vm.write(SLOT, *around)
    dirty = list(range(memslot.npages)) if vm.mode.initially_set else around
    vm.vm.clear_dirty_log(SLOT, bitmap_of(mask, count, first), first, count)
    vm.assert_bitmap(f"{what}: left after it", SLOT, set(dirty) - set(mask))
    vm.write(SLOT, *mask)
    vm.assert_bitmap(f"{what}: its pages written", SLOT, dirty)
