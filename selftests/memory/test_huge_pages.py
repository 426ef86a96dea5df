# SPDX-License-Identifier: GPL-2.0-only
"""Memory in huge pages is logged by base pages, split while dirty logging is enabled, and mapped huge before and after."""

import pytest

from dirty_tracking.bitmap import bitmap_of
from dirty_tracking.cell import Settings
from dirty_tracking.mapping_sizes import huge_pages
from dirty_tracking.modes import LOG_MODES
from dirty_tracking.scripted_vm import Operation, ScriptedVm
from dirty_tracking.vm import PAGE
from kvm_util import uapi
from kvm_util.arch import current as arch
from kvm_util.host import Host
from kvm_util.memory import GIB, HUGE_PAGE_SIZE, MIB
from selftests.memory.huge_memory import (
    SLOT,
    Layout,
    MakeHugeVm,
    OpenStats,
    check_reports,
    check_sizes,
    few_huge_pages,
    inside,
    touched,
)

MANUAL = uapi.KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE


def within_one_gib(shift: int) -> Layout:
    """A part of a page of 1 GiB, which KVM can map with smaller huge pages only."""
    return Layout("anonymous_hugetlb_1gb", 2 * GIB + shift * PAGE, 3 * HUGE_PAGE_SIZE // PAGE + 7, HUGE_PAGE_SIZE)


ONE_GIB = Layout("anonymous_hugetlb_1gb", 2 * GIB, GIB // PAGE, GIB)
SMALL_LAYOUTS = [
    few_huge_pages("anonymous_thp", 0),
    few_huge_pages("anonymous_thp", 3),
    few_huge_pages("anonymous_hugetlb_2mb", 0),
    few_huge_pages("anonymous_hugetlb_2mb", 2 * MIB // PAGE - 1),
    few_huge_pages("shmem_thp", 3),
    few_huge_pages("shared_hugetlb_2mb", 2 * MIB // PAGE - 1),
]
# Clearing a page of 1 GiB takes long where the backend emulates, so only some modes have it.
CASES = [
    *((mode, layout) for mode in LOG_MODES for layout in SMALL_LAYOUTS),
    ("clear-log", ONE_GIB),
    ("dirty-ring", ONE_GIB),
    ("dirty-log", within_one_gib(3)),
]
HUGE_BACKINGS = ["anonymous_thp", "anonymous_hugetlb_2mb"]
UNDER_LARGE_GUEST_PAGES = [(mode, few_huge_pages("anonymous_thp", 3), "48bit-2m") for mode in LOG_MODES]
# The base gfn decides which page of a word of the bitmap is the first of a huge page; with a shift of 1 the last one is.
EDGE_SHIFTS = (0, 1, 3, 63)


@pytest.mark.parametrize(
    ("log_mode", "layout", "guest_mode"),
    [*((*case, "48bit-4k") for case in CASES), *UNDER_LARGE_GUEST_PAGES],
    ids=str,
    indirect=["log_mode"],
)
def test_huge_pages_logged_by_base_pages(
    make_huge_vm: MakeHugeVm, layout: Layout, guest_mode: str, settings: Settings, thorough: bool
) -> None:
    """In memory that was mapped huge when dirty logging was enabled, exactly the written base pages are reported."""
    with make_huge_vm(layout, guest_mode) as vm:
        check_reports(vm, layout, settings.seed, rounds=5 if thorough else 1)


@pytest.mark.parametrize(("log_mode", "layout"), CASES, ids=str, indirect=["log_mode"])
def test_huge_page_split_and_recovery(
    make_huge_vm: MakeHugeVm, open_stats: OpenStats, host: Host, layout: Layout
) -> None:
    """Huge mappings are split when dirty logging is enabled (or at the first CLEAR or write), and come back when it ends."""
    with make_huge_vm(layout) as vm, open_stats(vm) as stats:
        check_sizes(vm, stats, host, layout)


def test_huge_pages_mapped_by_loads(make_huge_vm: MakeHugeVm) -> None:
    """In memory that only loads have mapped huge, later loads are not logged, and the first store to each huge page is."""
    layout = few_huge_pages("anonymous_thp", 3)
    with make_huge_vm(layout) as vm:
        pages = touched(vm, layout)
        loads = [Operation("load", vm.address(SLOT, page)) for page in pages]
        vm.run(*loads)
        vm.enable_dirty_logging(SLOT)
        vm.run(*loads)
        vm.assert_dirty("loads", {})
        vm.write(SLOT, *pages)
        vm.assert_dirty("stores", {SLOT: pages})


def test_huge_pages_with_executed_code(make_huge_vm: MakeHugeVm) -> None:
    """Writes to huge pages that hold executed code are logged, also where kvm.nx_huge_pages splits them."""
    layout, ret = few_huge_pages("anonymous_thp", 3), int.from_bytes(arch.RETURN_INSTRUCTION, "little")
    with make_huge_vm(layout) as vm:
        code, *_ = (inside(page) for page in huge_pages(vm.vm.memslots[SLOT], layout.size))
        vm.write(SLOT, code, code + 1)
        vm.write(SLOT, code, value=ret)
        execute = Operation("execute", vm.address(SLOT, code))
        vm.run(execute)
        vm.enable_dirty_logging(SLOT)
        vm.run(execute)
        vm.assert_dirty("an execution", {})
        # Both pages first: where a write zaps a huge page and maps one small page, the next access to another small page
        # faults. Whatever the access is, KVM maps that page writable and logs it (make_spte(), arch/x86/kvm/mmu/spte.c).
        for pages in ([code, code + 1], [code + 1], [code]):
            vm.write(SLOT, *pages, value=ret)
            vm.run(execute)
            vm.assert_dirty("stores and an execution", {SLOT: pages})


@pytest.mark.parametrize("backing", HUGE_BACKINGS)
@pytest.mark.log_modes("clear")
def test_clear_around_huge_page_boundary(make_huge_vm: MakeHugeVm, backing: str, thorough: bool) -> None:
    """CLEAR of any pages around a huge page's boundary: their next writes are logged, and the other pages stay dirty."""
    for shift in range(64) if thorough else EDGE_SHIFTS:
        with make_huge_vm(few_huge_pages(backing, shift)) as vm:
            edge = huge_pages(vm.vm.memslots[SLOT], HUGE_PAGE_SIZE)[1][0]
            for mask in masks_at(edge):
                # test_clear_ending_on_huge_page_start() has that case.
                if not (vm.mode.initially_set and ends_on_first_page(mask, edge)):
                    check_clear(vm, mask, f"base gfn {shift} pages into a huge page, CLEAR of {mask}")


@pytest.mark.log_modes("clear")
def test_clear_within_1g_page(make_huge_vm: MakeHugeVm) -> None:
    """CLEAR of two pages in a 1 GiB mapping splits it: their next writes are logged, and the other pages stay dirty."""
    with make_huge_vm(ONE_GIB) as vm:
        edge = HUGE_PAGE_SIZE // PAGE
        check_clear(vm, [edge - 1, edge], "CLEAR of both sides of a smaller huge page's boundary")


@pytest.mark.log_modes("clear-log")
@pytest.mark.parametrize("backing", HUGE_BACKINGS)
def test_clear_ending_on_huge_page_start(make_huge_vm: MakeHugeVm, backing: str, thorough: bool) -> None:
    """A CLEAR whose bitmap word ends on the first page of the next huge page write-protects that page, too."""
    for shift in range(64) if thorough else EDGE_SHIFTS:
        with make_huge_vm(few_huge_pages(backing, shift)) as vm:
            edge = huge_pages(vm.vm.memslots[SLOT], HUGE_PAGE_SIZE)[1][0]
            for mask in filter(lambda mask: ends_on_first_page(mask, edge), masks_at(edge)):
                check_clear(vm, mask, f"base gfn {shift} pages into a huge page, CLEAR of {mask}")


@pytest.mark.log_modes("clear-log")
@pytest.mark.parametrize("later", [MANUAL, 0], ids=["not-initially-set", "automatic"])
def test_initially_set_then_capability_changed(make_huge_vm: MakeHugeVm, later: int) -> None:
    """With INITIALLY_SET, clearing a page's bit write-protects it, even if the VM's manual protection changed in between."""
    with make_huge_vm(few_huge_pages("anonymous_thp", 3)) as vm:
        pages = touched(vm, few_huge_pages("anonymous_thp", 3))
        vm.write(SLOT, *pages)
        vm.enable_dirty_logging(SLOT, assert_initial=False)
        vm.vm.enable_cap(uapi.KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, later)
        vm.assert_dirty("enabling dirty logging", {SLOT: range(vm.vm.memslots[SLOT].npages)})
        vm.write(SLOT, *pages)
        vm.assert_dirty("writes into memory that was mapped huge", {SLOT: pages})


def ends_on_first_page(mask: list[int], edge: int) -> bool:
    """Whether *edge* is the last page of its word in *mask*, and not the first."""
    word = [page for page in mask if page // 64 == edge // 64]
    return bool(word) and min(word) < max(word) == edge


def masks_at(edge: int) -> list[list[int]]:
    """Sets of pages of one word of the bitmap, or of two, around the page *edge*."""
    word = edge // 64 * 64
    candidates = (
        [edge], [edge - 1], [edge - 1, edge], [edge, edge + 1], [edge - 2, edge], [edge - 64, edge], [edge - 1, edge + 1],
        list(range(word, word + 64)), list(range(word, edge + 1)), list(range(edge, word + 64)), [word, word + 63],
    )  # fmt: skip
    return [mask for index, mask in enumerate(candidates) if mask and mask not in candidates[:index]]


def check_clear(vm: ScriptedVm, mask: list[int], what: str) -> None:
    """Clear the pages of *mask* in a memslot that is mapped huge and dirty around them, and write them again."""
    memslot = vm.vm.memslots[SLOT]
    first = min(mask) // 64 * 64
    count = min(memslot.npages, (max(mask) // 64 + 1) * 64) - first
    vm.disable_dirty_logging(SLOT)
    vm.write(SLOT, *(inside(page) for page in huge_pages(memslot, HUGE_PAGE_SIZE)))
    vm.enable_dirty_logging(SLOT, assert_initial=False)
    around = list(range(first, first + count))
    if not vm.mode.initially_set:
        vm.write(SLOT, *around)
    dirty = list(range(memslot.npages)) if vm.mode.initially_set else around
    vm.vm.clear_dirty_log(SLOT, bitmap_of(mask, count, first), first, count)
    vm.assert_bitmap(f"{what}: still dirty", SLOT, set(dirty) - set(mask))
    vm.write(SLOT, *mask)
    vm.assert_bitmap(f"{what}: its pages written", SLOT, dirty)
