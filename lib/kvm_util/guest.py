# SPDX-License-Identifier: GPL-2.0-only
"""A VM that runs a guest program.

Memslot 0 begins at gpa 0 and holds program, page tables, stacks and shared variables. The guest maps it one to one with pages
of 2 MiB, except for the first one, which stays unmapped. Test memory goes into other memslots.
"""

from enum import Enum

from kvm_util.arch import current as arch
from kvm_util.closing import Closing
from kvm_util.guest_program import LOAD_ADDRESS, GuestProgram
from kvm_util.kvm import Kvm
from kvm_util.memory import MIB, align_up
from kvm_util.vcpu import Vcpu

PROGRAM_SLOT = 0
_STACK_PAGES = 4
_MAPPING = 2 * MIB  # size of the pages that map slot 0


class Ucall(Enum):
    """Calls from the guest program to the host; each value is the symbol of its command number."""

    SYNC = "UCALL_SYNC"
    DONE = "UCALL_DONE"
    ABORT = "UCALL_ABORT"
    EXCEPTION = "UCALL_EXCEPTION"


class GuestError(Exception):
    """The guest aborted, took an exception, made an unknown call, or exited for an unexpected reason."""


class GuestVm(Closing):
    """A VM with *program* loaded into memslot 0 and no vCPU yet.

    :param kvm: the device to create the VM on
    :param program: what its vCPUs run
    :param guest_mode: a key of ``GUEST_MODES``: page-table levels, and the page size of :meth:`map_test_memory`
    :param data_size: bytes to reserve in slot 0 for :meth:`allocate`, beyond program, page tables and stacks
    :raises KvmError: an ioctl failed
    :raises HostLimit: a limit of the host explains the failure
    """

    def __init__(self, kvm: Kvm, program: GuestProgram, guest_mode: str = "48bit-4k", data_size: int = 0) -> None:
        self.program = program
        self.guest_mode = arch.GUEST_MODES[guest_mode]
        self.vm = kvm.create_vm()
        try:
            self.cpuid = kvm.supported_cpuid
            self.size = program_slot_size(data_size)
            self._memory = self.vm.add_memory(PROGRAM_SLOT, 0, self.size).memory.view
            self._next_free = align_up(program.end, arch.PAGE_SIZE)
            for address, data, _ in program.segments:
                self._memory[address : address + len(data)] = data
            self.page_tables = arch.PageTables(
                self.guest_mode.levels, lambda: self.allocate(arch.PAGE_SIZE), self._table_words
            )
            # Few entries, since each VM of the suite writes them: no property of dirty logging depends on slot 0's pages.
            self.page_tables.map(LOAD_ADDRESS, LOAD_ADDRESS, self.size - LOAD_ADDRESS, _MAPPING)
            self._tables = self.allocate(arch.PAGE_SIZE)
            arch.init_descriptor_tables(self.memory(self._tables, arch.PAGE_SIZE), program.symbols)
            self._commands = {program.symbols[call.value]: call for call in Ucall}
        except BaseException:
            self.vm.close()
            raise

    def allocate(self, size: int) -> int:
        """Allocate *size* bytes of slot 0, zeroed and page-aligned; never freed.

        :returns: their gpa, which is also their gva
        :raises MemoryError: slot 0 is full
        """
        address = self._next_free
        self._next_free = align_up(address + size, arch.PAGE_SIZE)
        if self._next_free > self.size:
            raise MemoryError(f"slot 0 has no room for {size:#x} bytes more: {address:#x} of {self.size:#x} are taken")
        return address

    def memory(self, address: int, size: int) -> memoryview:
        """A writable view of *size* bytes at gpa *address* in slot 0; release it before :meth:`close`."""
        return self._memory[address : address + size]

    def read(self, address: int, size: int) -> bytes:
        """A copy of *size* bytes at gpa *address* in slot 0."""
        return bytes(self._memory[address : address + size])

    def read_symbol(self, name: str) -> int:
        """The value of the guest program's 64-bit variable *name*."""
        return int.from_bytes(self.read(self.program.symbols[name], 8), "little")

    def write_symbol(self, name: str, value: int) -> None:
        """Set the guest program's 64-bit variable *name*; the guest must not write it at the same time."""
        address = self.program.symbols[name]
        self._memory[address : address + 8] = value.to_bytes(8, "little")

    def add_vcpu(self, argument: int = 0, entry: str = "guest_main") -> Vcpu:
        """Create the next vCPU; it starts at symbol *entry* with *argument* in its first argument register."""
        vcpu = self.vm.create_vcpu(len(self.vm.vcpus))
        tss = self.allocate(arch.PAGE_SIZE)
        size = _STACK_PAGES * arch.PAGE_SIZE
        stack, exception_stack = (self.allocate(size) + size for _ in range(2))
        arch.init_vcpu(
            vcpu.fd, self.cpuid, self.guest_mode.levels, self.page_tables.root, self._tables,
            (tss, self.memory(tss, arch.PAGE_SIZE)), self.program.symbols[entry], stack, exception_stack, argument,
        )  # fmt: skip
        return vcpu

    def map_test_memory(self, gva: int, gpa: int, size: int) -> None:
        """Map *size* bytes at *gva* to *gpa* in the guest's page tables, with pages of the guest mode's size."""
        self.page_tables.map(gva, gpa, size, self.guest_mode.page_size)

    def ucall(self, vcpu: Vcpu) -> Ucall | None:
        """The guest's call if the last exit was one, else None.

        :raises GuestError: the guest aborted, took an exception, or made an unknown call
        """
        command = arch.decode_ucall(vcpu.run, self.program.symbols[arch.UCALL_PORT_SYMBOL])
        if command is None:
            return None
        call = self._commands.get(command)
        if call is None:
            raise GuestError(f"vCPU {vcpu.id}: {self.program.name} made unknown call {command}")
        if call is Ucall.ABORT:
            message, *values = arch.abort_arguments(vcpu.fd)
            text = bytes(self._memory[message : message + 200]).split(b"\0")[0].decode(errors="replace")
            raise GuestError(f"vCPU {vcpu.id}: {self.program.name} aborted: {text} ({', '.join(map(hex, values))})")
        if call is Ucall.EXCEPTION:
            raise GuestError(f"vCPU {vcpu.id}: {self.program.name} took {arch.decode_exception(vcpu.fd, self.read)}")
        return call

    def run_until_ucall(self, vcpu: Vcpu) -> Ucall:
        """Run *vcpu* on the calling thread until the guest's next call.

        :raises GuestError: the guest aborted, took an exception, or exited without a call
        """
        code = vcpu.kvm_run()
        call = None if code else self.ucall(vcpu)
        if call is None:
            raise GuestError(unexpected_exit(vcpu, code))
        return call

    def close(self) -> None:
        """Close the VM and free its memory. No vCPU may be running; views from :meth:`memory` must be released."""
        self._memory.release()
        self.vm.close()

    def _table_words(self, address: int) -> memoryview:
        return self._memory[address : address + arch.PAGE_SIZE].cast("Q")


def program_slot_size(data_size: int) -> int:
    """The size of slot 0 in bytes, for *data_size* bytes of data. Test memory must lie above it."""
    return align_up(32 * MIB + data_size, _MAPPING)


def unexpected_exit(vcpu: Vcpu, code: int) -> str:
    """Describe an exit that the test did not expect, with the vCPU's registers; the vCPU must not be running.

    :param code: what :meth:`Vcpu.kvm_run` returned
    """
    reason = "EINTR" if code else vcpu.exit_reason()
    return f"vCPU {vcpu.id}: KVM_RUN returned {reason}{vcpu.exit_details()}\n{arch.describe_registers(vcpu.fd)}"
