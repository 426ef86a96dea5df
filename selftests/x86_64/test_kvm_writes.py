# SPDX-License-Identifier: GPL-2.0-only
"""What KVM itself writes to guest memory, on behalf of the guest or of user space, is logged like a store of the guest."""

import ctypes
import errno
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from dirty_tracking.scripted_vm import Operation, ScriptedVm
from dirty_tracking.vm import FIRST_GPA, GVA_OFFSET, PAGE
from kvm_util import uapi as kvm_uapi
from kvm_util.arch import current as arch
from kvm_util.arch.x86_64 import msr, uapi
from kvm_util.arch.x86_64.cpuid import with_hyperv
from kvm_util.guest import GuestError
from kvm_util.host import Host
from kvm_util.ioctl import KvmError, ioctl
from kvm_util.kvm import Kvm
from kvm_util.userfault import MissingPages
from kvm_util.vcpu import Vcpu
from kvm_util.vm import Vm
from selftests.stores import NPAGES, SLOT, SLOT_GPA, add_loaded_slots

LATE = 3
AREA, DATA = 5, 9
AREA_GPA = SLOT_GPA + AREA * PAGE
# KVM pushes each of its own writes to a ring, so one event may have several entries (mark_page_dirty_in_slot())
MANY = 1000
# <asm/kvm_para.h>, <linux/kvm_para.h>
KVM_HC_CLOCK_PAIRING, KVM_CLOCK_PAIRING_WALLCLOCK, KVM_EOPNOTSUPP = 9, 0, 95
MESSAGE_SOURCE = 2
XEN_MSR = 0x40000200  # a number that no other MSR has
DEADLINE = 10.0  # seconds


@pytest.fixture
def irqchip_vm(kvm: Kvm, log_mode: str) -> Iterator[ScriptedVm]:
    """As logged_vm, with the interrupt controllers in the kernel."""
    if not kvm.check_extension(uapi.KVM_CAP_IRQCHIP):
        pytest.skip("no KVM_CAP_IRQCHIP")
    with ScriptedVm(kvm, log_mode, prepare=lambda vm: arch.create_irqchip(vm.fd)) as vm:
        add_loaded_slots(vm)
        yield vm


def area(vm: ScriptedVm) -> bytes:
    """The contents of the page at AREA."""
    return bytes(vm.vm.memslots[SLOT].memory.view[AREA * PAGE : (AREA + 1) * PAGE])


@dataclass(frozen=True)
class MsrArea:
    """An MSR that makes KVM write to the page at AREA: when it is set, or when the vCPU runs next."""

    name: str
    register: int
    value: int
    by_guest: bool = True


MSR_AREAS = [
    MsrArea("kvmclock", msr.MSR_KVM_SYSTEM_TIME_NEW, AREA_GPA | msr.KVM_MSR_ENABLED),
    MsrArea("wall-clock", msr.MSR_KVM_WALL_CLOCK_NEW, AREA_GPA),
    MsrArea("steal-time", msr.MSR_KVM_STEAL_TIME, AREA_GPA | msr.KVM_MSR_ENABLED),
    MsrArea("kvmclock", msr.MSR_KVM_SYSTEM_TIME_NEW, AREA_GPA | msr.KVM_MSR_ENABLED, by_guest=False),
    MsrArea("wall-clock", msr.MSR_KVM_WALL_CLOCK_NEW, AREA_GPA, by_guest=False),
    MsrArea("steal-time", msr.MSR_KVM_STEAL_TIME, AREA_GPA | msr.KVM_MSR_ENABLED, by_guest=False),
    # A guest may set Hyper-V's MSRs only where its CPUID has Hyper-V; user space may always.
    MsrArea("hyperv-hypercall-page", msr.HV_X64_MSR_HYPERCALL, AREA_GPA | 1, by_guest=False),
    MsrArea("hyperv-vp-assist-page", msr.HV_X64_MSR_VP_ASSIST_PAGE, AREA_GPA | 1, by_guest=False),
    MsrArea("hyperv-reference-tsc", msr.HV_X64_MSR_REFERENCE_TSC, AREA_GPA | 1, by_guest=False),
]


@pytest.mark.parametrize("what", MSR_AREAS, ids=lambda a: f"{a.name}-by-{'guest' if a.by_guest else 'user-space'}")
def test_msr_named_area_is_logged(irqchip_vm: ScriptedVm, what: MsrArea) -> None:
    """KVM's write to the area that an MSR names dirties the gfn of that area, and no other."""
    vm, (vcpu,) = irqchip_vm, irqchip_vm.vm.vcpus
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
        pytest.skip(f"{what.name}: KVM does not have the MSR: {str(error).splitlines()[0]}")
    vm.run()
    assert area(vm) != before
    vm.assert_dirty(f"{what.name} at page {AREA}", {SLOT: [AREA]}, MANY)


def test_kvmclock_updates_are_logged(kvm: Kvm, logged_vm: ScriptedVm) -> None:
    """Each update of kvmclock dirties its gfn, here after KVM_KVMCLOCK_CTRL."""
    if not kvm.check_extension(uapi.KVM_CAP_KVMCLOCK_CTRL):
        pytest.skip("no KVM_CAP_KVMCLOCK_CTRL")
    logged_vm.run(Operation("wrmsr", msr.MSR_KVM_SYSTEM_TIME_NEW, AREA_GPA | msr.KVM_MSR_ENABLED))
    logged_vm.run()
    logged_vm.assert_dirty("kvmclock", {SLOT: [AREA]}, MANY)
    for _ in range(3):
        before = area(logged_vm)
        update_kvmclock(logged_vm)
        assert area(logged_vm) != before
        logged_vm.assert_dirty("kvmclock after KVM_KVMCLOCK_CTRL", {SLOT: [AREA]}, MANY)


def update_kvmclock(vm: ScriptedVm) -> None:
    """Have KVM write the vCPU's kvmclock."""
    ioctl(vm.vm.vcpus[0].fd, uapi.KVM_KVMCLOCK_CTRL, "KVM_KVMCLOCK_CTRL")
    vm.run()


def set_clock(vm: ScriptedVm) -> None:
    """Have KVM write the clocks of all vCPUs."""
    ioctl(vm.vm.fd, uapi.KVM_SET_CLOCK, "KVM_SET_CLOCK", ctypes.byref(uapi.kvm_clock_data(clock=1)))
    vm.run()


def set_xen_attribute(vm: ScriptedVm, kind: int, gpa: int) -> None:
    """KVM_XEN_VCPU_SET_ATTR with a gpa."""
    attribute = uapi.kvm_xen_vcpu_attr(type=kind)
    attribute.u[0] = gpa
    ioctl(vm.vm.vcpus[0].fd, uapi.KVM_XEN_VCPU_SET_ATTR, "KVM_XEN_VCPU_SET_ATTR", ctypes.byref(attribute))


def set_xen_update_flag(vm: ScriptedVm) -> None:
    """KVM_XEN_HVM_SET_ATTR: have KVM set XEN_RUNSTATE_UPDATE while it updates a run state."""
    attribute = uapi.kvm_xen_hvm_attr(type=uapi.KVM_XEN_ATTR_TYPE_RUNSTATE_UPDATE_FLAG)
    attribute.u[0] = 1
    ioctl(vm.vm.fd, uapi.KVM_XEN_HVM_SET_ATTR, "KVM_XEN_HVM_SET_ATTR", ctypes.byref(attribute))


def set_vapic_address(vm: ScriptedVm) -> None:
    """KVM_SET_VAPIC_ADDR with the page at AREA."""
    request = uapi.kvm_vapic_addr(vapic_addr=AREA_GPA)
    ioctl(vm.vm.vcpus[0].fd, uapi.KVM_SET_VAPIC_ADDR, "KVM_SET_VAPIC_ADDR", ctypes.byref(request))


def set_up_hyperv_messages(vm: ScriptedVm) -> None:
    """Have KVM post the messages of a Hyper-V timer to the page at AREA."""
    (vcpu,) = vm.vm.vcpus
    vcpu.enable_cap(uapi.KVM_CAP_HYPERV_SYNIC2)
    for register, value in (
        (msr.HV_X64_MSR_SCONTROL, 1),
        (msr.HV_X64_MSR_SIMP, AREA_GPA | 1),
        (msr.HV_X64_MSR_SINT0 + MESSAGE_SOURCE, vm.guest.program.symbols["INTERRUPT_VECTOR"]),
        # A time that has passed
        (msr.HV_X64_MSR_STIMER0_COUNT, 1),
    ):
        arch.set_msr(vcpu.fd, register, value)


def post_hyperv_message(vm: ScriptedVm) -> None:
    """Have KVM post a message, or the flag that another one is pending if the first is still there."""
    timer = MESSAGE_SOURCE << msr.HV_STIMER_SINT_SHIFT | msr.HV_STIMER_ENABLE
    arch.set_msr(vm.vm.vcpus[0].fd, msr.HV_X64_MSR_STIMER0_CONFIG, timer)
    vm.run()


def set_up_vp_assist_page(vm: ScriptedVm) -> None:
    """Have user space name the area as Hyper-V's VP assist page, in which KVM announces that an EOI is not needed."""
    arch.set_msr(vm.vm.vcpus[0].fd, msr.HV_X64_MSR_VP_ASSIST_PAGE, AREA_GPA | 1)


def self_ipi(vm: ScriptedVm) -> Operation:
    """The vCPU's interrupt to itself."""
    return Operation("wrmsr", msr.X2APIC_SELF_IPI, vm.guest.program.symbols["INTERRUPT_VECTOR"])


def test_steal_time_logged_at_each_run(logged_vm: ScriptedVm) -> None:
    """The gfn of the steal time is dirty after each KVM_RUN: KVM writes it as the vCPU starts and as it stops."""
    logged_vm.run(Operation("wrmsr", msr.MSR_KVM_STEAL_TIME, AREA_GPA | msr.KVM_MSR_ENABLED))
    for _ in range(3):
        logged_vm.collect()
        logged_vm.run()
        logged_vm.assert_dirty("steal time", {SLOT: [AREA]}, MANY)


@pytest.fixture
def apic_vm(irqchip_vm: ScriptedVm) -> ScriptedVm:
    """As irqchip_vm, with the vCPU's local APIC enabled, and with all bits set at the beginning of the page at AREA."""
    irqchip_vm.run(
        Operation("wrmsr", msr.MSR_IA32_APICBASE, 0xFEE00000 | 1 << 8 | msr.X2APIC_ENABLE),
        Operation("wrmsr", msr.X2APIC_SPIV, msr.APIC_SPIV_APIC_ENABLED | 0xFF),
    )
    irqchip_vm.write(SLOT, AREA, value=(1 << 64) - 1)
    irqchip_vm.assert_dirty("a store", {SLOT: [AREA]})
    return irqchip_vm


@pytest.fixture
def software_apic_vm(apic_vm: ScriptedVm, host: Host) -> ScriptedVm:
    """As apic_vm; skips where the CPU delivers interrupts itself, for then KVM does not write the areas of the APIC."""
    for name in ("kvm_intel.enable_apicv", "kvm_amd.avic"):
        if host.parameters.get(name) in ("Y", "1"):
            pytest.skip(f"the CPU delivers interrupts itself ({name}=Y)")
    return apic_vm


def assert_area_written(vm: ScriptedVm, what: str) -> None:
    """Check that KVM has written the area."""
    assert area(vm)[:8] != b"\xff" * 8, f"{what}: KVM did not write the area"


def skip_without_injection(what: str, emulates: bool) -> None:
    """Skip on a backend that emulates many instructions between two entries: KVM injects interrupts at entries only."""
    if emulates:
        pytest.skip(
            f"{what}: this backend emulates the guest's interrupt window in one batch, and injects no interrupt"
        )


def leave_interrupt_pending(vm: ScriptedVm) -> None:
    """Have KVM write the APIC's pending interrupts to the virtual APIC page.

    It does so before it enters the guest. A backend that emulates instructions in batches may have executed the guest's
    store to the APIC and its exit in one of them: then the next KVM_RUN writes the page.
    """
    vm.run(self_ipi(vm))
    vm.run()


def test_pv_eoi_area_is_logged(software_apic_vm: ScriptedVm, emulates: bool) -> None:
    """KVM's writes to the PV EOI area, as it injects an interrupt and at the next exit, dirty its gfn."""
    skip_without_injection("PV EOI", emulates)
    software_apic_vm.run(Operation("wrmsr", msr.MSR_KVM_PV_EOI_EN, AREA_GPA | msr.KVM_MSR_ENABLED))
    software_apic_vm.assert_dirty("enabling PV EOI", {})
    software_apic_vm.run(self_ipi(software_apic_vm), Operation("take_interrupts"))
    assert_area_written(software_apic_vm, "PV EOI")
    software_apic_vm.assert_dirty("an interrupt with PV EOI", {SLOT: [AREA]}, MANY)


def test_vapic_page_is_logged(kvm: Kvm, software_apic_vm: ScriptedVm) -> None:
    """KVM's write of the APIC's pending interrupts, before an entry, dirties the page that KVM_SET_VAPIC_ADDR named."""
    if not kvm.check_extension(uapi.KVM_CAP_VAPIC):
        pytest.skip("no KVM_CAP_VAPIC")
    set_vapic_address(software_apic_vm)
    for _ in range(2):
        software_apic_vm.write(SLOT, AREA, value=(1 << 64) - 1)
        software_apic_vm.collect()
        leave_interrupt_pending(software_apic_vm)
        assert_area_written(software_apic_vm, "KVM_SET_VAPIC_ADDR")
        software_apic_vm.assert_dirty("a pending interrupt with a virtual APIC page", {SLOT: [AREA]}, MANY)


@pytest.mark.parametrize("logged", [True, False], ids=["named-while-logged", "named-before"])
@pytest.mark.threads
def test_async_page_fault_area_is_logged(apic_vm: ScriptedVm, emulates: bool, logged: bool) -> None:
    """KVM's writes to the area of asynchronous page faults, when a page is missing and when it is present, dirty its gfn."""
    if emulates:
        pytest.skip(
            "asynchronous page faults: this backend emulates every instruction, and waits for the page meanwhile"
        )
    vm, (vcpu,) = apic_vm, apic_vm.vm.vcpus
    late = vm.add_slot(LATE, SLOT_GPA + 4 * NPAGES * PAGE, 1, logged=False)
    vector = vm.guest.program.symbols["INTERRUPT_VECTOR"]
    flags = msr.KVM_MSR_ENABLED | msr.KVM_ASYNC_PF_SEND_ALWAYS | msr.KVM_ASYNC_PF_DELIVERY_AS_INT
    vm.write(SLOT, AREA, value=0)
    vm.assert_dirty("a store", {SLOT: [AREA]})
    if not logged:
        vm.disable_dirty_logging(SLOT)
    vm.run(
        Operation("wrmsr", msr.MSR_KVM_ASYNC_PF_INT, vector),
        Operation("wrmsr", msr.MSR_KVM_ASYNC_PF_EN, AREA_GPA | flags),
    )
    vm.run()
    enabling = {SLOT: [AREA]} if logged else {}
    vm.assert_dirty("enabling asynchronous page faults, at which KVM sends a wakeup for all", enabling, MANY)
    if not logged:
        vm.enable_dirty_logging(SLOT)
    vm.run(Operation("store_8", vm.address(SLOT, AREA)), Operation("wrmsr", msr.MSR_KVM_ASYNC_PF_ACK, 1))
    vm.assert_dirty("the guest's acknowledgement", {SLOT: [AREA]})
    with MissingPages(late.memory.hva, PAGE) as missing:
        # If KVM waits for the page instead of notifying the guest, it gets the page here, and the check below fails.
        rescue = threading.Timer(DEADLINE, missing.provide, [late.memory.hva])
        rescue.start()
        with pytest.raises(GuestError, match="#PF"):
            vm.run(Operation("interruptible_load", vm.address(LATE, 0)))
        rescue.cancel()
        assert area(vm)[:4] != bytes(4)
        vm.assert_dirty("a page that is missing on the host", {SLOT: [AREA]}, MANY)
        missing.provide(missing.wait(DEADLINE))
        until = time.monotonic() + DEADLINE
        while area(vm)[4:8] == bytes(4) and time.monotonic() < until:
            vcpu.kvm_run()
    assert area(vm)[4:8] != bytes(4), f"KVM did not report the page as present within {DEADLINE} s"
    vm.assert_dirty("a page that is present again", {SLOT: [AREA]}, MANY)


@pytest.mark.parametrize("offset", [16, PAGE - 16], ids=["one-page", "two-pages"])
def test_clock_pairing_is_logged(logged_vm: ScriptedVm, emulates: bool, offset: int) -> None:
    """KVM's answer to KVM_HC_CLOCK_PAIRING dirties the gfns that the guest named, in one page or in two."""
    if emulates:
        # em_hypercall(), arch/x86/kvm/emulate.c, would run again and again without end.
        pytest.skip("hypercalls: this backend emulates every instruction, and KVM's emulator leaves these to the CPU")
    (vcpu,) = logged_vm.vm.vcpus
    pages = [AREA] if offset == 16 else [AREA, AREA + 1]
    for _ in range(2):
        logged_vm.write(SLOT, *pages, value=(1 << 64) - 1)
        logged_vm.assert_dirty("stores", {SLOT: pages})
        before = bytes(logged_vm.vm.memslots[SLOT].memory.view)
        logged_vm.run(Operation("hypercall", KVM_HC_CLOCK_PAIRING, AREA_GPA + offset, KVM_CLOCK_PAIRING_WALLCLOCK))
        answer = ctypes.c_int64(arch.get_regs(vcpu.fd).r12).value
        if answer == -KVM_EOPNOTSUPP:
            pytest.skip("KVM_HC_CLOCK_PAIRING: the host's clock is not the TSC (KVM_EOPNOTSUPP)")
        assert answer == 0
        assert logged_vm.changed_pages(SLOT, before) == pages
        logged_vm.assert_dirty("KVM_HC_CLOCK_PAIRING", {SLOT: pages})


def enable_xen(kvm: Kvm, vm: ScriptedVm, flag: str, hypercall_page: ctypes.Array[ctypes.c_char] | None = None) -> None:
    """Enable KVM's Xen interface for the guest; skips where KVM does not offer *flag* (api.rst, KVM_XEN_HVM_CONFIG).

    :param hypercall_page: the page for the guest to call Xen by; None for KVM's own
    """
    if not kvm.check_extension(uapi.KVM_CAP_XEN_HVM) & getattr(uapi, flag):
        pytest.skip(f"KVM_CAP_XEN_HVM does not offer {flag}")
    config = uapi.kvm_xen_hvm_config(flags=uapi.KVM_XEN_HVM_CONFIG_INTERCEPT_HCALL, msr=XEN_MSR)
    if hypercall_page is not None:
        config = uapi.kvm_xen_hvm_config(msr=XEN_MSR, blob_addr_64=ctypes.addressof(hypercall_page), blob_size_64=1)
    ioctl(vm.vm.fd, uapi.KVM_XEN_HVM_CONFIG, "KVM_XEN_HVM_CONFIG", ctypes.byref(config))


@pytest.mark.parametrize(
    ("needs", "content"),
    [("KVM_XEN_HVM_CONFIG_INTERCEPT_HCALL", None), ("KVM_XEN_HVM_CONFIG_HYPERCALL_MSR", b"\xa5" * PAGE)],
    ids=["by-kvm", "by-user-space"],
)
def test_xen_hypercall_page_is_logged(kvm: Kvm, logged_vm: ScriptedVm, needs: str, content: bytes | None) -> None:
    """KVM dirties the gfn of the Xen hypercall page as it fills that page, with its own code or with that of user space."""
    page = None if content is None else ctypes.create_string_buffer(content, PAGE)
    enable_xen(kvm, logged_vm, needs, page)
    for _ in range(2):
        logged_vm.write(SLOT, AREA, value=0)
        logged_vm.assert_dirty("a store", {SLOT: [AREA]})
        before = area(logged_vm)
        logged_vm.run(Operation("wrmsr", XEN_MSR, AREA_GPA))
        assert area(logged_vm) != before if content is None else area(logged_vm) == content
        logged_vm.assert_dirty("the hypercall page", {SLOT: [AREA]}, MANY)


@dataclass(frozen=True)
class XenArea:
    """An area that KVM keeps up to date for a vCPU, at an address that user space names (api.rst, KVM_XEN_VCPU_SET_ATTR).

    :ivar at_each_run: whether KVM writes it at each run, and not only when the clock is updated
    :ivar update_flag: whether KVM sets a flag in the area, with a write of its own, while it updates the rest; it clears the
        flag before it returns, so that only its marking of the page shows
    """

    name: str
    kind: int
    needs: str
    at_each_run: bool = False
    offset: int = 0
    pages: tuple[int, ...] = (AREA,)
    update_flag: bool = False


XEN_AREAS = [
    XenArea("vcpu-info", uapi.KVM_XEN_VCPU_ATTR_TYPE_VCPU_INFO, "KVM_XEN_HVM_CONFIG_SHARED_INFO"),
    XenArea("time-info", uapi.KVM_XEN_VCPU_ATTR_TYPE_VCPU_TIME_INFO, "KVM_XEN_HVM_CONFIG_SHARED_INFO"),
    XenArea("runstate", uapi.KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_ADDR, "KVM_XEN_HVM_CONFIG_RUNSTATE", True),
    XenArea(
        "runstate-in-two-pages", uapi.KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_ADDR, "KVM_XEN_HVM_CONFIG_RUNSTATE", True,
        PAGE - 16, (AREA, AREA + 1),
    ),
    XenArea(
        "runstate-with-update-flag", uapi.KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_ADDR,
        "KVM_XEN_HVM_CONFIG_RUNSTATE_UPDATE_FLAG", True, update_flag=True,
    ),
    XenArea(
        "runstate-in-two-pages-with-update-flag", uapi.KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_ADDR,
        "KVM_XEN_HVM_CONFIG_RUNSTATE_UPDATE_FLAG", True, PAGE - 16, (AREA, AREA + 1), True,
    ),
]  # fmt: skip


@pytest.mark.parametrize("what", XEN_AREAS, ids=lambda what: what.name)
def test_xen_vcpu_area_is_logged(kvm: Kvm, host: Host, logged_vm: ScriptedVm, what: XenArea) -> None:
    """Each update of a Xen area of a vCPU dirties its gfns.

    Only the bits of event channels are exempt (api.rst, KVM_XEN_VCPU_ATTR_TYPE_VCPU_INFO); no event is delivered here.
    """
    enable_xen(kvm, logged_vm, what.needs)
    if what.update_flag:
        set_xen_update_flag(logged_vm)
    before = area(logged_vm)
    try:
        set_xen_attribute(logged_vm, what.kind, AREA_GPA + what.offset)
    except KvmError as error:
        # "KVM: x86/xen: Allow XEN_RUNSTATE to straddle page boundary" came with Linux 6.2.
        if error.errno != errno.EINVAL or len(what.pages) == 1 or host.kernel_version >= (6, 2):
            raise
        pytest.skip(f"Xen's {what.name}: an area in two pages is refused before Linux 6.2")
    logged_vm.run()
    assert area(logged_vm) != before
    logged_vm.assert_dirty(f"Xen's {what.name}", {SLOT: what.pages}, MANY)
    for _ in range(2):
        before = area(logged_vm)
        logged_vm.run()
        # KVM may have the clock updated some time after it began, or at each run (kvm_gen_kvmclock_update(), x86.c).
        written = what.at_each_run or area(logged_vm) != before
        logged_vm.assert_dirty(f"Xen's {what.name} at the next run", {SLOT: what.pages if written else ()}, MANY)


@dataclass(frozen=True)
class CachedArea:
    """An area that KVM knows before its memslot changes; it caches the memslots of most of them.

    :ivar set_up: has KVM know the area, at AREA
    :ivar update: has KVM write it
    :ivar xen: a flag of KVM_CAP_XEN_HVM that it needs
    :ivar capability: another capability that it needs, by name
    :ivar needs_apic: KVM writes it on behalf of an APIC that the CPU does not have
    :ivar needs_injection: KVM writes it as it injects an interrupt
    """

    name: str
    set_up: Callable[[ScriptedVm], None]
    update: Callable[[ScriptedVm], None]
    xen: str = ""
    capability: str = ""
    needs_apic: bool = False
    needs_injection: bool = False


def set_up_by_msr(register: int) -> Callable[[ScriptedVm], None]:
    """Have the guest name the area by an MSR."""
    return lambda vm: vm.run(Operation("wrmsr", register, AREA_GPA | msr.KVM_MSR_ENABLED))


def take_interrupt(vm: ScriptedVm) -> None:
    """Have KVM inject an interrupt, and the guest end it."""
    vm.run(self_ipi(vm), Operation("take_interrupts"), Operation("wrmsr", msr.X2APIC_EOI, 0))


CACHED_AREAS = [
    CachedArea(
        "kvmclock", set_up_by_msr(msr.MSR_KVM_SYSTEM_TIME_NEW), update_kvmclock, capability="KVM_CAP_KVMCLOCK_CTRL"
    ),
    CachedArea("steal-time", set_up_by_msr(msr.MSR_KVM_STEAL_TIME), lambda vm: vm.run()),
    CachedArea(
        "pv-eoi", set_up_by_msr(msr.MSR_KVM_PV_EOI_EN), take_interrupt, needs_apic=True, needs_injection=True
    ),
    CachedArea(
        "hyperv-vp-assist-page", set_up_vp_assist_page, take_interrupt,
        capability="KVM_CAP_HYPERV", needs_apic=True, needs_injection=True,
    ),
    CachedArea(
        "hyperv-message-page", set_up_hyperv_messages, post_hyperv_message, capability="KVM_CAP_HYPERV_SYNIC2"
    ),
    CachedArea("vapic", set_vapic_address, leave_interrupt_pending, capability="KVM_CAP_VAPIC", needs_apic=True),
    *(
        CachedArea(
            f"xen-{what.name}", lambda vm, kind=what.kind: set_xen_attribute(vm, kind, AREA_GPA), set_clock,  # type: ignore[misc]
            what.needs,
        )
        for what in XEN_AREAS
        if len(what.pages) == 1 and not what.update_flag
    ),
]  # fmt: skip


@pytest.mark.parametrize("what", CACHED_AREAS, ids=lambda what: what.name)
def test_area_named_before_slot_changed(
    kvm: Kvm, request: pytest.FixtureRequest, log_mode: str, emulates: bool, what: CachedArea
) -> None:
    """KVM's write to an area that it knew before is logged when its memslot is logged, moved or recreated later."""
    vm: ScriptedVm = request.getfixturevalue("software_apic_vm" if what.needs_apic else "irqchip_vm")
    if what.capability and not kvm.check_extension(getattr(uapi, what.capability)):
        pytest.skip(f"no {what.capability}")
    if what.needs_injection:
        skip_without_injection(what.name, emulates)
    if what.xen:
        enable_xen(kvm, vm, what.xen)
    vm.disable_dirty_logging(SLOT)
    what.set_up(vm)
    vm.write(SLOT, AREA, value=(1 << 64) - 1)
    what.update(vm)
    if what.needs_apic:
        assert_area_written(vm, what.name)

    def check(change: str, page: int) -> None:
        what.update(vm)
        vm.assert_dirty(f"{what.name}, {change}", {SLOT: [page]}, MANY)

    vm.enable_dirty_logging(SLOT)
    check("set up before dirty logging was enabled", AREA)
    vm.disable_dirty_logging(SLOT)
    what.update(vm)
    vm.enable_dirty_logging(SLOT)
    check("after dirty logging was disabled and enabled", AREA)
    memslot = vm.vm.memslots[SLOT]
    vm.vm.set_user_memory_region(SLOT, SLOT_GPA - PAGE, memslot.memory, memslot.flags)
    check("after its memslot was moved down by a page", AREA + 1)
    vm.vm.delete_memory_region(SLOT)
    vm.run()
    vm.vm.set_user_memory_region(SLOT, SLOT_GPA, memslot.memory)
    vm.enable_dirty_logging(SLOT)
    check("after its memslot was recreated", AREA)


def test_hyperv_timer_message_is_logged(kvm: Kvm, irqchip_vm: ScriptedVm) -> None:
    """KVM dirties the gfn of the message page as it posts a Hyper-V timer's message, or the flag that one is pending."""
    if not kvm.check_extension(uapi.KVM_CAP_HYPERV_SYNIC2):
        pytest.skip("no KVM_CAP_HYPERV_SYNIC2")
    set_up_hyperv_messages(irqchip_vm)
    irqchip_vm.run()
    irqchip_vm.assert_dirty("a message page without a message", {})
    for what in ("a message", "the flag that another message is pending"):
        before = area(irqchip_vm)
        post_hyperv_message(irqchip_vm)
        assert area(irqchip_vm) != before
        irqchip_vm.assert_dirty(what, {SLOT: [AREA]}, MANY)


@pytest.mark.parametrize("register", [msr.HV_X64_MSR_SIEFP, msr.HV_X64_MSR_SIMP], ids=["event-flags", "messages"])
def test_hyperv_page_clearing_is_logged(kvm: Kvm, log_mode: str, register: int) -> None:
    """KVM dirties the gfn of the page of event flags or messages that the guest enables, as it clears that page."""
    if not kvm.check_extension(uapi.KVM_CAP_HYPERV_SYNIC):
        pytest.skip("no KVM_CAP_HYPERV_SYNIC")
    with ScriptedVm(kvm, log_mode, prepare=lambda vm: arch.create_irqchip(vm.fd)) as vm:
        (vcpu,) = vm.vm.vcpus
        ioctl(vcpu.fd, uapi.KVM_SET_CPUID2, "KVM_SET_CPUID2", with_hyperv(kvm.supported_cpuid).buffer)
        vcpu.enable_cap(uapi.KVM_CAP_HYPERV_SYNIC)
        add_loaded_slots(vm)
        for _ in range(2):
            vm.write(SLOT, AREA, value=1)
            vm.assert_dirty("a store", {SLOT: [AREA]})
            vm.run(
                Operation("wrmsr", register, AREA_GPA | 1),
                on_exit=lambda vcpu: vcpu.run.exit_reason == kvm_uapi.KVM_EXIT_HYPERV,
            )
            assert area(vm) == bytes(PAGE)
            vm.assert_dirty("enabling the page", {SLOT: [AREA]}, MANY)


@pytest.mark.parametrize("offset", [16, PAGE - 16], ids=["one-page", "two-pages"])
def test_string_move_from_mmio_is_logged(logged_vm: ScriptedVm, offset: int) -> None:
    """A string move from an MMIO address, which KVM emulates with data of user space, dirties the gfns of its target."""
    device = SLOT_GPA + 64 * NPAGES * PAGE
    logged_vm.map(device, 1)
    words = 4

    def answer(vcpu: Vcpu) -> bool:
        run = vcpu.run
        if run.exit_reason != kvm_uapi.KVM_EXIT_MMIO or run.mmio.is_write:
            return False
        ctypes.memset(ctypes.addressof(run.mmio.data), 0x5A, run.mmio.len)
        return True

    move = Operation("rep_movsq", logged_vm.address(SLOT, DATA, offset), device + GVA_OFFSET, words)
    logged_vm.run(move, on_exit=answer)
    first = DATA * PAGE + offset
    assert bytes(logged_vm.vm.memslots[SLOT].memory.view[first : first + 8 * words]) == b"\x5a" * 8 * words
    logged_vm.assert_dirty("rep movsq from an MMIO address", {SLOT: [DATA] if offset == 16 else [DATA, DATA + 1]}, MANY)


def test_tss_and_identity_map_not_logged(kvm: Kvm, log_mode: str) -> None:
    """KVM's set-up of the TSS and of the identity map for real mode, in memslots of its own, dirties no gfn.

    No vCPU runs then, so a push to a ring would end in a WARN: "KVM: X86: Don't track dirty for
    KVM_SET_[TSS_ADDR|IDENTITY_MAP_ADDR]".
    """
    tss = 0xFEFFD000

    def set_addresses(vm: Vm) -> None:
        identity = ctypes.c_uint64(tss - PAGE)
        ioctl(vm.fd, uapi.KVM_SET_IDENTITY_MAP_ADDR, "KVM_SET_IDENTITY_MAP_ADDR", ctypes.byref(identity))
        ioctl(vm.fd, uapi.KVM_SET_TSS_ADDR, "KVM_SET_TSS_ADDR", tss)

    with ScriptedVm(kvm, log_mode, prepare=set_addresses) as vm:
        # The ioctls do nothing on backends that need no such pages. Where KVM has its memslot, user space can add none.
        try:
            vm.add_slot(LATE, tss, 1, logged=False)
        except KvmError as error:
            if error.errno != errno.EEXIST:
                raise
        else:
            pytest.skip("KVM adds no memslot for the TSS here; kvm_intel does, loaded with unrestricted_guest=0")
        vm.add_slot(SLOT, FIRST_GPA, NPAGES)
        vm.assert_dirty("KVM_SET_IDENTITY_MAP_ADDR and KVM_SET_TSS_ADDR", {})
        vm.write(SLOT, DATA)
        vm.assert_dirty("a store", {SLOT: [DATA]})
