# SPDX-License-Identifier: GPL-2.0-only
"""An operation with which a guest exits to user space in the middle of its list, for the tests in memory/ and x86_64/."""

from dirty_tracking.scripted_vm import Operation
from kvm_util import uapi
from kvm_util.vcpu import Vcpu

PORT = 0xE2
PAUSE = Operation("port_output", PORT)


def paused(vcpu: Vcpu) -> bool:
    """Whether the last exit is a PAUSE."""
    return vcpu.run.exit_reason == uapi.KVM_EXIT_IO and bool(vcpu.run.io.port == PORT)
