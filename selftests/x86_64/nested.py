# SPDX-License-Identifier: GPL-2.0-only
"""A nested guest (L2) that executes operations, for the tests of nested guests."""

from collections.abc import Callable, Iterator

from dirty_tracking.scripted_vm import LIST_SIZE, Operation, ScriptedVm
from dirty_tracking.vm import FIRST_GPA, GVA_OFFSET, PAGE
from kvm_util.arch.x86_64.paging import PageTables
from kvm_util.guest import GuestError
from kvm_util.memory import GIB, MIB
from kvm_util.vcpu import Vcpu
from selftests.pause import paused
from selftests.x86_64.hypervisors import hypervisor

SLOT, OWN = 1, 2
NPAGES = 24
# A memslot for the pages of L1 that KVM writes on its behalf: nested page tables, and the VMCB or VMCS
OWN_GPA = FIRST_GPA + 64 * MIB
# The nested tables need 13 pages at most: two for the upper levels, three for slot 0 and the two windows, and four below each
# window for 2 * RING pages
TABLES, CONTROL = range(NPAGES - 1), NPAGES - 1
# Where L2 has the test memslot, twice: gpas of L2 with nested paging; without it L1 uses the same tables
WINDOW, ALIAS = 8 * GIB, 9 * GIB
STACK_SIZE = 4 * PAGE
RING = 1024  # entries; fewer are refused with PML
# KVM pushes each of its own writes to a ring (mark_page_dirty_in_slot()), and a page once for each of its mappings
MANY = 1000


class NestedGuest:
    """The L2 guest of the only vCPU of *vm*, with or without nested page tables. It does operations in L1's address space.

    :param page_size: of the nested page tables' entries for the test memslot, in bytes
    """

    def __init__(self, vm: ScriptedVm, nested: bool, page_size: int = PAGE) -> None:
        self.vm = vm
        self.nested = nested
        self.own = vm.vm.memslots[OWN].memory
        guest, kind = vm.guest, hypervisor()
        assert kind is not None
        self.hypervisor = kind(vm, vm.vm.memslots[OWN], CONTROL)
        self.tables: PageTables | None = None
        slot = vm.vm.memslots[SLOT]
        if nested:
            pages = iter(TABLES)
            levels, leaf = guest.guest_mode.levels, self.hypervisor.leaf
            self.tables = PageTables(levels, lambda: OWN_GPA + next(pages) * PAGE, self._table, nested, leaf)
            self.tables.map(0, 0, guest.size, 2 * MIB)
        for window in (WINDOW, ALIAS):
            vm.map_at(window + GVA_OFFSET, window if nested else slot.gpa, slot.npages)
            if self.tables:
                self.tables.map(window, slot.gpa, slot.npages * PAGE, page_size)
        self._block, self._list = guest.allocate(PAGE), guest.allocate(LIST_SIZE)
        guest.memory(self._block, PAGE).cast("Q")[0] = self._list
        self._stack = guest.allocate(STACK_SIZE) + STACK_SIZE

    def _table(self, gpa: int) -> memoryview:
        first = (gpa - OWN_GPA) // 8
        return self.own.words[first : first + PAGE // 8]

    def address(self, page: int, window: int = WINDOW) -> int:
        """The gva at which L2 has a page of the test memslot."""
        return window + page * PAGE + GVA_OFFSET

    def run(
        self, *operations: Operation, on_exit: Callable[[Vcpu], bool] | None = None, flush_tlb: bool = False
    ) -> None:
        """Have L1 run L2, and L2 do *operations* and return to L1.

        :param flush_tlb: whether L1 flushes L2's TLB entries first
        :raises GuestError: L2 exited in another way
        """
        self.vm.write_list(self._list, operations, end=self.hypervisor.end)
        entry, root = self.vm.guest.program.symbols["guest_main"], self.tables.root if self.tables else None
        self.vm.run(*self.hypervisor.enter(entry, self._stack, self._block, root, flush_tlb), on_exit=on_exit)
        if reason := self.hypervisor.strange_exit():
            raise GuestError(f"L2 ended with {reason}")

    def run_in_steps(self, steps: Iterator[None], *operations: Operation) -> None:
        """Have L2 do *operations*, and the host the next of *steps* at each PAUSE among them, which L1 does not intercept.

        What follows the last step is done when L2 has returned to L1.
        """

        def step(vcpu: Vcpu) -> bool:
            if not paused(vcpu):
                return False
            vcpu.run.immediate_exit = 1
            vcpu.kvm_run()  # completes the instruction (api.rst, KVM_EXIT_IO), and does not enter the guest
            vcpu.run.immediate_exit = 0
            next(steps)
            return True

        self.run(*operations, on_exit=step)
        assert next(steps, "the end") == "the end", "there are more steps than pauses"

    def write(self, *pages: int, window: int = WINDOW) -> None:
        """Have L2 write a word into each of *pages*."""
        self.run(*(Operation("store_8", self.address(page, window), 1) for page in pages))

    def load(self, *pages: int) -> None:
        """Have L2 read a word of each of *pages*."""
        self.run(*(Operation("load", self.address(page)) for page in pages))
