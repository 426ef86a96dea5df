# SPDX-License-Identifier: GPL-2.0-only
"""Guest memory that stays mapped from one VM to the next: to clear a GiB takes a fraction of the time to allocate it."""

import ctypes
import mmap

from kvm_util.closing import Closing
from kvm_util.memory import Backing, GuestMemory, mapped_size


class KeptMemory(Closing):
    """Makes guest memory from what was closed last, if that is as large and of the same backing.

    It holds one mapping at most, and none of hugetlb pages: others may wait for these.
    """

    def __init__(self) -> None:
        self._mapped: mmap.mmap | None = None
        self._kind: tuple[str, int] | None = None

    def make(self, backing: Backing, size: int, gpa: int) -> GuestMemory:
        """As :class:`GuestMemory`; the memory is zeroed, as new memory is."""
        kind = (backing.name, mapped_size(backing, size, gpa))
        if kind != self._kind:
            self.close()
        mapped, self._mapped = self._mapped, None
        if mapped is not None:
            ctypes.memset(ctypes.addressof(ctypes.c_char.from_buffer(mapped)), 0, len(mapped))
        return GuestMemory(backing, size, gpa) if backing.hugetlb else _Memory(self, kind, backing, size, gpa, mapped)

    def keep(self, mapped: mmap.mmap, kind: tuple[str, int]) -> None:
        """Keep a mapping that is not used any more, instead of the one that was kept before."""
        self.close()
        self._mapped, self._kind = mapped, kind

    def close(self) -> None:
        """Free the memory that is kept."""
        if self._mapped is not None:
            self._mapped.close()
            self._mapped = None


class _Memory(GuestMemory):
    """Memory that *owner* keeps when it is closed."""

    def __init__(
        self, owner: KeptMemory, kind: tuple[str, int], backing: Backing, size: int, gpa: int, mapped: mmap.mmap | None
    ) -> None:
        super().__init__(backing, size, gpa, mapped)
        self._owner = owner
        self._kind = kind

    def _release(self, mapped: mmap.mmap) -> None:
        self._owner.keep(mapped, self._kind)
