# SPDX-License-Identifier: GPL-2.0-only
"""Guest memory that is restored lazily: its pages stay missing until they are touched, and are then copied from an image."""

import mmap

from kvm_util.memory import Backing, GuestMemory
from kvm_util.userfault import SuppliedPages


class LazyMemory(GuestMemory):
    """Guest memory of the size of *image*, at guest-physical address *gpa*.

    :raises HostLimit: see :class:`SuppliedPages`
    """

    def __init__(self, backing: Backing, image: bytes, gpa: int) -> None:
        super().__init__(backing, len(image), gpa)
        self.image = image
        try:
            self._pages = SuppliedPages(self.hva, image)
        except BaseException:
            super()._release(self._map)
            raise

    def populate(self) -> None:
        """Does nothing: the pages are to stay missing."""

    def _release(self, mapped: mmap.mmap) -> None:
        self._pages.close()
        super()._release(mapped)
