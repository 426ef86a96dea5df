# SPDX-License-Identifier: GPL-2.0-only
"""One vCPU's dirty ring: harvesting its entries and handing them back (api.rst 8.29)."""

import ctypes
import mmap
from array import array
from itertools import takewhile

from kvm_util import uapi
from kvm_util.arch import current as arch
from kvm_util.ioctl import call_on_kvm

ENTRY_SIZE = 16
_WORDS = ENTRY_SIZE // 4  # 32-bit words per entry: flags, slot, and the two halves of offset
_QUADS = ENTRY_SIZE // 8
_CHUNK = 4096


class DirtyRing:
    """The ring of the vCPU whose file is *fd*, mapped with room for *entries* entries.

    An entry belongs to KVM until its flags say DIRTY, and to user space from then on until it says RESET. Flags are read
    before the rest of an entry, and RESET is written after it: with total store order that is the acquire and release
    that the protocol demands, since each step below is a call of its own that the interpreter does not reorder.
    """

    def __init__(self, fd: int, entries: int) -> None:
        if not arch.TOTAL_STORE_ORDER:
            raise NotImplementedError(
                f"{arch.NAME} needs a load-acquire to read a dirty ring, which Python does not have"
            )
        self.entries = entries
        self.next = 0
        size, offset = entries * ENTRY_SIZE, arch.KVM_DIRTY_LOG_PAGE_OFFSET * mmap.PAGESIZE
        with call_on_kvm("mmap", f"dirty ring of {entries} entries", size):
            self._map = mmap.mmap(fd, size, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE, offset=offset)
        self._bytes = memoryview(self._map)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        self._words = self._bytes.cast("I")
        self._quads = self._bytes.cast("Q")
        self._dirty = array("I", [uapi.KVM_DIRTY_GFN_F_DIRTY]) * _CHUNK
        self._reset = memoryview(array("I", [uapi.KVM_DIRTY_GFN_F_RESET]) * _CHUNK)

    def harvest(self, most: int | None = None) -> tuple[list[int], list[int]]:
        """Take the dirty entries in order, or *most* of them, and mark each as harvested; returns their slots and offsets.

        None is marked before all are read: another thread's KVM_RESET_DIRTY_RINGS may take it back at once, and an entry that
        came because of that belongs to the next harvest.
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
            self._words[first * _WORDS : (first + count) * _WORDS : _WORDS] = self._reset[:count]
            self.next += count
        return slots, offsets

    def _read_chunk(self, position: int, most: int, slots: list[int], offsets: list[int]) -> int:
        """Read what is dirty between *position* and the end of its chunk; returns how many entries that were."""
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
        """The memory of the ring's entry *number*, counted from the first that there ever was."""
        return uapi.kvm_dirty_gfn.from_address(self.address + number % self.entries * ENTRY_SIZE)

    def dirty_behind_gap(self) -> int:
        """How many entries are dirty although the next one is not, which KVM's in-order writing rules out.

        Right after :meth:`harvest`, with the vCPU stopped, any such entry lies behind a gap: KVM went on writing past
        the place that user space has to wait at.
        """
        flags = self._words[::_WORDS].tobytes()
        return memoryview(flags).cast("I").tolist().count(uapi.KVM_DIRTY_GFN_F_DIRTY)

    def close(self) -> None:
        """Unmap the ring."""
        for view in (self._words, self._quads, self._bytes):
            view.release()
        self._map.close()
