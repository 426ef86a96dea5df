# SPDX-License-Identifier: GPL-2.0-only
"""How the guest of the tests, L1, runs a nested guest, L2: with SVM, or with VMX."""

import struct
from abc import ABC, abstractmethod
from collections.abc import Iterable

from dirty_tracking.scripted_vm import Operation, ScriptedVm
from dirty_tracking.vm import PAGE
from kvm_util.arch import current as arch
from kvm_util.arch.x86_64 import msr, svm, vmx
from kvm_util.arch.x86_64.cpuid import has_nested_paging, has_svm, has_vmx
from kvm_util.arch.x86_64.uapi import kvm_sregs
from kvm_util.host import this_host
from kvm_util.kvm import Kvm
from kvm_util.vm import Memslot


class Hypervisor(ABC):
    """What L1 does to run L2 on vCPU 0 of *vm*.

    :param memory: memory of L1, for the page that describes L2: VMCB or VMCS
    :param page: which page of it that is
    :cvar end: the operation that ends the list of L2, and exits to L1
    :cvar leaf: bits of the entries of nested page tables that map pages
    :ivar marks_tables: whether accesses of L2 set accessed and dirty bits in the nested page tables
    """

    end: str
    leaf = 0
    marks_tables = True

    @abstractmethod
    def __init__(self, vm: ScriptedVm, memory: Memslot, page: int) -> None:
        self._vm = vm
        self._control = memory.gpa + page * PAGE
        self._memory, self._start = memory.memory, page * PAGE

    def _control_page(self) -> memoryview:
        """The page that describes L2; release it before the VM is closed."""
        return self._memory.view[self._start : self._start + PAGE]

    def _sregs(self) -> kvm_sregs:
        return arch.get_sregs(self._vm.vm.vcpus[0].fd)

    @staticmethod
    @abstractmethod
    def missing(kvm: Kvm, nested: bool) -> str | None:
        """What *kvm* lacks for L2, with nested page tables or without; None if it lacks nothing."""

    @abstractmethod
    def enter(self, rip: int, rsp: int, block: int, root: int | None, flush_tlb: bool) -> Iterable[Operation]:
        """The operations with which L1 runs L2 until it exits.

        :param block: L2's own, which has the address of its list
        :param root: gpa of the root of the nested page tables; None for none
        :param flush_tlb: whether L1 flushes L2's TLB entries first
        """

    @abstractmethod
    def strange_exit(self) -> str | None:
        """Why L2 exited last; None if it was the end of its list."""


class Svm(Hypervisor):
    """AMD's SVM."""

    end = "vmmcall"

    def __init__(self, vm: ScriptedVm, memory: Memslot, page: int) -> None:
        super().__init__(vm, memory, page)
        vm.run(
            Operation("wrmsr", msr.MSR_EFER, self._sregs().efer | msr.EFER_SVME),
            Operation("wrmsr", msr.MSR_VM_HSAVE_PA, vm.guest.allocate(PAGE)),
        )

    @staticmethod
    def missing(kvm: Kvm, nested: bool) -> str | None:
        cpuid = kvm.supported_cpuid
        if not has_svm(cpuid):
            return "KVM offers its guests no SVM here (CPUID SVM)"
        if nested and not has_nested_paging(cpuid):
            return "KVM offers its guests no nested paging here (CPUID NP)"
        return None

    def enter(self, rip: int, rsp: int, block: int, root: int | None, flush_tlb: bool) -> Iterable[Operation]:
        with self._control_page() as vmcb:
            svm.fill_vmcb(vmcb, self._sregs(), rip, rsp, root, flush_tlb)
        return [Operation("vmrun", self._control, block)]

    def strange_exit(self) -> str | None:
        with self._control_page() as vmcb:
            code = svm.exit_code(vmcb)
        return None if code == svm.VMEXIT_VMMCALL else f"exit code {code:#x}"


class Vmx(Hypervisor):
    """Intel's VMX. L1 clears the VMCS after each exit, so that KVM writes it to its page, and launches L2 each time."""

    end = "vmcall"
    leaf = vmx.EPT_WRITE_BACK

    def __init__(self, vm: ScriptedVm, memory: Memslot, page: int) -> None:
        super().__init__(vm, memory, page)
        guest, self._vcpu = vm.guest, vm.vm.vcpus[0].fd
        self.marks_tables = vmx.has_ept(self._vcpu) and vmx.sets_accessed_and_dirty(self._vcpu)
        region, self._arguments, self._zeros = (guest.allocate(PAGE) for _ in range(3))
        revision = struct.pack("<I", vmx.revision(self._vcpu))
        with self._control_page() as vmcs, guest.memory(region, PAGE) as vmxon:
            vmcs[: len(revision)] = vmxon[: len(revision)] = revision
        self._write(self._arguments, self._control, region)
        vm.run(
            Operation("wrmsr", msr.MSR_IA32_FEAT_CTL, msr.FEAT_CTL_LOCKED | msr.FEAT_CTL_VMX_ENABLED_OUTSIDE_SMX),
            Operation("vmxon", self._arguments),
        )

    @staticmethod
    def missing(kvm: Kvm, nested: bool) -> str | None:
        if not has_vmx(kvm.supported_cpuid):
            return "KVM offers its guests no VMX here (kvm_intel.nested=1 switches it on)"
        if nested and not vmx.has_ept(kvm.fd):
            return "KVM offers its guests no nested paging here (kvm_intel.ept=0 switches it off)"
        return None

    def enter(self, rip: int, rsp: int, block: int, root: int | None, flush_tlb: bool) -> Iterable[Operation]:
        fields = vmx.vmcs_fields(self._vcpu, self._sregs(), rip, rsp, root)
        self._write(self._arguments + 3 * 8, *(word for field in fields.items() for word in field), 0)
        launch = Operation("vmlaunch", self._arguments, block)
        return [Operation("invept", self._zeros), launch] if flush_tlb else [launch]

    def strange_exit(self) -> str | None:
        (reason,) = struct.unpack("<Q", self._vm.guest.read(self._arguments + 2 * 8, 8))
        return None if reason == vmx.EXIT_VMCALL else f"exit reason {reason:#x}"

    def _write(self, address: int, *words: int) -> None:
        with self._vm.guest.memory(address, 8 * len(words)) as memory:
            struct.pack_into(f"<{len(words)}Q", memory, 0, *words)


_HYPERVISORS: dict[str, type[Hypervisor]] = {"kvm_amd": Svm, "kvm_intel": Vmx}


def hypervisor() -> type[Hypervisor] | None:
    """How guests of this host's KVM run nested guests; None if they cannot."""
    return _HYPERVISORS.get(this_host().backend)
