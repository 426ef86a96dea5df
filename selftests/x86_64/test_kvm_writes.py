# SPDX-License-Identifier: GPL-2.0-only
"""What KVM itself writes into a guest's memory, for the guest's sake or for user space's, is reported like a store."""

import ctypes
import errno
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from dirty_tracking.tracked_vm import FIRST_GPA, GVA_OFFSET, PAGE, Operation, TrackedVm
from kvm_util import uapi as kvm_uapi
from kvm_util.arch import current as arch
from kvm_util.arch.x86_64 import msr, uapi
from kvm_util.guest import GuestError
from kvm_util.host import Host
from kvm_util.ioctl import KvmError, ioctl
from kvm_util.kvm import Kvm
from kvm_util.userfault import MissingPages
from kvm_util.vcpu import Vcpu
from kvm_util.vm import Vm

SLOT, NEIGHBOUR, LATE = 1, 2, 3
NPAGES = 24
AREA, DATA = 5, 9
AREA_GPA = FIRST_GPA + AREA * PAGE
# KVM pushes each of its own writes to a ring, so one event may have several entries (mark_page_dirty_in_slot())
MANY = 1000
# <asm/kvm_para.h>, <linux/kvm_para.h>
KVM_HC_CLOCK_PAIRING, KVM_CLOCK_PAIRING_WALLCLOCK, KVM_EOPNOTSUPP = 9, 0, 95
XEN_REGISTER = 0x40000200  # any that nothing else has
DEADLINE = 10.0  # seconds


def filled(vm: TrackedVm) -> TrackedVm:
    """Two tracked slots side by side, all of whose pages the guest has read."""
    vm.add_slot(SLOT, FIRST_GPA, NPAGES)
    vm.add_slot(NEIGHBOUR, FIRST_GPA + NPAGES * PAGE, NPAGES)
    vm.run(*(Operation("load", vm.address(slot, page)) for slot in (SLOT, NEIGHBOUR) for page in range(NPAGES)))
    vm.assert_dirty("loads of all pages", {})
    return vm


@pytest.fixture
def tracked(kvm: Kvm, log_mode: str) -> Iterator[TrackedVm]:
    with TrackedVm(kvm, log_mode) as vm:
        yield filled(vm)


@pytest.fixture
def with_irqchip(kvm: Kvm, log_mode: str) -> Iterator[TrackedVm]:
    """The same, with the interrupt controllers in the kernel."""
    if not kvm.check_extension(uapi.KVM_CAP_IRQCHIP):
        pytest.skip("no KVM_CAP_IRQCHIP")
    with TrackedVm(kvm, log_mode, prepare=lambda vm: arch.create_irqchip(vm.fd)) as vm:
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
def test_an_area_that_a_register_names_is_reported(with_irqchip: TrackedVm, what: Area) -> None:
    """The page, and no other; it holds what KVM wrote."""
    vm, (vcpu,) = with_irqchip, with_irqchip.vm.vcpus
    vm.write(SLOT, *range(NPAGES), value=(1 << 64) - 1)
    vm.assert_dirty("stores to all pages", {SLOT: range(NPAGES)})
    before = area(vm)
    try:
        if what.by_guest:
            vm.run(Operation("wrmsr", what.register, what.value))
        else:
            if what.register == msr.HV_X64_MSR_HYPERCALL:
                arch.set_msr(vcpu.fd, msr.HV_X64_MSR_GUEST_OS_ID, 1)
            arch.set_msr(vcpu.fd, what.register, what.value)
    except (GuestError, ValueError) as error:
        if isinstance(error, GuestError) and "#GP" not in str(error):
            raise
        pytest.skip(f"{what.name}: KVM does not have the register: {str(error).splitlines()[0]}")
    vm.run()
    assert area(vm) != before
    vm.assert_dirty(f"{what.name} at page {AREA}", {SLOT: [AREA]}, MANY)


def test_the_clock_is_reported_whenever_it_is_written(
    kvm: Kvm,
    tracked: TrackedVm,
) -> None:
    """Again and again, here as user space tells the guest that it was stopped."""
    if not kvm.check_extension(uapi.KVM_CAP_KVMCLOCK_CTRL):
        pytest.skip("no KVM_CAP_KVMCLOCK_CTRL")
    (vcpu,) = tracked.vm.vcpus
    tracked.run(Operation("wrmsr", msr.MSR_KVM_SYSTEM_TIME_NEW, AREA_GPA | msr.KVM_MSR_ENABLED))
    tracked.run()
    tracked.assert_dirty("kvmclock", {SLOT: [AREA]}, MANY)
    for _ in range(3):
        before = area(tracked)
        ioctl(vcpu.fd, uapi.KVM_KVMCLOCK_CTRL, "KVM_KVMCLOCK_CTRL")
        tracked.run()
        assert area(tracked) != before
        tracked.assert_dirty("kvmclock after KVM_KVMCLOCK_CTRL", {SLOT: [AREA]}, MANY)


def test_steal_time_is_reported_at_each_run(tracked: TrackedVm) -> None:
    """KVM writes it as the vCPU begins to run, and where it stops."""
    tracked.run(Operation("wrmsr", msr.MSR_KVM_STEAL_TIME, AREA_GPA | msr.KVM_MSR_ENABLED))
    for _ in range(3):
        tracked.collect()
        tracked.run()
        tracked.assert_dirty("steal time", {SLOT: [AREA]}, MANY)


@pytest.fixture
def with_apic(with_irqchip: TrackedVm) -> TrackedVm:
    """The same, with the vCPU's local APIC switched on; and the area's page is full of ones."""
    with_irqchip.run(
        Operation("wrmsr", msr.MSR_IA32_APICBASE, 0xFEE00000 | 1 << 8 | msr.X2APIC_ENABLE),
        Operation("wrmsr", msr.X2APIC_SPIV, msr.APIC_SPIV_APIC_ENABLED | 0xFF),
    )
    with_irqchip.write(SLOT, AREA, value=(1 << 64) - 1)
    with_irqchip.assert_dirty("a store", {SLOT: [AREA]})
    return with_irqchip


@pytest.fixture
def software_apic(with_apic: TrackedVm, host: Host) -> TrackedVm:
    """The same where KVM itself delivers the interrupts: hardware that does leaves it no occasion to write these areas."""
    for name in ("kvm_intel.enable_apicv", "kvm_amd.avic"):
        if host.parameters.get(name) in ("Y", "1"):
            pytest.skip(f"the CPU delivers interrupts by itself ({name}=Y)")
    return with_apic


def was_written(vm: TrackedVm, what: str, emulates: bool) -> None:
    """KVM has written the area; a backend of its own may do without."""
    if emulates and area(vm)[:8] == b"\xff" * 8:
        pytest.skip(f"{what}: this backend emulates every instruction, and does not write the area")
    assert area(vm)[:8] != b"\xff" * 8, f"{what}: KVM did not write the area"


def test_the_pv_eoi_area_is_reported(software_apic: TrackedVm, emulates: bool) -> None:
    """KVM writes it as it injects an interrupt, and takes that back at the next exit."""
    software_apic.run(Operation("wrmsr", msr.MSR_KVM_PV_EOI_EN, AREA_GPA | msr.KVM_MSR_ENABLED))
    software_apic.assert_dirty("switching PV EOI on", {})
    vector = software_apic.guest.program.symbols["INTERRUPT_VECTOR"]
    software_apic.run(Operation("wrmsr", msr.X2APIC_SELF_IPI, vector), Operation("take_interrupts"))
    was_written(software_apic, "PV EOI", emulates)
    software_apic.assert_dirty("an interrupt with PV EOI", {SLOT: [AREA]}, MANY)


def test_the_apic_page_that_user_space_names_is_reported(
    kvm: Kvm,
    software_apic: TrackedVm,
    emulates: bool,
) -> None:
    """KVM_SET_VAPIC_ADDR: KVM writes there what the APIC has pending, when it looks at that before an entry."""
    if not kvm.check_extension(uapi.KVM_CAP_VAPIC):
        pytest.skip("no KVM_CAP_VAPIC")
    (vcpu,) = software_apic.vm.vcpus
    request = uapi.kvm_vapic_addr(vapic_addr=AREA_GPA)
    ioctl(vcpu.fd, uapi.KVM_SET_VAPIC_ADDR, "KVM_SET_VAPIC_ADDR", ctypes.byref(request))
    vector = software_apic.guest.program.symbols["INTERRUPT_VECTOR"]
    for _ in range(2):
        software_apic.write(SLOT, AREA, value=(1 << 64) - 1)
        software_apic.collect()
        software_apic.run(Operation("wrmsr", msr.X2APIC_SELF_IPI, vector))
        was_written(software_apic, "KVM_SET_VAPIC_ADDR", emulates)
        software_apic.assert_dirty("an interrupt that is pending, with a virtual APIC page", {SLOT: [AREA]}, MANY)


def test_async_page_faults_are_reported(with_apic: TrackedVm, emulates: bool) -> None:
    """KVM writes the area when a page is missing on the host, and again when it is there."""
    if emulates:
        pytest.skip(
            "asynchronous page faults: this backend emulates every instruction, and waits for the page as it does"
        )
    vm, (vcpu,) = with_apic, with_apic.vm.vcpus
    late = vm.add_slot(LATE, FIRST_GPA + 4 * NPAGES * PAGE, 1, tracked=False)
    vector = vm.guest.program.symbols["INTERRUPT_VECTOR"]
    flags = msr.KVM_MSR_ENABLED | msr.KVM_ASYNC_PF_SEND_ALWAYS | msr.KVM_ASYNC_PF_DELIVERY_AS_INT
    vm.write(SLOT, AREA, value=0)
    vm.assert_dirty("a store", {SLOT: [AREA]})
    vm.run(
        Operation("wrmsr", msr.MSR_KVM_ASYNC_PF_INT, vector),
        Operation("wrmsr", msr.MSR_KVM_ASYNC_PF_EN, AREA_GPA | flags),
    )
    vm.run()
    vm.assert_dirty("switching asynchronous page faults on, which has KVM wake all", {SLOT: [AREA]}, MANY)
    vm.run(Operation("store_8", vm.address(SLOT, AREA)), Operation("wrmsr", msr.MSR_KVM_ASYNC_PF_ACK, 1))
    vm.assert_dirty("the guest's answer to that", {SLOT: [AREA]})
    with MissingPages(late.memory.hva, PAGE) as missing:
        # A KVM that waits for the page, instead of telling the guest, is let go, for the check below to fail.
        rescue = threading.Timer(DEADLINE, missing.give, [late.memory.hva])
        rescue.start()
        with pytest.raises(GuestError, match="#PF"):
            vm.run(Operation("interruptible_load", vm.address(LATE, 0)))
        rescue.cancel()
        assert area(vm)[:4] != bytes(4)
        vm.assert_dirty("a page that is not there", {SLOT: [AREA]}, MANY)
        missing.give(missing.wait(DEADLINE))
        until = time.monotonic() + DEADLINE
        while area(vm)[4:8] == bytes(4) and time.monotonic() < until:
            vcpu.kvm_run()
    assert area(vm)[4:8] != bytes(4), f"KVM did not say within {DEADLINE} s that the page is there"
    vm.assert_dirty("a page that is there now", {SLOT: [AREA]}, MANY)


@pytest.mark.parametrize("offset", [16, PAGE - 16], ids=["one-page", "two-pages"])
def test_clock_pairing_is_reported(tracked: TrackedVm, emulates: bool, offset: int) -> None:
    """KVM_HC_CLOCK_PAIRING: KVM writes the host's time, with the guest's TSC at it, where the guest asks for it."""
    if emulates:
        # em_hypercall(), arch/x86/kvm/emulate.c, again and again: there is no end to it.
        pytest.skip("hypercalls: this backend emulates every instruction, and KVM's emulator leaves these to the CPU")
    (vcpu,) = tracked.vm.vcpus
    pages = [AREA] if offset == 16 else [AREA, AREA + 1]
    for _ in range(2):
        tracked.write(SLOT, *pages, value=(1 << 64) - 1)
        tracked.assert_dirty("stores", {SLOT: pages})
        before = bytes(tracked.vm.memslots[SLOT].memory.view)
        tracked.run(Operation("hypercall", KVM_HC_CLOCK_PAIRING, AREA_GPA + offset, KVM_CLOCK_PAIRING_WALLCLOCK))
        answer = ctypes.c_int64(arch.get_regs(vcpu.fd).r12).value
        if answer == -KVM_EOPNOTSUPP:
            pytest.skip("KVM_HC_CLOCK_PAIRING: the host's clock is not the TSC (KVM_EOPNOTSUPP)")
        assert answer == 0
        assert tracked.changed_pages(SLOT, before) == pages
        tracked.assert_dirty("KVM_HC_CLOCK_PAIRING", {SLOT: pages})


def have_xen(kvm: Kvm, vm: TrackedVm, flag: str) -> None:
    """Have KVM behave like Xen to the guest; skips where it does not offer *flag* (api.rst, KVM_XEN_HVM_CONFIG)."""
    if not kvm.check_extension(uapi.KVM_CAP_XEN_HVM) & getattr(uapi, flag):
        pytest.skip(f"KVM_CAP_XEN_HVM does not offer {flag}")
    config = uapi.kvm_xen_hvm_config(flags=uapi.KVM_XEN_HVM_CONFIG_INTERCEPT_HCALL, msr=XEN_REGISTER)
    ioctl(vm.vm.fd, uapi.KVM_XEN_HVM_CONFIG, "KVM_XEN_HVM_CONFIG", ctypes.byref(config))


def test_the_xen_hypercall_page_is_reported(kvm: Kvm, tracked: TrackedVm) -> None:
    """KVM fills the page that the guest names in the register that user space chose."""
    have_xen(kvm, tracked, "KVM_XEN_HVM_CONFIG_INTERCEPT_HCALL")
    tracked.run(Operation("wrmsr", XEN_REGISTER, AREA_GPA))
    assert area(tracked) != bytes(PAGE)
    tracked.assert_dirty("the hypercall page", {SLOT: [AREA]}, MANY)


@dataclass(frozen=True)
class XenArea:
    """What KVM keeps up to date for a vCPU at an address that user space names (api.rst, KVM_XEN_VCPU_SET_ATTR).

    :ivar at_each_run: whether KVM writes it at each run, and not only when the clock is updated
    """

    name: str
    kind: int
    needs: str
    at_each_run: bool = False
    offset: int = 0
    pages: tuple[int, ...] = (AREA,)


XEN_AREAS = [
    XenArea("vcpu-info", uapi.KVM_XEN_VCPU_ATTR_TYPE_VCPU_INFO, "KVM_XEN_HVM_CONFIG_SHARED_INFO"),
    XenArea("time-info", uapi.KVM_XEN_VCPU_ATTR_TYPE_VCPU_TIME_INFO, "KVM_XEN_HVM_CONFIG_SHARED_INFO"),
    XenArea("runstate", uapi.KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_ADDR, "KVM_XEN_HVM_CONFIG_RUNSTATE", True),
    XenArea(
        "runstate-in-two-pages", uapi.KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_ADDR, "KVM_XEN_HVM_CONFIG_RUNSTATE", True,
        PAGE - 16, (AREA, AREA + 1),
    ),
]  # fmt: skip


@pytest.mark.parametrize("what", XEN_AREAS, ids=lambda what: what.name)
def test_a_xen_area_is_reported(kvm: Kvm, host: Host, tracked: TrackedVm, what: XenArea) -> None:
    """Event channels' bits alone are exempt (api.rst, KVM_XEN_VCPU_ATTR_TYPE_VCPU_INFO); none is delivered here."""
    have_xen(kvm, tracked, what.needs)
    (vcpu,) = tracked.vm.vcpus
    before = area(tracked)
    attribute = uapi.kvm_xen_vcpu_attr(type=what.kind)
    attribute.u[0] = AREA_GPA + what.offset
    try:
        ioctl(vcpu.fd, uapi.KVM_XEN_VCPU_SET_ATTR, "KVM_XEN_VCPU_SET_ATTR", ctypes.byref(attribute))
    except KvmError as error:
        # "KVM: x86/xen: Allow XEN_RUNSTATE to straddle page boundary" came with Linux 6.2.
        if error.errno != errno.EINVAL or len(what.pages) == 1 or host.kernel_version >= (6, 2):
            raise
        pytest.skip(f"Xen's {what.name}: an area in two pages is refused before Linux 6.2")
    tracked.run()
    assert area(tracked) != before
    tracked.assert_dirty(f"Xen's {what.name}", {SLOT: what.pages}, MANY)
    for _ in range(2):
        before = area(tracked)
        tracked.run()
        # KVM may have the clock updated some time after it began, or at each run (kvm_gen_kvmclock_update(), x86.c).
        written = what.at_each_run or area(tracked) != before
        tracked.assert_dirty(f"Xen's {what.name} at the next run", {SLOT: what.pages if written else ()}, MANY)


def test_a_message_of_a_hyperv_timer_is_reported(
    kvm: Kvm,
    with_irqchip: TrackedVm,
) -> None:
    """KVM puts it into the message page when the timer expires; a second one has to wait, and a flag says so."""
    if not kvm.check_extension(uapi.KVM_CAP_HYPERV_SYNIC2):
        pytest.skip("no KVM_CAP_HYPERV_SYNIC2")
    vm, (vcpu,) = with_irqchip, with_irqchip.vm.vcpus
    source = 2
    vcpu.enable_cap(uapi.KVM_CAP_HYPERV_SYNIC2)
    for register, value in (
        (msr.HV_X64_MSR_SCONTROL, 1),
        (msr.HV_X64_MSR_SIMP, AREA_GPA | 1),
        (msr.HV_X64_MSR_SINT0 + source, vm.guest.program.symbols["INTERRUPT_VECTOR"]),
        # A time that has passed
        (msr.HV_X64_MSR_STIMER0_COUNT, 1),
    ):
        arch.set_msr(vcpu.fd, register, value)
    vm.run()
    vm.assert_dirty("a message page without a message", {})
    for what in ("a message", "the flag that another one waits"):
        before = area(vm)
        arch.set_msr(vcpu.fd, msr.HV_X64_MSR_STIMER0_CONFIG, source << msr.HV_STIMER_SINT_SHIFT | msr.HV_STIMER_ENABLE)
        vm.run()
        assert area(vm) != before
        vm.assert_dirty(what, {SLOT: [AREA]}, MANY)


@pytest.mark.parametrize("offset", [16, PAGE - 16], ids=["one-page", "two-pages"])
def test_a_copy_from_a_device_is_reported(tracked: TrackedVm, offset: int) -> None:
    """A string move out of an address without memory: user space gives the data, and KVM's emulator stores them."""
    device = FIRST_GPA + 64 * NPAGES * PAGE
    tracked.map(device, 1)
    words = 4

    def answer(vcpu: Vcpu) -> bool:
        run = vcpu.run
        if run.exit_reason != kvm_uapi.KVM_EXIT_MMIO or run.mmio.is_write:
            return False
        ctypes.memset(ctypes.addressof(run.mmio.data), 0x5A, run.mmio.len)
        return True

    move = Operation("rep_movsq", tracked.address(SLOT, DATA, offset), device + GVA_OFFSET, words)
    tracked.run(move, on_exit=answer)
    first = DATA * PAGE + offset
    assert bytes(tracked.vm.memslots[SLOT].memory.view[first : first + 8 * words]) == b"\x5a" * 8 * words
    tracked.assert_dirty("rep movsq from a device", {SLOT: [DATA] if offset == 16 else [DATA, DATA + 1]}, MANY)


def test_the_set_up_of_kvms_own_pages_is_not_reported(kvm: Kvm, log_mode: str) -> None:
    """The TSS and the identity map for real mode lie in slots that are KVM's own, and no vCPU runs when they are made.

    That must not end in a ring, or in a WARN: "KVM: X86: Don't track dirty for KVM_SET_[TSS_ADDR|IDENTITY_MAP_ADDR]".
    """
    tss = 0xFEFFD000

    def set_addresses(vm: Vm) -> None:
        identity = ctypes.c_uint64(tss - PAGE)
        ioctl(vm.fd, uapi.KVM_SET_IDENTITY_MAP_ADDR, "KVM_SET_IDENTITY_MAP_ADDR", ctypes.byref(identity))
        ioctl(vm.fd, uapi.KVM_SET_TSS_ADDR, "KVM_SET_TSS_ADDR", tss)

    with TrackedVm(kvm, log_mode, prepare=set_addresses) as vm:
        # The calls do nothing on backends that need no such pages; and where KVM has a slot, user space can have none.
        try:
            vm.add_slot(LATE, tss, 1, tracked=False)
        except KvmError as error:
            if error.errno != errno.EEXIST:
                raise
        else:
            pytest.skip("KVM makes no slot for the TSS here; kvm_intel does, loaded with unrestricted_guest=0")
        vm.add_slot(SLOT, FIRST_GPA, NPAGES)
        vm.assert_dirty("KVM_SET_IDENTITY_MAP_ADDR and KVM_SET_TSS_ADDR", {})
        vm.write(SLOT, DATA)
        vm.assert_dirty("a store", {SLOT: [DATA]})
