# SPDX-License-Identifier: GPL-2.0-only
"""What KVM itself writes into a guest's memory, for the guest's sake or for user space's, is reported like a store."""

import ctypes
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from lib.arch import current as arch
from lib.arch.x86_64 import msr, uapi
from lib.guest import GuestError
from lib.ioctl import KvmError, ioctl
from lib.kvm import Kvm
from lib.tracked_vm import FIRST_GPA, PAGE, Operation, TrackedVm
from lib.vm import Vm

SLOT, NEIGHBOUR = 1, 2
NPAGES = 24
AREA, DATA = 5, 9
AREA_GPA = FIRST_GPA + AREA * PAGE
# KVM pushes each of its own writes to a ring, so one event may have several entries (mark_page_dirty_in_slot())
MANY = 1000


def create_irqchip(vm: Vm) -> None:
    """Have KVM emulate the interrupt controllers."""
    ioctl(vm.fd, uapi.KVM_CREATE_IRQCHIP, "KVM_CREATE_IRQCHIP")


def filled(vm: TrackedVm) -> TrackedVm:
    """Two tracked slots side by side, all of whose pages the guest has read."""
    vm.add_slot(SLOT, FIRST_GPA, NPAGES)
    vm.add_slot(NEIGHBOUR, FIRST_GPA + NPAGES * PAGE, NPAGES)
    vm.run(*(Operation("load", vm.address(slot, page)) for slot in (SLOT, NEIGHBOUR) for page in range(NPAGES)))
    vm.expect("loads of all pages", {})
    return vm


@pytest.fixture
def tracked(kvm: Kvm, log_mode: str) -> Iterator[TrackedVm]:
    with TrackedVm(kvm, log_mode) as vm:
        yield filled(vm)


@pytest.fixture
def with_irqchip(kvm: Kvm, log_mode: str, lacks: Callable[[str], None]) -> Iterator[TrackedVm]:
    """The same, with the interrupt controllers in the kernel."""
    if not kvm.check_extension(uapi.KVM_CAP_IRQCHIP):
        lacks("no KVM_CAP_IRQCHIP")
    with TrackedVm(kvm, log_mode, prepare=create_irqchip) as vm:
        yield filled(vm)


def area(vm: TrackedVm) -> bytes:
    """What the area's page holds."""
    return bytes(vm.vm.memslots[SLOT].memory.view[AREA * PAGE : (AREA + 1) * PAGE])


@dataclass(frozen=True)
class Area:
    """A register that has KVM write to the page at AREA: when it is set, or when the vCPU runs next."""

    name: str
    register: int
    value: int
    by_guest: bool = True


AREAS = [
    Area("kvmclock", msr.MSR_KVM_SYSTEM_TIME_NEW, AREA_GPA | msr.KVM_MSR_ENABLED),
    Area("wall-clock", msr.MSR_KVM_WALL_CLOCK_NEW, AREA_GPA),
    Area("steal-time", msr.MSR_KVM_STEAL_TIME, AREA_GPA | msr.KVM_MSR_ENABLED),
    Area("kvmclock", msr.MSR_KVM_SYSTEM_TIME_NEW, AREA_GPA | msr.KVM_MSR_ENABLED, by_guest=False),
    Area("wall-clock", msr.MSR_KVM_WALL_CLOCK_NEW, AREA_GPA, by_guest=False),
    Area("steal-time", msr.MSR_KVM_STEAL_TIME, AREA_GPA | msr.KVM_MSR_ENABLED, by_guest=False),
    # Guests may set Hyper-V's registers only where CPUID says Hyper-V; user space may always.
    Area("hyperv-hypercall-page", msr.HV_X64_MSR_HYPERCALL, AREA_GPA | 1, by_guest=False),
    Area("hyperv-vp-assist-page", msr.HV_X64_MSR_VP_ASSIST_PAGE, AREA_GPA | 1, by_guest=False),
    Area("hyperv-reference-tsc", msr.HV_X64_MSR_REFERENCE_TSC, AREA_GPA | 1, by_guest=False),
]


@pytest.mark.parametrize("what", AREAS, ids=lambda a: f"{a.name}-by-{'guest' if a.by_guest else 'user-space'}")
def test_an_area_that_a_register_names_is_reported(
    with_irqchip: TrackedVm, lacks: Callable[[str], None], what: Area
) -> None:
    """The page, and no other; it holds what KVM wrote."""
    vm, (vcpu,) = with_irqchip, with_irqchip.vm.vcpus
    vm.write(SLOT, *range(AREA * 0, NPAGES), value=(1 << 64) - 1)
    vm.expect("stores to all pages", {SLOT: range(NPAGES)})
    before = area(vm)
    try:
        if what.by_guest:
            vm.run(Operation("wrmsr", what.register, what.value))
        else:
            if what.register == msr.HV_X64_MSR_HYPERCALL:
                arch.set_msr(vcpu.fd, msr.HV_X64_MSR_GUEST_OS_ID, 1)
            arch.set_msr(vcpu.fd, what.register, what.value)
    except (GuestError, ValueError) as error:
        lacks(f"{what.name}: KVM does not have the register: {str(error).splitlines()[0]}")
    vm.run()
    assert area(vm) != before
    vm.expect(f"{what.name} at page {AREA}", {SLOT: [AREA]}, MANY)
