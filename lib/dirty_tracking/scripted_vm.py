# SPDX-License-Identifier: GPL-2.0-only
"""A VM whose guest executes single operations on demand: for tests of one sentence of the contract.

There are no threads here: the guest runs until the list of operations is done, and is out of KVM_RUN whenever KVM is
asked for its report.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dirty_tracking.deadline import interrupting_after
from dirty_tracking.vm import DirtyVm
from kvm_util import uapi
from kvm_util.guest import GuestError, Ucall, unexpected_exit
from kvm_util.kvm import Kvm
from kvm_util.memory import MIB
from kvm_util.vcpu import Vcpu
from kvm_util.vm import Vm

_PAGE_TABLES = 16 * MIB  # for some 7 GiB of test memory
_EMULATION = 1  # KVM_INTERNAL_ERROR_EMULATION
_MAX_OPERATIONS = 4096
# For how many seconds a list of operations may run
_DEADLINE = 60.0
LIST_SIZE = (_MAX_OPERATIONS + 1) * 32


@dataclass(frozen=True)
class Operation:
    """One thing that the guest does: the routine ``do_<name>`` of guest_code/<arch>/operations.S, and its arguments."""

    name: str
    address: int = 0
    value: int = 0
    count: int = 0


class ScriptedVm(DirtyVm):
    """A VM with *vcpus* vCPUs that execute operations; for the other parameters see :class:`DirtyVm`."""

    def __init__(
        self,
        kvm: Kvm,
        mode: str,
        vcpus: int = 1,
        ring_count: int = 4096,
        guest_mode: str = "48bit-4k",
        prepare: Callable[[Vm], None] | None = None,
    ) -> None:
        super().__init__(kvm, mode, "operations", ring_count, vcpus * 2 * LIST_SIZE + _PAGE_TABLES, guest_mode, prepare)
        self._lists: list[int] = []
        with self._building():
            for _ in range(vcpus):
                self.add_vcpu()

    def add_vcpu(self) -> None:
        """Create the next vCPU."""
        block, operations = self.guest.allocate(8), self.guest.allocate(LIST_SIZE)
        self._words(block, 8)[0] = operations
        self._lists.append(operations)
        self.guest.add_vcpu(block)

    def run(self, *operations: Operation, vcpu: int = 0, on_exit: Callable[[Vcpu], bool] | None = None) -> None:
        """Have a vCPU execute *operations*.

        :param on_exit: called when KVM_RUN returns before the end; returns whether to continue
        :raises GuestError: the guest stopped for another reason
        """
        self.write_list(self._lists[vcpu], operations)
        handle = self.vm.vcpus[vcpu]
        until = time.monotonic() + _DEADLINE
        while True:
            with interrupting_after(_DEADLINE):
                code = handle.kvm_run()
            if time.monotonic() > until:
                raise GuestError(f"no end within {_DEADLINE:g} s: {unexpected_exit(handle, code)}")
            if code:
                continue
            if on_exit is not None and on_exit(handle):
                continue
            run = handle.run
            if run.exit_reason == uapi.KVM_EXIT_INTERNAL_ERROR and run.internal.suberror == _EMULATION:
                raise NotEmulated(f"KVM's emulator does not know the instruction of {operations[0].name}")
            if self.guest.ucall(handle) is Ucall.SYNC:
                return
            raise GuestError(unexpected_exit(handle, code))

    def write(self, slot: int, *pages: int, vcpu: int = 0, value: int = 1) -> None:
        """Write a word into each of *pages*."""
        self.run(*(Operation("store_8", self.address(slot, page), value) for page in pages), vcpu=vcpu)

    def write_list(self, address: int, operations: Sequence[Operation], end: str = "sync") -> None:
        """Write a list of *operations*, and of *end*, to LIST_SIZE bytes at *address* of slot 0."""
        if len(operations) > _MAX_OPERATIONS:
            raise ValueError(f"{len(operations)} operations, there is room for {_MAX_OPERATIONS}")
        words = self._words(address, (len(operations) + 1) * 32)
        symbols = self.guest.program.symbols
        for index, operation in enumerate((*operations, Operation(end))):
            words[index * 4] = symbols[f"do_{operation.name}"]
            words[index * 4 + 1] = operation.address
            words[index * 4 + 2] = operation.value
            words[index * 4 + 3] = operation.count
        words.release()

    def _words(self, address: int, size: int) -> memoryview:
        return self.guest.memory(address, size).cast("Q")


class NotEmulated(Exception):
    """KVM had to emulate an instruction, and cannot; the text names it."""
