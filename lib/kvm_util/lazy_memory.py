# SPDX-License-Identifier: GPL-2.0-only
"""Guest memory that is restored lazily: its pages stay missing until they are touched, and are then copied from an image."""

import mmap

from kvm_util.memory import HOST_PAGE_SIZE, Backing, GuestMemory
from kvm_util.userfault import SuppliedPages


class LazyMemory(GuestMemory):
    """Guest memory of the size of *image*, at guest-physical address *gpa*.

    :raises HostLimit: see :class:`SuppliedPages`
    """

    def __init__(self, backing: Backing, image: bytes, gpa: int) -> None:
        super().__init__(backing, len(image), gpa)
        self.image = image
        self._pages: SuppliedPages | None = None
        try:
            self._pages = SuppliedPages(self.hva, image)
        except BaseException:
            self.close()
            raise

    def populate(self) -> None:
        """Does nothing: the pages are to stay missing."""

    def complete(self) -> None:
        """Touch all pages, so that none is missing any more.

        :raises HostLimit: some did not get their contents, because a system call for that failed
        """
        bytes(self.view[::HOST_PAGE_SIZE])
        assert self._pages is not None
        self._pages.finish()

    def _release(self, mapped: mmap.mmap) -> None:
        try:
            if self._pages is not None:
                self._pages.close()
        finally:
            super()._release(mapped)
