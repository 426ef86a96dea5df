# SPDX-License-Identifier: GPL-2.0-only
"""Accessed and dirty bits that the page walker sets are writes to the guest's page tables, and are reported as such."""

from collections.abc import Iterator

import pytest

from dirty_tracking.platform import uses_tdp
from dirty_tracking.tracked_vm import FIRST_GPA, PAGE, Operation, TrackedVm
from dirty_tracking.violations import Kind, violated
from kvm_util.arch.x86_64.paging import PageTables
from kvm_util.host import Host
from kvm_util.kvm import Kvm

TABLES, DATA = 1, 2
NPAGES = 24
# Far from all other mappings: its own entry in the top table
WINDOW = 1 << 42


@pytest.fixture
def walked(kvm: Kvm, log_mode: str) -> Iterator[TrackedVm]:
    """Pages 0 to 2 of a tracked slot are page tables that map the other slot at WINDOW, with no bit set yet."""
    with TrackedVm(kvm, log_mode) as vm:
        vm.add_slot(TABLES, FIRST_GPA, NPAGES)
        vm.add_slot(DATA, FIRST_GPA + NPAGES * PAGE, NPAGES)
        vm.write(DATA, *range(NPAGES))
        vm.write(TABLES, *range(NPAGES), value=0)
        pages = iter(range(NPAGES))
        words = vm.vm.memslots[TABLES].memory.words

        def table(gpa: int) -> memoryview:
            first = (gpa - FIRST_GPA) // 8
            return words[first : first + PAGE // 8]

        tables = PageTables(vm.guest.guest_mode.levels - 1, lambda: FIRST_GPA + next(pages) * PAGE, table)
        tables.map(WINDOW, FIRST_GPA + NPAGES * PAGE, NPAGES * PAGE)
        vm.guest.page_tables.attach(WINDOW, tables)
        vm.collect()
        yield vm


def access(vm: TrackedVm, host: Host, name: str, page: int, data: list[int]) -> list[int]:
    """Have the guest access DATA's *page* through the tables, and hold KVM to what it changed in them and to *data*."""
    before = bytes(vm.vm.memslots[TABLES].memory.view)
    vm.run(Operation(name, WINDOW + page * PAGE))
    tables = vm.changed_pages(TABLES, before)
    report = vm.collect()
    reported = {slot: report.dirty(slot) for slot in (TABLES, DATA)}
    lost = set(tables) - reported[TABLES]
    # A page walk needs its tables writable under nested paging, whether there is a bit to set or not (AMD APM volume 2,
    # "Nested versus Guest Page Faults": a walk's accesses count as writes). So tables that were only read may be there.
    false = reported[TABLES] - ({0, 1, 2} if uses_tdp(host) else set(tables))
    if lost or false or reported[DATA] != set(data):
        raise violated(
            Kind.LOST if lost else Kind.SPURIOUS,
            f"{name} of page {page}: tables {tables} changed, and KVM reports {reported}",
        )
    return tables


def test_accessed_and_dirty_bits_are_reported(walked: TrackedVm, host: Host) -> None:
    """The first access sets a bit in each table, the next ones in the last only, and the first store the dirty bit."""
    assert access(walked, host, "load", 3, []) == [0, 1, 2]
    assert access(walked, host, "load", 4, []) == [2]
    assert access(walked, host, "store_8", 3, [3]) == [2]
    assert access(walked, host, "store_8", 5, [5]) == [2]


def test_what_sets_no_bit_changes_no_table(walked: TrackedVm, host: Host) -> None:
    access(walked, host, "store_8", 3, [3])
    assert access(walked, host, "load", 3, []) == []
    assert access(walked, host, "store_8", 3, [3]) == []
