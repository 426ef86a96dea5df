# SPDX-License-Identifier: GPL-2.0-only
"""What the tests of huge pages share: memslots in huge pages of the host, and checks of their reports and mappings."""

import random
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

from dirty_tracking.mapping_sizes import MappingSizes, huge_pages
from dirty_tracking.platform import splits_eagerly, uses_tdp
from dirty_tracking.scripted_vm import Operation, ScriptedVm
from dirty_tracking.violations import Kind, violated
from dirty_tracking.vm import FIRST_GPA, PAGE
from kvm_util.arch import current as arch
from kvm_util.binary_stats import BinaryStats
from kvm_util.host import Host
from kvm_util.kvm import Kvm
from kvm_util.memory import BACKINGS, GIB, HUGE_PAGE_SIZE, size_text

SLOT = 1


@dataclass(frozen=True)
class Layout:
    """A memslot's backing and place; *size* is that of the largest pages that KVM can map it with, in bytes."""

    backing: str
    gpa: int
    npages: int
    size: int

    def __str__(self) -> str:
        return f"{self.backing}+{self.gpa % self.size // PAGE}"


def few_huge_pages(backing: str, shift: int) -> Layout:
    """Three huge pages and a part of one, or two and two parts; the base gfn is *shift* pages into a huge page."""
    size = BACKINGS[backing].page_size
    return Layout(backing, FIRST_GPA + shift * PAGE, 3 * size // PAGE + 7, size)


MakeHugeVm = Callable[..., AbstractContextManager[ScriptedVm]]
OpenStats = Callable[[ScriptedVm], BinaryStats]


def huge_guest_mode(kvm: Kvm, host: Host, layout: Layout) -> str:
    """The guest mode in which KVM maps *layout* huge: shadow page tables have pages no larger than the guest's own."""
    if uses_tdp(host):
        return "48bit-4k"
    if layout.size == GIB and not arch.GUEST_MODES["48bit-1g"].missing(kvm):
        return "48bit-1g"
    return "48bit-2m"


def inside(huge: range) -> int:
    """A page in a huge page, at neither of its ends."""
    return huge[len(huge) // 5]


def touched(vm: ScriptedVm, layout: Layout) -> list[int]:
    """A page in each huge page, and the memslot's first and last: writes to these map the memslot as huge as KVM can."""
    whole = [inside(page) for page in huge_pages(vm.vm.memslots[SLOT], layout.size)]
    return sorted({0, *whole, layout.npages - 1})


def edges(vm: ScriptedVm, layout: Layout) -> list[int]:
    """The pages on both sides of each huge page's boundaries, and the memslot's first and last."""
    starts = [page for huge in huge_pages(vm.vm.memslots[SLOT], HUGE_PAGE_SIZE)[:3] for page in (huge[0], huge[-1] + 1)]
    return sorted(
        {0, layout.npages - 1, *(page + side for page in starts for side in (-1, 0))} & set(range(layout.npages))
    )


def check_reports(vm: ScriptedVm, layout: Layout, seed: int, rounds: int) -> None:
    """Map the memslot huge, enable dirty logging and write in patterns; then disable and enable it, and write again."""
    vm.write(SLOT, *touched(vm, layout))
    vm.enable_dirty_logging(SLOT)
    first = huge_pages(vm.vm.memslots[SLOT], HUGE_PAGE_SIZE)[0]
    rng = random.Random(seed)
    patterns = {
        "both sides of each huge page boundary": edges(vm, layout),
        "one page": [inside(first)],
        "the same boundaries again": edges(vm, layout),
        "sparse pages": sorted(rng.sample(range(layout.npages), 20)),
        "a whole huge page and its neighbours": [page for page in range(first[0] - 1, first[-1] + 2) if page >= 0],
    }
    for _ in range(rounds):
        for what, pages in patterns.items():
            vm.write(SLOT, *pages)
            vm.assert_dirty(what, {SLOT: pages})
    vm.run(Operation("store_8", vm.address(SLOT, first[-1], PAGE - 4)))
    vm.assert_dirty("a store across the boundary of a huge page", {SLOT: [first[-1], first[-1] + 1]})
    vm.disable_dirty_logging(SLOT)
    vm.write(SLOT, *edges(vm, layout))
    vm.enable_dirty_logging(SLOT)
    vm.assert_dirty("nothing since dirty logging was enabled again", {})
    vm.write(SLOT, first[-1])
    vm.assert_dirty("a write into memory that may be mapped huge again", {SLOT: [first[-1]]})


def check_sizes(vm: ScriptedVm, stats: BinaryStats, host: Host, layout: Layout) -> None:
    """Twice: map the memslot huge, enable dirty logging, write, and disable it."""
    size = mapped_size(vm, host, layout)
    pages = touched(vm, layout)
    count = len(huge_pages(vm.vm.memslots[SLOT], size)) if size == layout.size else GIB // size
    for round_number in range(2):
        vm.write(SLOT, *(pages if size == layout.size else range(0, layout.npages, size // PAGE)))
        huge = MappingSizes.read(stats)
        check_huge(huge, size, count, f"round {round_number}: touched, without dirty logging")
        vm.enable_dirty_logging(SLOT, assert_initial=False)
        if vm.mode.initially_set:
            assert MappingSizes.read(stats) == huge, "a page was split before the first CLEAR"
            vm.assert_dirty("enabling dirty logging", {SLOT: range(layout.npages)})
        logged = MappingSizes.read(stats)
        if splits_eagerly(host):
            split = dict.fromkeys(huge.counts, 0) | {PAGE: huge.counts[PAGE] + count * size // PAGE}
            assert logged.counts == split, f"all {count} huge pages must be split: {huge}, then {logged}"
        else:
            assert logged == huge, f"huge pages must not be split before they are written: {huge}, then {logged}"
        page = pages[1]
        vm.run(Operation("load", vm.address(SLOT, page)))
        vm.assert_dirty("a load", {})
        check_huge(MappingSizes.read(stats), size, logged.counts[size], "after a load")
        vm.write(SLOT, page)
        vm.assert_dirty("a write", {SLOT: [page]})
        check_huge(
            MappingSizes.read(stats), size, 0 if splits_eagerly(host) else count - 1, "after a write into one of them"
        )
        vm.disable_dirty_logging(SLOT)


def mapped_size(vm: ScriptedVm, host: Host, layout: Layout) -> int:
    """The size of the pages that KVM maps the memslot with, while dirty logging is disabled."""
    return layout.size if uses_tdp(host) else min(layout.size, vm.guest.guest_mode.page_size)


def check_huge(found: MappingSizes, size: int, count: int, when: str) -> None:
    """Check that KVM has *count* mappings of *size* bytes."""
    if found.counts[size] != count:
        raise violated(Kind.OTHER, f"{when}: {count} mappings of {size_text(size)} expected, found {found}")
