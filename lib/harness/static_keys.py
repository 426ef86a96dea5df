# SPDX-License-Identifier: GPL-2.0-only
"""Static keys of an emulated kernel's KVM, held so that none switches while tests make VMs and close them.

QEMU's TCG with several threads now and then takes the breakpoint by which the kernel switches one for an oops (int3); see
"code invalidated before it is changed" in emulator_faults.py.
"""

from kvm_util.arch import current as arch
from kvm_util.kvm import Kvm, KvmUnavailable
from kvm_util.vm import Vm


class StaticKeys:
    """A pytest plugin that keeps two VMs of *device* to the end of the session."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._vms: list[Vm] = []

    def hold(self) -> None:
        """Make the VMs: one without a local APIC, and one with all else that KVM has such keys for."""
        try:
            kvm = Kvm(self._device)
        except KvmUnavailable:
            return  # each test will say why
        with kvm:
            for prepare in (None, arch.use_what_has_static_keys):
                vm = kvm.create_vm()
                self._vms.append(vm)
                if prepare is not None:
                    prepare(kvm.fd, vm.fd)
                vm.create_vcpu(0)

    def release(self) -> None:
        """Close the VMs, as KVM's modules cannot be unloaded before."""
        while self._vms:
            self._vms.pop().close()

    def pytest_unconfigure(self) -> None:
        self.release()
