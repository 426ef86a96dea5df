# SPDX-License-Identifier: GPL-2.0-only
"""One vCPU's dirty ring: reading and harvesting its entries, and having KVM reset them (api.rst, dirty ring)."""

import ctypes
import mmap
from array import array
from collections.abc import Callable
from itertools import takewhile

from kvm_util import uapi
from kvm_util.arch import current as arch
from kvm_util.vcpu import Vcpu

ENTRY_SIZE = 16
_WORDS = ENTRY_SIZE // 4  # 32-bit words per entry: flags, slot, and the two halves of offset
_QUADS = ENTRY_SIZE // 8
_CHUNK = 4096

# How many KVM_RESET_DIRTY_RINGS in a row may reset nothing before the rest counts as not reset. Since Linux 6.17 (commit
# 49005a2a3d2a) a pending signal ends the call early, possibly before it has reset any entry; but not this many in a row,
# even if other threads send signals all the time.
_IDLE_RESETS = 1000
# How many calls there may be in all, so that a KVM that returns a count and resets nothing ends the loop too
_MOST_RESETS = 100_000

# The slots and the offsets of entries, in the ring's order
Entries = tuple[list[int], list[int]]


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
        self._bytes = memoryview(memory)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        self._words = self._bytes.cast("I")
        self._quads = self._bytes.cast("Q")
        self._dirty = array("I", [uapi.KVM_DIRTY_GFN_F_DIRTY]) * _CHUNK

    @classmethod
    def of(cls, vcpu: Vcpu, entries: int) -> "DirtyRing":
        """Map the ring of *vcpu*, whose VM must have rings of *entries* entries; the vCPU closes it."""
        offset = arch.KVM_DIRTY_LOG_PAGE_OFFSET * mmap.PAGESIZE
        ring = cls(vcpu.map_shared(entries * ENTRY_SIZE, offset, f"dirty ring of {entries} entries"))
        vcpu.closing.callback(ring.close)
        return ring

    def peek(self) -> Entries:
        """The dirty entries that are not harvested, and that no earlier call returned; the ring is not changed."""
        slots: list[int] = []
        offsets: list[int] = []
        self._seen = max(self._seen, self.next)
        # At most once around the ring: in a full one all entries are dirty.
        while count := self._read_chunk(self._seen, self.next + self.entries - self._seen, slots, offsets):
            self._seen += count
        return slots, offsets

    def harvest(self, most: int | None = None) -> Entries:
        """Take the dirty entries in order, or *most* of them, and mark each as harvested; returns their slots and offsets.

        All are read before any is marked: another thread's KVM_RESET_DIRTY_RINGS may reset a marked entry at once, and an
        entry that is pushed in its place belongs to the next harvest.
        """
        slots: list[int] = []
        offsets: list[int] = []
        left = self.entries if most is None else min(most, self.entries)
        position = self.next
        while count := self._read_chunk(position, left, slots, offsets):
            position += count
            left -= count
        while self.next < position:
            first = self.next % self.entries
            count = min(_CHUNK, self.entries - first, position - self.next)
            self._words[first * _WORDS : (first + count) * _WORDS : _WORDS] = array("I", [self.mark]) * count
            self.next += count
        return slots, offsets

    def _read_chunk(self, position: int, most: int, slots: list[int], offsets: list[int]) -> int:
        """Read the dirty entries from *position* to the end of its chunk; returns how many there were."""
        first = position % self.entries
        room = min(_CHUNK, self.entries - first, most)
        flags = self._words[first * _WORDS : (first + room) * _WORDS : _WORDS].tobytes()
        if flags == memoryview(self._dirty)[:room].tobytes():
            count = room
        else:
            is_dirty = uapi.KVM_DIRTY_GFN_F_DIRTY.__eq__
            count = sum(1 for _ in takewhile(is_dirty, memoryview(flags).cast("I")))
        last = first + count
        slots += self._words[first * _WORDS + 1 : last * _WORDS : _WORDS].tolist()
        offsets += self._quads[first * _QUADS + 1 : last * _QUADS : _QUADS].tolist()
        return count

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
        flags = self._words[::_WORDS].tobytes()
        return memoryview(flags).cast("I").tolist().count(uapi.KVM_DIRTY_GFN_F_DIRTY)

    def close(self) -> None:
        """Unmap the ring."""
        for view in (self._words, self._quads, self._bytes):
            view.release()
        self._map.close()


def reset_until(reset: Callable[[], int], done: Callable[[int], bool]) -> int:
    """Call *reset* (KVM_RESET_DIRTY_RINGS) until all is reset, or many calls in a row reset nothing.

    :param done: whether all is reset, given how many entries the calls have reset so far
    :returns: how many entries all calls have reset
    """
    total, idle = 0, 0
    for _ in range(_MOST_RESETS):
        count = reset()
        total += count
        idle = 0 if count else idle + 1
        if done(total) or idle == _IDLE_RESETS:
            break
    return total
