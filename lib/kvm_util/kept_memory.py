# SPDX-License-Identifier: GPL-2.0-only
"""Guest memory that stays mapped from one VM to the next: to clear a GiB takes a fraction of the time to allocate it."""

import ctypes
import mmap
import sys
from contextlib import suppress

from kvm_util.closing import Closing
from kvm_util.memory import Backing, GuestMemory

# Backing, size, and what is needed for the same address: the gpa's part below the backing's alignment
_Kind = tuple[str, int, int]


class KeptMemory(Closing):
    """Makes guest memory from what was closed last, if that is as large and of the same backing.

    It holds one mapping at most, and none of hugetlb pages: others may wait for these.
    """

    def __init__(self) -> None:
        self._mapped: mmap.mmap | None = None
        self._kind: _Kind | None = None

    def make(self, backing: Backing, size: int, gpa: int) -> GuestMemory:
        """As :class:`GuestMemory`; the memory is zeroed, as new memory is."""
        kind = (backing.name, size, gpa % backing.alignment)
        if kind != self._kind:
            self.close()
        mapped, self._mapped = self._mapped, None
        if backing.hugetlb:
            return GuestMemory(backing, size, gpa)
        memory = _Memory(self, kind, backing, size, gpa, mapped)
        if mapped is not None:
            # Only what was allocated: a huge page in the rest would hide that this part has none.
            ctypes.memset(memory.hva, 0, size)
        return memory

    def keep(self, mapped: mmap.mmap, kind: _Kind) -> None:
        """Keep a mapping that is not used any more, instead of the one that was kept before."""
        self.close()
        self._mapped, self._kind = mapped, kind

    def close(self) -> None:
        """Free the memory that is kept."""
        if self._mapped is not None:
            self._mapped.close()
            self._mapped = None


class _Memory(GuestMemory):
    """Memory that *owner* keeps when it is closed, unless by an interruption, if it was allocated, and has its huge pages."""

    def __init__(
        self, owner: KeptMemory, kind: _Kind, backing: Backing, size: int, gpa: int, mapped: mmap.mmap | None
    ) -> None:
        super().__init__(backing, size, gpa, mapped)
        self._owner = owner
        self._kind = kind
        self._fit = False

    def populate(self) -> None:
        super().populate()
        # The first and the last huge page may be incomplete.
        is_huge = self.transparent_huge_size() > self.size - 2 * self.backing.page_size
        self._fit = is_huge or not self.backing.page_size

    def _release(self, mapped: mmap.mmap) -> None:
        if isinstance(sys.exception(), KeyboardInterrupt):
            # What was interrupted may have views, and the mapping goes with the last of them.
            with suppress(BufferError):
                mapped.close()
        elif self._fit:
            self._owner.keep(mapped, self._kind)
        else:
            mapped.close()
