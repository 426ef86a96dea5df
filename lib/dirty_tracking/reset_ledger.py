# SPDX-License-Identifier: GPL-2.0-only
"""KVM_RESET_DIRTY_RINGS from several threads at once: what was harvested, and what the calls took, in all."""

import threading
from collections.abc import Sequence

from dirty_tracking.cell import HANG_TIMEOUT
from dirty_tracking.ring import DirtyRing, reset_until
from dirty_tracking.violations import Kind, violated
from kvm_util.vm import Vm
from kvm_util.wording import counted

Harvest = list[tuple[int, int]]  # slot and offset of each entry


class ResetLedger:
    """Harvests and resets *rings*, those of *vm*; every method may be called by any thread.

    :ivar harvested: entries marked as harvested
    :ivar taken: what the calls of KVM_RESET_DIRTY_RINGS returned, summed up
    :ivar calls: how many there were
    """

    def __init__(self, vm: Vm, rings: Sequence[DirtyRing]) -> None:
        self.harvested = 0
        self.taken = 0
        self.calls = 0
        self._vm = vm
        self._rings = rings
        self._harvesting = [threading.Lock() for _ in vm.vcpus]
        self._cond = threading.Condition()
        self._under_way: set[int] = set()

    def harvest(self, vcpu: int, most: int | None = None) -> tuple[Harvest, int]:
        """Take entries of a ring, in order: all, or *most* at most.

        :returns: them, and the position in the ring up to which it is harvested now
        """
        ring = self._rings[vcpu]
        with self._harvesting[vcpu]:
            slots, offsets = ring.harvest(most)
            taken = list(zip(slots, offsets, strict=True))
            with self._cond:
                self.harvested += len(taken)
            return taken, ring.next

    def reset(self) -> int:
        """KVM_RESET_DIRTY_RINGS once; returns how many entries it took."""
        with self._cond:
            self.calls += 1
            number = self.calls
            self._under_way.add(number)
        count = 0
        try:
            count = self._vm.reset_dirty_rings()
        finally:
            with self._cond:
                self._under_way.remove(number)
                self.taken += count
                self._cond.notify_all()
        return count

    def reset_up_to(self, positions: Sequence[int]) -> None:
        """Have KVM reset every ring's entries up to these positions, and let it finish that.

        One call does, unless a signal ends it early: then it returns with what it had done until then (since Linux 6.17,
        commit 49005a2a3d2a), and the rest is for the next. Entries may also be reset by another thread's call. That one
        flushes the TLBs only after it let go of the lock that makes the calls wait for each other
        (``kvm_vm_ioctl_reset_dirty_pages()``, virt/kvm/kvm_main.c), so it has to have returned too.

        :raises ContractViolation: entries are left, in spite of all calls
        """

        def left() -> list[int]:
            return [
                vcpu
                for vcpu, position in enumerate(positions)
                if position and self._rings[vcpu].is_harvested(position - 1)
            ]

        reset_until(self.reset, lambda _reset: not left())
        if vcpus := left():
            raise violated(
                Kind.RESET_COUNT,
                f"KVM_RESET_DIRTY_RINGS leaves harvested entries in the rings of vCPUs {vcpus},"
                f" in {counted(self.calls, 'call')}",
            )
        with self._cond:
            others = set(self._under_way)
            if not self._cond.wait_for(lambda: not others & self._under_way, HANG_TIMEOUT):
                raise violated(Kind.OTHER, f"KVM_RESET_DIRTY_RINGS does not return within {HANG_TIMEOUT:g} s")

    def settle(self) -> None:
        """Hold the calls' answers to what was harvested; no other thread may be at work.

        :raises ContractViolation: they took more entries, or fewer
        """
        if self.taken != self.harvested:
            raise violated(
                Kind.RESET_COUNT, f"harvested {self.harvested}, reset {self.taken}, in {counted(self.calls, 'call')}"
            )
