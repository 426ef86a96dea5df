# SPDX-License-Identifier: GPL-2.0-only
"""The checks of test_write_protection.py and test_huge_pages.py fail when an answer of real KVM is falsified."""

import random
from collections.abc import Callable
from typing import Any

import pytest

from dirty_tracking.mapping_sizes import MappingSizes, huge_pages
from dirty_tracking.modes import LOG_MODES
from dirty_tracking.ring import DirtyRing
from dirty_tracking.scripted_vm import ScriptedVm
from dirty_tracking.violations import ContractViolation
from dirty_tracking.vm import FIRST_GPA, PAGE
from kvm_util.binary_stats import BinaryStats
from kvm_util.host import Host
from kvm_util.kvm import Kvm
from kvm_util.memory import GIB, MIB
from kvm_util.vm import Vm
from selftests.memory import test_huge_pages, test_write_protection

SLOT = test_huge_pages.SLOT
RING_MODES = [name for name, mode in LOG_MODES.items() if mode.uses_ring]
# Base pages will do where the mapping does not matter, only the edges.
LAYOUT = test_huge_pages.Layout("anonymous", FIRST_GPA + 3 * PAGE, 3 * 512 + 7, 2 * MIB)
EDGE = 512 - 3
NPAGES = 129


@pytest.fixture
def chance() -> random.Random:
    return random.Random(1)


def vm_for(kvm: Kvm, mode: str) -> ScriptedVm:
    return ScriptedVm(kvm, mode, vcpus=2)


def falsify_reports(patch: pytest.MonkeyPatch, change: Callable[[int], int | None], first: int = 0) -> None:
    """Replace each reported page by what *change* returns, or drop it if that is None; from report *first* on."""
    honest_get, honest_harvest = Vm.get_dirty_log, DirtyRing.harvest
    reports = [0]

    def get(vm: Vm, slot: int, bitmap: bytearray) -> None:
        honest_get(vm, slot, bitmap)
        reports[0] += 1
        if reports[0] <= first:
            return
        pages = [page for page in range(len(bitmap) * 8) if bitmap[page // 8] >> page % 8 & 1]
        bitmap[:] = bytes(len(bitmap))
        for page in map(change, pages):
            if page is not None:
                bitmap[page // 8] |= 1 << page % 8

    def harvest(ring: DirtyRing) -> tuple[list[int], list[int]]:
        slots, offsets = honest_harvest(ring)
        reports[0] += 1
        if reports[0] <= first:
            return slots, offsets
        changed = [new for page in offsets if (new := change(page)) is not None]
        return slots[: len(changed)], changed

    patch.setattr(Vm, "get_dirty_log", get)
    patch.setattr(DirtyRing, "harvest", harvest)


@pytest.mark.parametrize("page", [EDGE - 1, EDGE, EDGE + 511, EDGE + 512, LAYOUT.npages - 1])
@pytest.mark.mutants
def test_report_off_by_one_at_huge_page_edge(
    kvm: Kvm, monkeypatch: pytest.MonkeyPatch, log_mode: str, page: int
) -> None:
    """A page at the edge of a huge page that is reported as the next one fails the test of huge pages."""
    with vm_for(kvm, log_mode) as vm:
        vm.add_slot(SLOT, LAYOUT.gpa, LAYOUT.npages, logged=False)
        falsify_reports(monkeypatch, lambda found: found + 1 if found == page else found)
        with pytest.raises(ContractViolation):
            test_huge_pages.check_reports(vm, LAYOUT, seed=1, rounds=1)


@pytest.mark.parametrize("page", [0, 63, 64, NPAGES - 1])
@pytest.mark.parametrize("first", [2, 9])
@pytest.mark.log_modes("bitmap")
@pytest.mark.mutants
def test_page_left_writable(
    kvm: Kvm,
    monkeypatch: pytest.MonkeyPatch,
    chance: random.Random,
    log_mode: str,
    first: int,
    page: int,
) -> None:
    """A page that is not write-protected, from the start or from a later collection on, is LOST."""
    with vm_for(kvm, log_mode) as vm:
        falsify_reports(monkeypatch, lambda found: None if found == page else found, first)
        with pytest.raises(ContractViolation, match="LOST"):
            test_write_protection.check_slot(vm, FIRST_GPA, NPAGES, chance)


@pytest.mark.log_modes("ring")
@pytest.mark.mutants
def test_entry_of_the_next_page(
    kvm: Kvm, monkeypatch: pytest.MonkeyPatch, chance: random.Random, log_mode: str
) -> None:
    """A ring entry that names a page's neighbour makes the page LOST."""
    with vm_for(kvm, log_mode) as vm:
        falsify_reports(monkeypatch, lambda found: 62 if found == 63 else found)
        with pytest.raises(ContractViolation, match=r"LOST.*: page 63"):
            test_write_protection.check_slot(vm, FIRST_GPA, NPAGES, chance)


@pytest.mark.mutants
def test_stale_translation_of_a_vcpu(kvm: Kvm, monkeypatch: pytest.MonkeyPatch, log_mode: str) -> None:
    """A vCPU whose writes are never logged, as by a stale writable translation, fails the test of TLB flushes."""
    honest = ScriptedVm.write

    def write(vm: ScriptedVm, slot: int, *pages: int, vcpu: int = 0, value: int = 1) -> None:
        if vcpu == 0:
            honest(vm, slot, *pages, value=value)

    monkeypatch.setattr(ScriptedVm, "write", write)
    with vm_for(kvm, log_mode) as vm, pytest.raises(ContractViolation, match="vCPU 1 wrote after the other"):
        test_write_protection.test_tlb_flush_reaches_every_vcpu(vm, thorough=False)


@pytest.fixture
def skipping_clear(monkeypatch: pytest.MonkeyPatch) -> None:
    """CLEAR skips the first page of its mask."""
    honest = Vm.clear_dirty_log

    def clear(vm: Vm, slot: int, bitmap: bytearray, first_page: int, num_pages: int) -> None:
        index = next((index for index, byte in enumerate(bitmap) if byte), None)
        if index is not None:
            bitmap = bitmap.copy()
            bitmap[index] &= bitmap[index] - 1
        honest(vm, slot, bitmap, first_page, num_pages)

    monkeypatch.setattr(Vm, "clear_dirty_log", clear)


@pytest.fixture
def unprotecting_clear(monkeypatch: pytest.MonkeyPatch) -> None:
    """CLEAR does not write-protect the last page of its mask: later writes to it are not logged."""
    honest_clear, honest_get = Vm.clear_dirty_log, Vm.get_dirty_log
    unprotected: list[int] = []

    def clear(vm: Vm, slot: int, bitmap: bytearray, first_page: int, num_pages: int) -> None:
        honest_clear(vm, slot, bitmap, first_page, num_pages)
        unprotected[:] = [first_page + page for page in range(num_pages) if bitmap[page // 8] >> page % 8 & 1][-1:]

    def get(vm: Vm, slot: int, bitmap: bytearray) -> None:
        honest_get(vm, slot, bitmap)
        for page in unprotected:
            bitmap[page // 8] &= ~(1 << page % 8)

    monkeypatch.setattr(Vm, "clear_dirty_log", clear)
    monkeypatch.setattr(Vm, "get_dirty_log", get)


@pytest.mark.parametrize(
    ("fault", "message"), [("skipping_clear", "SPURIOUS"), ("unprotecting_clear", r"LOST .*: pages? \d")]
)
@pytest.mark.log_modes("clear-log-unset")
@pytest.mark.mutants
def test_clear_that_skips_a_page(
    kvm: Kvm,
    request: pytest.FixtureRequest,
    chance: random.Random,
    fault: str,
    message: str,
) -> None:
    """A CLEAR that skips a page of its mask fails, anywhere and with each mask at a huge page's edge."""
    with vm_for(kvm, "clear-log-unset") as vm:
        vm.add_slot(SLOT, LAYOUT.gpa, LAYOUT.npages)
        test_huge_pages.check_clear(vm, [EDGE], "sound")
        request.getfixturevalue(fault)
        for mask in test_huge_pages.masks_at(EDGE):
            with pytest.raises(ContractViolation, match=message):
                test_huge_pages.check_clear(vm, mask, "falsified")
        vm.remove_slot(SLOT)
        vm.add_slot(SLOT, LAYOUT.gpa, NPAGES)
        with pytest.raises(ContractViolation, match=message):
            test_write_protection.check_clear(vm, chance, "falsified")


def test_masks_at_a_huge_page_edge() -> None:
    """Some masks end on a huge page's first page and some do not; at the start of a word none can."""
    kinds = [
        [test_huge_pages.ends_on_first_page(mask, edge) for mask in test_huge_pages.masks_at(edge)]
        for edge in (511, 512)
    ]
    assert [any(kind) for kind in kinds] == [True, False]
    assert not all(kinds[0])


@pytest.mark.parametrize("found", [1, 3, 0])
def test_wrong_number_of_huge_pages(found: int) -> None:
    """More or fewer huge mappings than expected are a violation."""
    test_huge_pages.check_huge(MappingSizes({2 * MIB: 2}), 2 * MIB, 2, "sound")
    with pytest.raises(ContractViolation, match="2 mappings of 2 MiB expected, found"):
        test_huge_pages.check_huge(MappingSizes({2 * MIB: found}), 2 * MIB, 2, "falsified")


@pytest.mark.parametrize("call", range(1, 5))
@pytest.mark.log_modes("dirty-log", "clear-log")
@pytest.mark.mutants
def test_falsified_statistics(
    make_huge_vm: Any, open_stats: Any, host: Host, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    """One huge page too many in any of KVM's statistics fails the test of huge pages."""
    honest, calls = MappingSizes.read, [0]

    def falsified(stats: BinaryStats) -> MappingSizes:
        calls[0] += 1
        found = honest(stats)
        return MappingSizes(found.counts | {2 * MIB: found.counts[2 * MIB] + (calls[0] == call)})

    monkeypatch.setattr(MappingSizes, "read", falsified)
    layout = test_huge_pages.few_huge_pages("anonymous_thp", 3)
    with make_huge_vm(layout) as vm, open_stats(vm) as stats, pytest.raises((ContractViolation, AssertionError)):
        test_huge_pages.check_sizes(vm, stats, host, layout)


make_huge_vm, open_stats = test_huge_pages.make_huge_vm, test_huge_pages.open_stats


@pytest.mark.parametrize(("shift", "size", "expected"), [(0, 2 * MIB, 3), (1, 2 * MIB, 2), (0, GIB, 0)])
def test_huge_pages_of_a_slot(kvm: Kvm, shift: int, size: int, expected: int) -> None:
    """The huge pages of a memslot lie in it as a whole, at gpas that are multiples of their size."""
    with vm_for(kvm, "dirty-log") as vm:
        memslot = vm.add_slot(SLOT, FIRST_GPA + shift * PAGE, LAYOUT.npages)
        found = huge_pages(memslot, size)
        assert len(found) == expected
        assert all(len(page) * PAGE == size and (memslot.gpa + page[0] * PAGE) % size == 0 for page in found)
