# SPDX-License-Identifier: GPL-2.0-only
"""The checks of test_write_protection.py and of the tests of huge pages fail when an answer of real KVM is falsified."""

import random
from itertools import count
from typing import Any

import pytest

from dirty_tracking.mapping_sizes import MappingSizes, huge_pages
from dirty_tracking.modes import LogMode
from dirty_tracking.report import DirtyReport, Source
from dirty_tracking.scripted_vm import ScriptedVm
from dirty_tracking.violations import ContractViolation
from dirty_tracking.vm import FIRST_GPA, PAGE
from kvm_util.binary_stats import BinaryStats
from kvm_util.host import Host
from kvm_util.kvm import Kvm
from kvm_util.memory import GIB, MIB
from selftests.memory import conftest, huge_memory, test_huge_pages, test_write_protection
from selftests.unit.mutants.catalogue import MUTANTS
from selftests.unit.mutants.faults import falsify_pages

SLOT = huge_memory.SLOT
# Base pages will do where the mapping does not matter, only the edges.
LAYOUT = huge_memory.Layout("anonymous", FIRST_GPA + 3 * PAGE, 3 * 512 + 7, 2 * MIB)
EDGE = 512 - 3
NPAGES = 129


def falsify_page(patch: pytest.MonkeyPatch, page: int, *instead: int, first: int = 0) -> None:
    """From report *first* on, have *page* reported as the pages *instead*."""
    reports = count()

    def change(pages: list[int]) -> list[int]:
        wrong = next(reports) >= first and page in pages
        return sorted([other for other in pages if other != page] + list(instead)) if wrong else pages

    falsify_pages(patch, change)


@pytest.mark.parametrize("page", [EDGE - 1, EDGE, EDGE + 511, EDGE + 512, LAYOUT.npages - 1])
@pytest.mark.mutants
def test_report_off_by_one_at_huge_page_edge(
    kvm: Kvm, monkeypatch: pytest.MonkeyPatch, log_mode: str, page: int
) -> None:
    """A page at the edge of a huge page that is reported as the next one fails the test of huge pages."""
    with ScriptedVm(kvm, log_mode, vcpus=2) as vm:
        vm.add_slot(SLOT, LAYOUT.gpa, LAYOUT.npages, logged=False)
        falsify_page(monkeypatch, page, page + 1)
        with pytest.raises(ContractViolation):
            huge_memory.check_reports(vm, LAYOUT, seed=1, rounds=1)


@pytest.mark.parametrize(("backing", "entries"), [("anonymous", 1), ("anonymous_thp", 2)])
@pytest.mark.mutants
def test_ring_entries_of_a_write_with_pml(
    kvm: Kvm, monkeypatch: pytest.MonkeyPatch, backing: str, entries: int
) -> None:
    """With PML a page may have two ring entries a write if its memory is in huge pages, else one; one more is DUPLICATE."""
    monkeypatch.setattr(LogMode, "has_cpu_logs", True)
    with ScriptedVm(kvm, "dirty-log") as vm:
        vm.add_slot(SLOT, LAYOUT.gpa, LAYOUT.npages, backing)

        def assert_written(count: int) -> None:
            report = DirtyReport([Source([SLOT] * count, [EDGE] * count, vcpu=0)])
            vm.assert_report("a write", {SLOT: [EDGE]}, report)

        assert_written(entries)
        with pytest.raises(ContractViolation, match="DUPLICATE"):
            assert_written(entries + 1)


@pytest.mark.parametrize("page", [0, 63, 64, NPAGES - 1])
@pytest.mark.parametrize("first", [2, 9])
@pytest.mark.mutants
def test_page_left_writable(kvm: Kvm, monkeypatch: pytest.MonkeyPatch, log_mode: str, first: int, page: int) -> None:
    """A page that is not write-protected, from the start or from a later collection on, is LOST."""
    with ScriptedVm(kvm, log_mode, vcpus=2) as vm:
        falsify_page(monkeypatch, page, first=first)
        with pytest.raises(ContractViolation, match=rf"LOST.*: page {page}\b"):
            test_write_protection.check_slot(vm, FIRST_GPA, NPAGES, random.Random(1))


@pytest.mark.mutants
def test_stale_translation_of_a_vcpu(kvm: Kvm, monkeypatch: pytest.MonkeyPatch, log_mode: str) -> None:
    """A vCPU whose writes are never logged, as by a stale writable translation, fails the test of TLB flushes."""
    honest = ScriptedVm.write

    def write(vm: ScriptedVm, slot: int, *pages: int, vcpu: int = 0, value: int = 1) -> None:
        if vcpu == 0:
            honest(vm, slot, *pages, value=value)

    monkeypatch.setattr(ScriptedVm, "write", write)
    with (
        ScriptedVm(kvm, log_mode, vcpus=2) as vm,
        pytest.raises(ContractViolation, match="vCPU 1 wrote after the other"),
    ):
        test_write_protection.test_tlb_flush_reaches_every_vcpu(vm, thorough=False)


@pytest.mark.parametrize(
    ("mutant", "message"), [("clear-skips-page", "SPURIOUS"), ("clear-leaves-page-writable", r"LOST .*: pages? \d")]
)
@pytest.mark.log_modes("clear-log-unset")
@pytest.mark.mutants
def test_clear_that_skips_a_page(kvm: Kvm, monkeypatch: pytest.MonkeyPatch, mutant: str, message: str) -> None:
    """A CLEAR that skips a page of its mask fails, anywhere and with each mask at a huge page's edge."""
    with ScriptedVm(kvm, "clear-log-unset", vcpus=2) as vm:
        vm.add_slot(SLOT, LAYOUT.gpa, LAYOUT.npages)
        test_huge_pages.check_clear(vm, [EDGE], "sound")
        MUTANTS[mutant].plant(monkeypatch)
        for mask in test_huge_pages.masks_at(EDGE):
            with pytest.raises(ContractViolation, match=message):
                test_huge_pages.check_clear(vm, mask, "falsified")
        vm.remove_slot(SLOT)
        vm.add_slot(SLOT, LAYOUT.gpa, NPAGES)
        with pytest.raises(ContractViolation, match=message):
            test_write_protection.check_clear(vm, random.Random(1), "falsified")


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
    huge_memory.check_huge(MappingSizes({2 * MIB: 2}), 2 * MIB, 2, "sound")
    with pytest.raises(ContractViolation, match="2 mappings of 2 MiB expected, found"):
        huge_memory.check_huge(MappingSizes({2 * MIB: found}), 2 * MIB, 2, "falsified")


@pytest.mark.parametrize("call", range(1, 5))
@pytest.mark.log_modes("dirty-log", "clear-log")
@pytest.mark.mutants
def test_falsified_statistics(
    make_huge_vm: Any, open_stats: Any, host: Host, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    """One huge page too many in any of KVM's statistics fails the test of huge pages."""
    honest, calls = MappingSizes.read, count(1)

    def falsified(stats: BinaryStats) -> MappingSizes:
        found = honest(stats)
        return MappingSizes(found.counts | {2 * MIB: found.counts[2 * MIB] + (next(calls) == call)})

    monkeypatch.setattr(MappingSizes, "read", falsified)
    layout = huge_memory.few_huge_pages("anonymous_thp", 3)
    with make_huge_vm(layout) as vm, open_stats(vm) as stats, pytest.raises((ContractViolation, AssertionError)):
        huge_memory.check_sizes(vm, stats, host, layout)


make_huge_vm, open_stats = conftest.make_huge_vm, conftest.open_stats


@pytest.mark.parametrize(("shift", "size", "expected"), [(0, 2 * MIB, 3), (1, 2 * MIB, 2), (0, GIB, 0)])
def test_huge_pages_of_a_slot(kvm: Kvm, shift: int, size: int, expected: int) -> None:
    """The huge pages of a memslot lie in it as a whole, at gpas that are multiples of their size."""
    with ScriptedVm(kvm, "dirty-log", vcpus=2) as vm:
        memslot = vm.add_slot(SLOT, FIRST_GPA + shift * PAGE, LAYOUT.npages)
        found = huge_pages(memslot, size)
        assert len(found) == expected
        assert all(len(page) * PAGE == size and (memslot.gpa + page[0] * PAGE) % size == 0 for page in found)
