# SPDX-License-Identifier: GPL-2.0-only
"""The ways in which KVM reports dirty pages, one class each, with the hooks of the kernel's ``dirty_log_test.c``."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum, auto

from dirty_tracking.bitmap import new_bitmap, set_pages
from dirty_tracking.ring import ENTRY_SIZE
from kvm_util import uapi
from kvm_util.guest import GuestError, GuestVm, Ucall, unexpected_exit
from kvm_util.kvm import Kvm
from kvm_util.vcpu import Vcpu
from kvm_util.vm import Memslot, Vm

_MANUAL_PROTECT = uapi.KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE
_INITIALLY_SET = uapi.KVM_DIRTY_LOG_INITIALLY_SET

# How many KVM_RESET_DIRTY_RINGS in a row may take nothing before what is left counts as refused. Since Linux 6.17
# (commit 49005a2a3d2a) a pending signal ends the call early, with the entries that it had done until then.
_RESET_TRIES = 3


class AfterRun(Enum):
    """What a return from KVM_RUN means for the vCPU's thread."""

    KICKED = auto()
    SYNCED = auto()
    RING_FULL = auto()


@dataclass
class Collected:
    """What one collection brought.

    :ivar pages: reported pages of each source: one bitmap for all vCPUs, or one ring per vCPU, in the ring's order
    :ivar slots: the slot field of each ring entry, beside *pages*; empty for bitmaps
    :ivar reset: how many entries KVM_RESET_DIRTY_RINGS took back, over all calls
    :ivar behind_gap: per ring, how many dirty entries lie behind a clean one (looked at when the vCPUs are stopped)
    """

    pages: list[list[int]]
    slots: list[list[int]] = field(default_factory=list)
    reset: int = 0
    behind_gap: list[int] = field(default_factory=list)


class LogMode(ABC):
    """One logging mode of one VM.

    :ivar per_vcpu: whether each vCPU reports for itself
    :ivar initially_set: whether every page counts as dirty until it was collected once
    """

    name: str
    per_vcpu = False
    initially_set = False

    @classmethod
    @abstractmethod
    def supported(cls, kvm: Kvm) -> str | None:
        """Why this KVM does not have the mode; None when it has."""

    def create_vm_done(self, vm: Vm) -> None:
        """Set the mode up on a VM that has no vCPU yet."""
        return

    @abstractmethod
    def collect_dirty_pages(self, vm: Vm, memslot: Memslot, kick: Callable[[], None], stopped: bool) -> Collected:
        """Take from KVM what it reports for *memslot*, and let it track these pages anew.

        What a CPU has logged into a buffer of its own (Intel's PML) reaches bitmap or ring when the vCPU exits. Neither a
        harvest nor KVM_GET_DIRTY_LOG waits for that: the latter only sends the vCPUs an interrupt
        (``kvm_arch_sync_dirty_log()``, arch/x86/kvm/x86.c). So running vCPUs are kicked first; they go on
        at once, and run while the pages are collected.

        :param kick: makes every running vCPU leave the guest once, and waits until it did
        :param stopped: no vCPU is running
        """

    def after_vcpu_run(self, guest: GuestVm, vcpu: Vcpu, code: int) -> AfterRun:
        """Decide what it means that KVM_RUN returned *code*; on the vCPU's thread.

        :raises GuestError: the guest or KVM did what no test asked for
        """
        if code:
            return AfterRun.KICKED
        if guest.ucall(vcpu) is Ucall.SYNC:
            return AfterRun.SYNCED
        raise GuestError(unexpected_exit(vcpu, code))

    def before_vcpu_join(self, release: Callable[[], None]) -> None:
        """Let go of vCPUs that wait for this mode, before their threads are joined; *release* frees all that wait."""
        return


class DirtyLog(LogMode):
    """KVM_GET_DIRTY_LOG alone: it reports the pages and clears them in one step."""

    name = "dirty-log"

    @classmethod
    def supported(cls, kvm: Kvm) -> str | None:
        return None

    def collect_dirty_pages(self, vm: Vm, memslot: Memslot, kick: Callable[[], None], stopped: bool) -> Collected:
        if not stopped:
            kick()
        bitmap = new_bitmap(memslot.npages)
        vm.get_dirty_log(memslot.slot, bitmap)
        return Collected([set_pages(bitmap)])


class ClearLog(LogMode):
    """KVM_GET_DIRTY_LOG reports, KVM_CLEAR_DIRTY_LOG clears; all pages are dirty at first."""

    name = "clear-log"
    initially_set = True
    flags = _MANUAL_PROTECT | _INITIALLY_SET

    @classmethod
    def supported(cls, kvm: Kvm) -> str | None:
        offered = kvm.check_extension(uapi.KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2)
        if offered & cls.flags == cls.flags:
            return None
        return f"{cls.name}: KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 offers flags {offered:#x}, {cls.flags:#x} are needed"

    def create_vm_done(self, vm: Vm) -> None:
        vm.enable_cap(uapi.KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, self.flags)

    def collect_dirty_pages(self, vm: Vm, memslot: Memslot, kick: Callable[[], None], stopped: bool) -> Collected:
        if not stopped:
            kick()
        bitmap = new_bitmap(memslot.npages)
        vm.get_dirty_log(memslot.slot, bitmap)
        vm.clear_dirty_log(memslot.slot, bitmap, 0, memslot.npages)
        return Collected([set_pages(bitmap)])


class ClearLogUnset(ClearLog):
    """As clear-log, but with all pages clean at first (without KVM_DIRTY_LOG_INITIALLY_SET)."""

    name = "clear-log-unset"
    initially_set = False
    flags = _MANUAL_PROTECT


class DirtyRing(LogMode):
    """A ring of entries per vCPU, enabled through KVM_CAP_DIRTY_LOG_RING_ACQ_REL.

    :param entries: size of each ring; a power of two
    """

    name = "dirty-ring"
    per_vcpu = True
    cap = uapi.KVM_CAP_DIRTY_LOG_RING_ACQ_REL
    cap_name = "KVM_CAP_DIRTY_LOG_RING_ACQ_REL"

    def __init__(self, entries: int) -> None:
        self.entries = entries

    @classmethod
    def supported(cls, kvm: Kvm) -> str | None:
        return None if kvm.check_extension(cls.cap) else f"{cls.name}: this KVM has no {cls.cap_name}"

    def create_vm_done(self, vm: Vm) -> None:
        vm.enable_cap(self.cap, self.entries * ENTRY_SIZE)

    def collect_dirty_pages(self, vm: Vm, memslot: Memslot, kick: Callable[[], None], stopped: bool) -> Collected:
        if not stopped:
            kick()
        return self.harvest_all(vm, stopped)

    def harvest_all(self, vm: Vm, stopped: bool) -> Collected:
        """Harvest all rings, whatever slots their entries are of, and have KVM take that back."""
        rings = [vcpu.map_dirty_ring(self.entries) for vcpu in vm.vcpus]
        harvests = [ring.harvest() for ring in rings]
        behind_gap = [ring.dirty_behind_gap() for ring in rings] if stopped else []
        reset = reset_all(vm, sum(len(offsets) for _, offsets in harvests))
        return Collected([offsets for _, offsets in harvests], [slots for slots, _ in harvests], reset, behind_gap)

    def after_vcpu_run(self, guest: GuestVm, vcpu: Vcpu, code: int) -> AfterRun:
        if not code and vcpu.run.exit_reason == uapi.KVM_EXIT_DIRTY_RING_FULL:
            return AfterRun.RING_FULL
        return super().after_vcpu_run(guest, vcpu, code)

    def before_vcpu_join(self, release: Callable[[], None]) -> None:
        release()


class DirtyRingPlain(DirtyRing):
    """As dirty-ring, through KVM_CAP_DIRTY_LOG_RING, which promises total store order and so exists on x86 only."""

    name = "dirty-ring-plain"
    cap = uapi.KVM_CAP_DIRTY_LOG_RING
    cap_name = "KVM_CAP_DIRTY_LOG_RING"


LOG_MODES: dict[str, type[LogMode]] = {
    mode.name: mode for mode in (DirtyLog, ClearLog, ClearLogUnset, DirtyRing, DirtyRingPlain)
}


def make_log_mode(name: str, ring_entries: int) -> LogMode:
    """The log mode *name* for one VM; *ring_entries* concerns the ring modes only."""
    mode = LOG_MODES[name]
    return mode(ring_entries) if issubclass(mode, DirtyRing) else mode()


def reset_all(vm: Vm, harvested: int) -> int:
    """KVM_RESET_DIRTY_RINGS until KVM has taken back *harvested* entries, or takes no more; returns how many it took."""
    taken, idle = 0, 0
    while idle < _RESET_TRIES:
        count = vm.reset_dirty_rings()
        taken += count
        if taken >= harvested:
            break
        idle = 0 if count else idle + 1
    return taken
