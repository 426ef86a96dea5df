# SPDX-License-Identifier: GPL-2.0-only
"""The ways in which KVM reports dirty pages, one class each, with the hooks of the kernel's ``dirty_log_test.c``."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from enum import Enum, auto
from functools import cache

from dirty_tracking.bitmap import new_bitmap, set_pages
from dirty_tracking.platform import uses_pml
from dirty_tracking.report import DirtyReport, Source
from dirty_tracking.ring import ENTRY_SIZE, DirtyRing, reset_harvested
from dirty_tracking.timings import Timings
from kvm_util import uapi
from kvm_util.guest import GuestError, GuestVm, Ucall, unexpected_exit
from kvm_util.host import this_host
from kvm_util.ioctl import KvmError
from kvm_util.kvm import Kvm
from kvm_util.vcpu import Vcpu
from kvm_util.vm import Vm

_MANUAL_PROTECT = uapi.KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE
_INITIALLY_SET = uapi.KVM_DIRTY_LOG_INITIALLY_SET


@cache
def _this_host_uses_pml() -> bool:
    return uses_pml(this_host())


def set_dirty_logging(vm: Vm, slot: int, on: bool) -> None:
    """Set or clear KVM_MEM_LOG_DIRTY_PAGES of memslot *slot*; its other flags stay."""
    others = vm.memslots[slot].flags & ~uapi.KVM_MEM_LOG_DIRTY_PAGES
    vm.set_flags(slot, others | (uapi.KVM_MEM_LOG_DIRTY_PAGES if on else 0))


def logged_slots(vm: Vm) -> list[int]:
    """The memslots of *vm* that have dirty logging enabled."""
    return [slot for slot, memslot in vm.memslots.items() if memslot.flags & uapi.KVM_MEM_LOG_DIRTY_PAGES]


class AfterRun(Enum):
    """What a return from KVM_RUN means for the vCPU's thread."""

    KICKED = auto()
    SYNCED = auto()
    RING_FULL = auto()


class LogMode(ABC):
    """One logging mode of one VM.

    :ivar uses_ring: whether each vCPU reports through a ring of its own
    :ivar manual: whether KVM_GET_DIRTY_LOG only reports, and KVM_CLEAR_DIRTY_LOG clears
    :ivar initially_set: whether every page is dirty when dirty logging is enabled
    :ivar timings: how long KVM's calls took: ``get``, ``clear`` or ``reset``, and how long ``harvest`` did, with all vCPUs
        stopped; and the same with ``_running`` for those made while vCPUs may run
    :param ring_entries: entries of each vCPU's ring, a power of two; for the modes with rings
    """

    name: str
    uses_ring = False
    manual = False
    initially_set = False

    def __init__(self, ring_entries: int) -> None:
        self.ring_entries = ring_entries
        self.timings = Timings()

    @classmethod
    @abstractmethod
    def supported(cls, kvm: Kvm) -> str | None:
        """Why this KVM does not support the mode; None if it does."""

    @classmethod
    def largest_ring(cls, kvm: Kvm) -> int:
        """The largest number of entries that this KVM accepts for a ring; 0 in modes without rings."""
        return 0

    def create_vm_done(self, vm: Vm) -> None:
        """Set the mode up on a VM that has no vCPU yet."""
        return

    def rings(self, vm: Vm) -> list[DirtyRing]:
        """The rings of the VM's vCPUs; none in modes without rings."""
        return []

    def collect(
        self,
        vm: Vm,
        kick: Callable[[], None] | None,
        always_kick: bool = False,
        slots: Iterable[int] | None = None,
    ) -> DirtyReport:
        """Collect what KVM reports for the VM, and have it write-protect the reported pages again.

        :param kick: makes every running vCPU leave the guest once, and waits for that; None if no vCPU is running. It is
            called if :meth:`flush_cpu_logs` needs it
        :param always_kick: call *kick* always. Then a page that KVM made writable before the collection, and had not
            logged yet (``fast_pf_fix_direct_spte()``, arch/x86/kvm/mmu/mmu.c), is in the report
        :param slots: the memslots whose bitmaps are to be collected; None for all that have dirty logging enabled. Rings
            are harvested whatever the memslots of their entries
        """
        if kick is not None:
            if always_kick:
                kick()
            else:
                self.flush_cpu_logs(kick)
        return self._take(vm, logged_slots(vm) if slots is None else slots, stopped=kick is None)

    @abstractmethod
    def _take(self, vm: Vm, slots: Iterable[int], stopped: bool) -> DirtyReport:
        """As :meth:`collect`, after the kick."""

    def _timed(self, call: str, stopped: bool) -> AbstractContextManager[None]:
        return self.timings.time(call if stopped else f"{call}_running")

    def flush_cpu_logs(self, kick: Callable[[], None]) -> None:
        """Flush the CPUs' own log buffers (PML) to KVM's bitmaps and rings.

        A vCPU flushes its buffer when it exits. Neither a harvest nor KVM_GET_DIRTY_LOG waits for that: the latter only
        sends the vCPUs an interrupt (``kvm_arch_sync_dirty_log()``, arch/x86/kvm/x86.c). So running vCPUs are kicked; they
        continue at once, and run while the pages are collected. Without PML the vCPUs are not disturbed, and keep their
        TLB entries.
        """
        if self.has_cpu_logs:
            kick()

    @property
    def has_cpu_logs(self) -> bool:
        """Whether the CPUs log dirty pages into buffers of their own (PML)."""
        return _this_host_uses_pml()

    def after_vcpu_run(self, guest: GuestVm, vcpu: Vcpu, code: int) -> AfterRun:
        """Decide what it means that KVM_RUN returned *code*; on the vCPU's thread.

        :raises GuestError: an exit that no test expects
        """
        if code:
            return AfterRun.KICKED
        if guest.ucall(vcpu) is Ucall.SYNC:
            return AfterRun.SYNCED
        raise GuestError(unexpected_exit(vcpu, code))


class BitmapMode(LogMode):
    """KVM_GET_DIRTY_LOG alone, which reports and clears the pages in one step."""

    name = "dirty-log"

    @classmethod
    def supported(cls, kvm: Kvm) -> str | None:
        return None

    def _take(self, vm: Vm, slots: Iterable[int], stopped: bool) -> DirtyReport:
        slot_of_each: list[int] = []
        offsets: list[int] = []
        for slot in slots:
            bitmap = new_bitmap(vm.memslots[slot].npages)
            with self._timed("get", stopped):
                vm.get_dirty_log(slot, bitmap)
            if self.manual:
                with self._timed("clear", stopped):
                    self._clear(vm, slot, bitmap)
            pages = set_pages(bitmap)
            slot_of_each += [slot] * len(pages)
            offsets += pages
        return DirtyReport([Source(slot_of_each, offsets)])

    def _clear(self, vm: Vm, slot: int, bitmap: bytearray) -> None:
        """Clear the pages of *bitmap* in memslot *slot*; called if KVM_GET_DIRTY_LOG does not do that."""


class ClearLogMode(BitmapMode):
    """KVM_GET_DIRTY_LOG reports, KVM_CLEAR_DIRTY_LOG clears; all pages are dirty at first."""

    name = "clear-log"
    manual = True
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

    def _clear(self, vm: Vm, slot: int, bitmap: bytearray) -> None:
        vm.clear_dirty_log(slot, bitmap, 0, vm.memslots[slot].npages)


class ClearLogUnsetMode(ClearLogMode):
    """As clear-log, but with all pages clean at first (without KVM_DIRTY_LOG_INITIALLY_SET)."""

    name = "clear-log-unset"
    initially_set = False
    flags = _MANUAL_PROTECT


class RingMode(LogMode):
    """A ring of entries per vCPU, enabled through KVM_CAP_DIRTY_LOG_RING_ACQ_REL."""

    name = "dirty-ring"
    uses_ring = True
    cap = uapi.KVM_CAP_DIRTY_LOG_RING_ACQ_REL
    cap_name = "KVM_CAP_DIRTY_LOG_RING_ACQ_REL"

    def __init__(self, ring_entries: int) -> None:
        super().__init__(ring_entries)
        self._rings: list[DirtyRing] = []

    @classmethod
    def supported(cls, kvm: Kvm) -> str | None:
        return None if kvm.check_extension(cls.cap) else f"{cls.name}: this KVM has no {cls.cap_name}"

    @classmethod
    def largest_ring(cls, kvm: Kvm) -> int:
        return kvm.check_extension(cls.cap) // ENTRY_SIZE

    def create_vm_done(self, vm: Vm) -> None:
        vm.enable_cap(self.cap, self.ring_entries * ENTRY_SIZE)

    def rings(self, vm: Vm) -> list[DirtyRing]:
        for vcpu in vm.vcpus[len(self._rings) :]:
            self._rings.append(DirtyRing.of(vcpu, self.ring_entries))
        return self._rings

    def _take(self, vm: Vm, slots: Iterable[int], stopped: bool) -> DirtyReport:
        rings = self.rings(vm)
        with self._timed("harvest", stopped):
            report = DirtyReport([Source(*ring.harvest(), vcpu) for vcpu, ring in enumerate(rings)])
        if stopped:
            for source, ring in zip(report.sources, rings, strict=True):
                source.behind_gap = ring.dirty_behind_gap()
        with self._timed("reset", stopped):
            report.reset = reset_harvested(vm)
        return report

    def after_vcpu_run(self, guest: GuestVm, vcpu: Vcpu, code: int) -> AfterRun:
        if not code and vcpu.run.exit_reason == uapi.KVM_EXIT_DIRTY_RING_FULL:
            return AfterRun.RING_FULL
        return super().after_vcpu_run(guest, vcpu, code)


class RingPlainMode(RingMode):
    """As dirty-ring, through KVM_CAP_DIRTY_LOG_RING, which promises total store order and so exists on x86 only."""

    name = "dirty-ring-plain"
    cap = uapi.KVM_CAP_DIRTY_LOG_RING
    cap_name = "KVM_CAP_DIRTY_LOG_RING"


LOG_MODES: dict[str, type[LogMode]] = {
    mode.name: mode for mode in (BitmapMode, ClearLogMode, ClearLogUnsetMode, RingMode, RingPlainMode)
}


def ring_accepted(kvm: Kvm, entries: int, mode: type[LogMode] = RingMode) -> bool:
    """Whether this KVM accepts a ring of *entries* entries in *mode*."""
    with kvm.create_vm() as vm:
        return _accepts_ring(vm, entries, mode)


def smallest_ring(kvm: Kvm, mode: type[LogMode] = RingMode) -> int:
    """The smallest number of entries that this KVM, which must have *mode*, accepts for a ring.

    It depends on the entries that the backend reserves (api.rst, dirty ring, kvm_dirty_ring_get_rsvd_entries()).
    """
    largest = mode.largest_ring(kvm)
    sizes = [1 << bit for bit in range(largest.bit_length())]
    # A VM whose ring is refused still takes another one: kvm_vm_ioctl_enable_dirty_log_ring(), virt/kvm/kvm_main.c.
    with kvm.create_vm() as vm:
        return next((entries for entries in sizes if _accepts_ring(vm, entries, mode)), largest)


def _accepts_ring(vm: Vm, entries: int, mode: type[LogMode]) -> bool:
    try:
        mode(entries).create_vm_done(vm)
    except KvmError:
        return False
    return True
