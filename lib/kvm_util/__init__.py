# SPDX-License-Identifier: GPL-2.0-only
"""VMs, vCPUs, guest memory and guest programs on top of KVM's ioctls: a Python counterpart of the kernel's ``kvm_util``.

The package depends on neither pytest nor the rest of the suite. It wraps the dirty-log ioctls, but judges no result.

A guest that adds one to a number:

>>> with Kvm() as kvm, GuestVm(kvm, GuestProgram.load("self_test")) as guest:
...     vcpu = guest.add_vcpu()
...     guest.write_symbol("question", 41)
...     guest.run_until_ucall(vcpu), guest.read_symbol("answer")
(<Ucall.SYNC: 'UCALL_SYNC'>, 42)

A failed ioctl raises an error with the request, its arguments and the errno by name:

>>> with Kvm() as kvm, kvm.create_vm() as vm:
...     vm.get_dirty_log(0, bytearray(8))
Traceback (most recent call last):
kvm_util.ioctl.KvmError: KVM_GET_DIRTY_LOG(slot=0): ENOENT (No such file or directory)
"""

from kvm_util.guest import GuestError, GuestVm, Ucall
from kvm_util.guest_program import GuestProgram, GuestProgramError
from kvm_util.host_limits import HostLimit
from kvm_util.ioctl import KvmError
from kvm_util.kvm import Kvm, KvmUnavailable
from kvm_util.memory import BACKINGS, GuestMemory, GuestMemoryError
from kvm_util.vcpu import Vcpu
from kvm_util.vm import Memslot, Vm

__all__ = [
    "BACKINGS",
    "GuestError",
    "GuestMemory",
    "GuestMemoryError",
    "GuestProgram",
    "GuestProgramError",
    "GuestVm",
    "HostLimit",
    "Kvm",
    "KvmError",
    "KvmUnavailable",
    "Memslot",
    "Ucall",
    "Vcpu",
    "Vm",
]
