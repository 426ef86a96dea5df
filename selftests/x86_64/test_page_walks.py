# SPDX-License-Identifier: GPL-2.0-only
"""Accessed and dirty bits that the CPU's page walker sets in the guest's page tables dirty the gfns of these tables."""

from collections.abc import Iterator

import pytest

from dirty_tracking.platform import uses_tdp
from dirty_tracking.scripted_vm import Operation, ScriptedVm
from dirty_tracking.violations import Kind, violated
from dirty_tracking.vm import FIRST_GPA, PAGE
from kvm_util.arch.x86_64.paging import PageTables
from kvm_util.host import Host
from kvm_util.kvm import Kvm

TABLES, DATA = 1, 2
NPAGES = 24
# Far from all other mappings: its own entry in the top table
WINDOW = 1 << 42


@pytest.fixture
def vm(kvm: Kvm, log_mode: str) -> Iterator[ScriptedVm]:
    """A VM with two logged memslots: the first has page tables in its pages 0 to 2, which map the second at WINDOW.

    No accessed or dirty bit is set in them.
    """
    with ScriptedVm(kvm, log_mode) as vm:
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


def access(vm: ScriptedVm, host: Host, name: str, page: int, data: list[int]) -> list[int]:
    """Have the guest access a page of DATA through the tables, and check the reports of both memslots.

    :param data: the pages of DATA that must be dirty
    :returns: the tables that the access changed
    :raises ContractViolation: KVM reported other pages
    """
    before = bytes(vm.vm.memslots[TABLES].memory.view)
    vm.run(Operation(name, WINDOW + page * PAGE))
    tables = vm.changed_pages(TABLES, before)
    report = vm.collect()
    reported = {slot: report.dirty(slot) for slot in (TABLES, DATA)}
    lost = set(tables) - reported[TABLES]
    # With TDP, a page walk counts as a write to the guest's tables, whether it sets a bit or not (AMD APM volume 2, "Nested
    # versus Guest Page Faults"). So tables that the walk only read may be reported.
    spurious = reported[TABLES] - ({0, 1, 2} if uses_tdp(host) else set(tables))
    if lost or spurious or reported[DATA] != set(data):
        raise violated(
            Kind.LOST if lost else Kind.SPURIOUS,
            f"{name} of page {page}: tables {tables} changed, and KVM reports {reported}",
        )
    return tables


def test_accessed_and_dirty_bits_are_logged(vm: ScriptedVm, host: Host) -> None:
    """The gfn of a guest page table is dirty after an access that set an accessed bit or the dirty bit in it."""
    assert access(vm, host, "load", 3, []) == [0, 1, 2]
    assert access(vm, host, "load", 4, []) == [2]
    assert access(vm, host, "store_8", 3, [3]) == [2]
    assert access(vm, host, "store_8", 5, [5]) == [2]


def test_page_walk_without_bit_changes(vm: ScriptedVm, host: Host) -> None:
    """A page walk that finds all accessed and dirty bits set leaves the guest's page tables as they are."""
    access(vm, host, "store_8", 3, [3])
    assert access(vm, host, "load", 3, []) == []
    assert access(vm, host, "store_8", 3, [3]) == []
