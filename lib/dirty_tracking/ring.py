# SPDX-License-Identifier: GPL-2.0-only
"""One vCPU's dirty ring: reading and harvesting its entries, and having KVM reset them (api.rst, dirty ring)."""

import ctypes
import mmap
import resource
import signal
from array import array
from collections.abc import Sequence
from itertools import takewhile

from kvm_util import uapi
from kvm_util.arch import current as arch
from kvm_util.vcpu import Vcpu
from kvm_util.vm import Vm

ENTRY_SIZE = 16
_DIRTY = bytes([uapi.KVM_DIRTY_GFN_F_DIRTY])

# How many entries' flags are read at first, and by how much more each time: a ring with few entries should be cheap to read,
# and so should a full one.
_FIRST_BLOCK, _GROWTH = 64, 4

# Waiting for a lock is sleeping, too, so that calls of several threads would repeat each other without end.
_MOST_RESETS = 4
_ALL_SIGNALS = signal.valid_signals()

# The slots and the offsets of entries, in the ring's order. They stay arrays: to make Python's integers of 65,536 entries
# takes longer than everything else that a harvest does.
Entries = tuple[Sequence[int], Sequence[int]]


class DirtyRing:
    """The ring that is mapped at *memory*, all of it.

    An entry belongs to KVM until its flags are DIRTY, and then to user space until they have RESET. Flags are read
    before the rest of an entry, and RESET is written after it: with total store order that is the acquire and release
    that the protocol demands, since each step below is a call of its own that the interpreter does not reorder.

    :ivar entries: how many entries the ring has room for
    :ivar next: position of the next entry to harvest, counted from the first entry ever pushed
    :ivar mark: the flags that mark an entry as harvested: RESET, with or without DIRTY ("1X" in api.rst, dirty ring)
    """

    def __init__(self, memory: mmap.mmap) -> None:
        if not arch.TOTAL_STORE_ORDER:
            raise NotImplementedError(
                f"{arch.NAME} needs a load-acquire to read a dirty ring, which Python does not have"
            )
        self.entries = len(memory) // ENTRY_SIZE
        self.next = 0
        self.mark = uapi.KVM_DIRTY_GFN_F_RESET
        self._seen = 0
        self._reset_to = 0
        self._map = memory
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(memory))

    @classmethod
    def of(cls, vcpu: Vcpu, entries: int) -> "DirtyRing":
        """Map the ring of *vcpu*, whose VM must have rings of *entries* entries; the vCPU closes it."""
        offset = arch.KVM_DIRTY_LOG_PAGE_OFFSET * mmap.PAGESIZE
        ring = cls(vcpu.map_shared(entries * ENTRY_SIZE, offset, f"dirty ring of {entries} entries"))
        vcpu.closing.callback(ring.close)
        return ring

    def peek(self) -> Entries:
        """The dirty entries that are not harvested, and that no earlier call returned; the ring is not changed."""
        self._seen = max(self._seen, self.next)
        # At most once around the ring: in a full one all entries are dirty.
        entries = self._read(self._seen, self._count_dirty(self._seen, self.next + self.entries - self._seen))
        self._seen += len(entries[0])
        return entries

    def harvest(self, most: int | None = None) -> Entries:
        """Take the dirty entries in order, or *most* of them, and mark each as harvested; returns their slots and offsets.

        All are read before any is marked: another thread's KVM_RESET_DIRTY_RINGS may reset a marked entry at once, and an
        entry that is pushed in its place belongs to the next harvest.
        """
        most = self.entries if most is None else min(most, self.entries)
        entries = self._read(self.next, self._count_dirty(self.next, most))
        for first, end in self._parts(self.next, len(entries[0])):
            # The lowest byte of the flags is enough: the others are 0, as _read() has seen.
            self._map[first * ENTRY_SIZE : end * ENTRY_SIZE : ENTRY_SIZE] = bytes([self.mark]) * (end - first)
        self.next += len(entries[0])
        return entries

    def _count_dirty(self, position: int, most: int) -> int:
        """How many entries from *position* on are dirty, up to the first that is not; by the lowest byte of their flags."""
        count, block = 0, _FIRST_BLOCK
        while count < most:
            first, end = self._parts(position + count, min(block, most - count))[0]
            flags = self._map[first * ENTRY_SIZE : end * ENTRY_SIZE : ENTRY_SIZE]
            if flags != _DIRTY * len(flags):
                return count + len(flags) - len(flags.lstrip(_DIRTY))
            count += len(flags)
            block *= _GROWTH
        return count

    def _read(self, position: int, count: int) -> Entries:
        """Read *count* entries from *position* on, up to the first whose flags are not DIRTY alone."""
        quads = array("Q")
        for first, end in self._parts(position, count):
            quads.frombytes(memoryview(self._map)[first * ENTRY_SIZE : end * ENTRY_SIZE])
        heads, offsets = memoryview(quads)[::2], quads[1::2]  # flags and slot, little-endian; offset
        dirty = uapi.KVM_DIRTY_GFN_F_DIRTY
        if count and heads[0] & 0xFFFFFFFF == dirty and heads == memoryview(quads[:1] * count):
            return array("I", [heads[0] >> 32]) * count, offsets
        slots = array("I", [head >> 32 for head in takewhile(lambda head: head & 0xFFFFFFFF == dirty, heads)])
        return slots, offsets[: len(slots)]

    def _parts(self, position: int, count: int) -> list[tuple[int, int]]:
        """The *count* entries from *position* on as first and end of a part of the ring, or of two, where they wrap."""
        first = position % self.entries
        end = first + count
        if end <= self.entries:
            return [(first, end)]
        return [(first, self.entries), (0, end - self.entries)]

    def entry(self, number: int) -> uapi.kvm_dirty_gfn:
        """The memory of entry *number*, counted from the first entry ever pushed."""
        return uapi.kvm_dirty_gfn.from_address(self.address + number % self.entries * ENTRY_SIZE)

    def is_harvested(self, number: int) -> bool:
        """Whether entry *number* is marked as harvested and not reset yet."""
        return bool(self.entry(number).flags & uapi.KVM_DIRTY_GFN_F_RESET)

    def not_reset(self) -> int:
        """How many of the entries that were harvested since the last call a reset has left; call it after the reset."""
        left = sum(1 for number in range(self._reset_to, self.next) if self.entry(number).flags)
        self._reset_to = self.next
        return left

    def dirty_behind_gap(self) -> int:
        """How many entries are dirty although the next one to harvest is not: KVM pushes in order, so there should be none.

        Call it right after :meth:`harvest`, with the vCPU stopped: each dirty entry is then behind a gap, and a harvest in
        order does not reach it.
        """
        return self._map[::ENTRY_SIZE].count(_DIRTY)

    def close(self) -> None:
        """Unmap the ring."""
        self._map.close()


def reset_harvested(vm: Vm) -> int:
    """KVM_RESET_DIRTY_RINGS on *vm*, so that it resets every entry that was harvested before; returns how many it reset.

    Since Linux 6.17 (commit 49005a2a3d2a) a pending signal ends the call early. All signals are blocked meanwhile. SIGSTOP, a
    debugger or a freezer cannot be blocked: then the thread has slept, and the call is repeated.
    """
    count = 0
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _ALL_SIGNALS)
    try:
        for _ in range(_MOST_RESETS):
            sleeps = _sleeps()
            count += vm.reset_dirty_rings()
            if _sleeps() == sleeps:
                break
        return count
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _sleeps() -> int:
    """How often this thread has given up its CPU."""
    return resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw
