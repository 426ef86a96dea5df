# SPDX-License-Identifier: GPL-2.0-only
"""Stores of guests in 32-bit protected mode are logged, whether their memory is paged or not."""

import struct
from collections.abc import Callable, Sequence

import pytest

from dirty_tracking.deadline import interrupting_after
from dirty_tracking.vm import FIRST_GPA, PAGE, DirtyVm
from kvm_util.arch.x86_64.paging import PageTables
from kvm_util.arch.x86_64.vcpu_state import enter_32bit_mode
from kvm_util.guest import GuestVm
from kvm_util.host import Host
from kvm_util.kvm import Kvm
from kvm_util.memory import MIB

SLOT = 1
NPAGES = 24
DEADLINE = 60.0  # seconds
WRITABLE = 0b11  # and present
LARGE = 1 << 7


def legacy_tables(guest: GuestVm) -> int:
    """32-bit page tables that map all gpas one to one: the 4 MiB with the memslot by 4 KiB, all else by large pages."""
    root, table = guest.allocate(PAGE), guest.allocate(PAGE)
    size, first = 4 * MIB, FIRST_GPA // (4 * MIB)
    with guest.memory(root, PAGE) as memory:
        struct.pack_into("<1024I", memory, 0, *(entry * size | WRITABLE | LARGE for entry in range(1024)))
        struct.pack_into("<I", memory, first * 4, table | WRITABLE)
    with guest.memory(table, PAGE) as memory:
        struct.pack_into("<1024I", memory, 0, *(first * size + entry * PAGE | WRITABLE for entry in range(1024)))
    return root


def pae_tables(guest: GuestVm) -> int:
    """PAE page tables that map slot 0 and the memslot one to one."""
    tables = PageTables(3, lambda: guest.allocate(PAGE), lambda gpa: guest.memory(gpa, PAGE).cast("Q"))
    tables.map(0, 0, guest.size, 2 * MIB)
    tables.map(FIRST_GPA, FIRST_GPA, NPAGES * PAGE)
    with guest.memory(tables.root, PAGE) as memory:
        for entry in range(4):
            memory[entry * 8] &= ~0b10  # reserved in these (Intel SDM volume 3, "PAE Paging")
    return tables.root


@pytest.mark.parametrize("tables", [None, legacy_tables, pae_tables], ids=["no-paging", "32-bit-paging", "pae-paging"])
def test_32bit_guest_stores_are_logged(
    kvm: Kvm, host: Host, emulates: bool, log_mode: str, tables: Callable[[GuestVm], int] | None
) -> None:
    """Stores in 32-bit mode dirty their gfns, after dirty logging was enabled and after each collection."""
    if emulates and tables:
        pytest.skip(f"{host.backend} pages no guest in 32-bit mode: KVM_SET_SREGS drops CR0.PG there")
    with DirtyVm(kvm, log_mode, "stores_32", 4096, MIB, "48bit-4k") as vm:
        vm.add_slot(SLOT, FIRST_GPA, NPAGES, logged=False)
        block = vm.guest.allocate(PAGE)
        vcpu = vm.guest.add_vcpu(block)
        enter_32bit_mode(vcpu.fd, tables(vm.guest) if tables else None, pae=tables is pae_tables)

        def write(pages: Sequence[int]) -> None:
            with vm.guest.memory(block, PAGE) as memory:
                struct.pack_into(
                    f"<{len(pages) + 1}I", memory, 0, len(pages), *(FIRST_GPA + page * PAGE for page in pages)
                )
            with interrupting_after(DEADLINE):
                vm.guest.run_until_ucall(vcpu)

        write(range(NPAGES))
        vm.enable_dirty_logging(SLOT)
        for pages in ([3], [3, 4], [0, NPAGES - 1], range(NPAGES)):
            write(pages)
            vm.assert_dirty(f"stores to pages {list(pages)}", {SLOT: pages})
