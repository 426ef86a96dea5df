# SPDX-License-Identifier: GPL-2.0-only
"""Keeps the static keys of an emulated kernel's KVM enabled, so that none is patched while tests create and close VMs.

Patching a static key puts an int3 into running code for a moment. Multi-threaded TCG may execute it after it is gone, and
the kernel oopses; see "code invalidated before it is changed" in emulator_faults.py.
"""

from kvm_util.arch import current as arch
from kvm_util.kvm import Kvm, KvmUnavailable
from kvm_util.vm import Vm


class StaticKeys:
    """A pytest plugin that keeps two VMs on *device* open until the end of the session."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._vms: list[Vm] = []

    def hold(self) -> None:
        """Create the VMs: one without local APICs, and one with all other features that KVM has static keys for."""
        try:
            kvm = Kvm(self._device)
        except KvmUnavailable:
            return  # every test will report it
        with kvm:
            for prepare in (None, arch.use_static_key_features):
                vm = kvm.create_vm()
                self._vms.append(vm)
                if prepare is not None:
                    prepare(kvm.fd, vm.fd)
                vm.create_vcpu(0)

    def release(self) -> None:
        """Close the VMs, which keep KVM's modules from being unloaded."""
        while self._vms:
            self._vms.pop().close()

    def pytest_unconfigure(self) -> None:
        self.release()
