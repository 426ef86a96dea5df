# SPDX-License-Identifier: GPL-2.0-only
"""VMs that hold the static keys of an emulated kernel's KVM, so that none switches while tests create and close VMs.

Under multi-threaded TCG the breakpoint by which the kernel switches a static key may end in an oops (int3); see "code
invalidated before it is changed" in emulator_faults.py.
"""

from kvm_util.arch import current as arch
from kvm_util.kvm import Kvm, KvmUnavailable
from kvm_util.vm import Vm


class StaticKeys:
    """A pytest plugin that keeps two VMs of *device* open until the session ends."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._vms: list[Vm] = []

    def hold(self) -> None:
        """Create the VMs: one without a local APIC, and one with all features that have a static key in KVM."""
        try:
            kvm = Kvm(self._device)
        except KvmUnavailable:
            return  # each test reports it
        with kvm:
            for prepare in (None, arch.use_what_has_static_keys):
                vm = kvm.create_vm()
                self._vms.append(vm)
                if prepare is not None:
                    prepare(kvm.fd, vm.fd)
                vm.create_vcpu(0)

    def release(self) -> None:
        """Close the VMs, so that KVM's modules can be unloaded."""
        while self._vms:
            self._vms.pop().close()

    def pytest_unconfigure(self) -> None:
        self.release()
