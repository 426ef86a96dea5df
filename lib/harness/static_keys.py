# SPDX-License-Identifier: GPL-2.0-only
"""Keeps the static keys of an emulated kernel's KVM enabled, so that none is patched while tests create and close VMs.

Patching a static key puts an int3 into running code for a moment. Multi-threaded TCG may execute it after it is gone, and
the kernel oopses; see "code invalidated before it is changed" in emulator_faults.py.
"""

from kvm_util.arch import current as arch
from kvm_util.kvm import Kvm, KvmUnavailable
from kvm_util.vm import Vm


def hold_static_keys(device: str) -> list[Vm]:
    """Create two VMs, to keep open: one without local APICs, and one with all else that KVM has static keys for."""
    try:
        kvm = Kvm(device)
    except KvmUnavailable:
        return []  # every test will report it
    vms = []
    with kvm:
        for prepare in (None, arch.use_static_key_features):
            vm = kvm.create_vm()
            vms.append(vm)
            if prepare is not None:
                prepare(kvm.fd, vm.fd)
            vm.create_vcpu(0)
    return vms
