# SPDX-License-Identifier: GPL-2.0-only
"""What a task switch of a 32-bit guest writes is logged: task state segments, their descriptors, and an error code.

The CPU leaves these switches to KVM, which writes guest memory itself (emulator_task_switch(), arch/x86/kvm/emulate.c). QEMU's
emulated CPU does not, for it lacks the intercept: there they are stores of the guest, to pages that KVM has write-protected.
"""

import struct

import pytest

from dirty_tracking.deadline import interrupting_after
from dirty_tracking.platform import uses_tdp
from dirty_tracking.vm import FIRST_GPA, PAGE, DirtyVm
from kvm_util.arch.x86_64.vcpu_state import (
    SEGMENT_DESCRIPTORS_32,
    enter_32bit_mode,
    enter_task,
    get_sregs,
    task_gate,
    tss_descriptor,
)
from kvm_util.host import Host
from kvm_util.kvm import Kvm
from kvm_util.memory import MIB

SLOT = 1
NPAGES = 24
# Pages of the memslot; a task state segment may reach into the page after its own.
GDT, IDT, FIRST, SECOND, STACK = 3, 5, 7, 10, 14
# Words of a 32-bit task state segment (Intel SDM volume 3, "Task-State Segment")
LINK, EIP, EFLAGS, EDX, ESP, ESI, ES, CS, GS = 0, 8, 9, 12, 14, 16, 18, 19, 23
WORD = 4
DEADLINE = 60.0  # seconds
# EIP to EBP are in the first page then, ESI and the segments in the second one.
STRADDLING = PAGE - ESI * WORD
# What the way to the second task writes beside the descriptors and the first task's own segment, by the routines' name
WRITES = {"jump": [], "call": [SECOND], "interrupt": [SECOND], "exception": [SECOND, STACK]}
# KVM writes and pushes each of the two descriptors by itself.
MAX_ENTRIES = 2


class Tasks:
    """A guest in the first of two tasks, whose tables, segments and stack are in a memslot that is not logged yet.

    :param how: the routines of tasks_32.S that switch
    :param offset: of both task state segments in their pages
    """

    def __init__(self, vm: DirtyVm, how: str, offset: int) -> None:
        self.vm = vm
        memslot = vm.add_slot(SLOT, FIRST_GPA, NPAGES, logged=False)
        self._offset = offset
        symbols = vm.guest.program.symbols
        self.selectors = symbols["FIRST_TASK"], symbols["SECOND_TASK"]
        self._data = symbols["DATA"]
        first, second = (FIRST_GPA + page * PAGE + offset for page in (FIRST, SECOND))
        descriptors = (0, *SEGMENT_DESCRIPTORS_32, tss_descriptor(first, busy=True), tss_descriptor(second))
        struct.pack_into(f"<{len(descriptors)}Q", memslot.memory.view, GDT * PAGE, *descriptors)
        gates = [task_gate(self.selectors[1])] * (PAGE // 8)
        struct.pack_into(f"<{len(gates)}Q", memslot.memory.view, IDT * PAGE, *gates)
        self._set(SECOND, EIP, symbols[f"{how}_second"])
        self._set(SECOND, EFLAGS, 2)
        self._set(SECOND, ESP, FIRST_GPA + STACK * PAGE + PAGE)
        for segment in range(ES, GS + 1):
            self._set(SECOND, segment, symbols["CODE"] if segment == CS else self._data)
        self.vcpu = vm.guest.add_vcpu(entry=f"{how}_first")
        enter_32bit_mode(self.vcpu.fd, None)
        tables = ((FIRST_GPA + GDT * PAGE, len(descriptors) * 8), (FIRST_GPA + IDT * PAGE, PAGE))
        enter_task(self.vcpu.fd, *tables, self.selectors[0], first)
        self._run()

    def switch(self) -> list[int]:
        """Have the guest switch to the other task; returns the pages whose contents changed."""
        # Clear what each switch writes alike, so that it shows as a change.
        self._set(FIRST, EDX, self._data)
        if self.current == self.selectors[0]:
            self._set(SECOND, LINK, 0)
            self._write((STACK + 1) * PAGE - WORD, 0)
        current, before = self.current, bytes(self.vm.vm.memslots[SLOT].memory.view)
        self._run()
        assert {current, self.current} == set(self.selectors)
        return self.vm.changed_pages(SLOT, before)

    @property
    def current(self) -> int:
        """The selector of the task that runs."""
        return int(get_sregs(self.vcpu.fd).tr.selector)

    def _run(self) -> None:
        with interrupting_after(DEADLINE):
            self.vm.guest.run_until_ucall(self.vcpu)

    def _set(self, page: int, word: int, value: int) -> None:
        self._write(page * PAGE + self._offset + word * WORD, value)

    def _write(self, where: int, value: int) -> None:
        struct.pack_into("<I", self.vm.vm.memslots[SLOT].memory.view, where, value)


def pages_of(page: int, offset: int) -> list[int]:
    """The pages of the task state segment at *page* that the switch to another task writes."""
    return [page, page + 1] if offset == STRADDLING else [page]


def unsupported(host: Host, emulates: bool, emulated_cpu: bool, how: str) -> str | None:
    """Why the guest cannot switch tasks here, or None."""
    if emulates:
        # __load_segment_descriptor(), em_iret() and emulate_int(), arch/x86/kvm/emulate.c
        return f"{host.backend} emulates every instruction, and KVM's emulator leaves these to the CPU"
    if emulated_cpu and not uses_tdp(host):
        # switch_tss_ra(), target/i386/tcg/seg_helper.c: without TDP the CPU's paging is on for a guest without paging.
        return "QEMU's CPU would load CR3, with which KVM shadows the guest's memory, from a task state segment"
    if emulated_cpu and how == "exception":
        # do_interrupt_protected(), the same file: the switch is complete when the push faults.
        return "QEMU's CPU cannot push an error code to a page that is write-protected"
    return None


@pytest.mark.parametrize("offset", [0x200, STRADDLING], ids=["one-page", "two-pages"])
@pytest.mark.parametrize("how", WRITES)
def test_task_switch_is_logged(
    kvm: Kvm, host: Host, emulates: bool, emulated_cpu: bool, log_mode: str, how: str, offset: int
) -> None:
    """A task switch dirties the gfns of the old task's segment, of the GDT, and of the back link and error code if any."""
    if reason := unsupported(host, emulates, emulated_cpu, how):
        pytest.skip(f"task switches: {reason}")
    with DirtyVm(kvm, log_mode, "tasks_32", 4096, MIB, "48bit-4k") as vm:
        tasks = Tasks(vm, how, offset)
        # The CPU reads the pages of the way there and back: not yet logged, so that mapping them dirties none.
        for _ in range(2):
            tasks.switch()
        vm.enable_dirty_logging(SLOT)
        there = sorted([GDT, *pages_of(FIRST, offset), *WRITES[how]])
        back = sorted([GDT, *pages_of(SECOND, offset)])
        for what, pages in (("there", there), ("back", back)) * 2:
            assert tasks.switch() == pages
            vm.assert_dirty(f"{how}: {what}", {SLOT: pages}, MAX_ENTRIES)
