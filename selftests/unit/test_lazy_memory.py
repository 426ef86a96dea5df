# SPDX-License-Identifier: GPL-2.0-only
"""Memory that is restored lazily: what happens when its pages cannot be supplied."""

import os
import signal

import pytest

from kvm_util.host_limits import HostLimit
from kvm_util.lazy_memory import LazyMemory
from kvm_util.memory import BACKINGS, HOST_PAGE_SIZE

IMAGE = b"".join(bytes([page]) * HOST_PAGE_SIZE for page in range(1, 4))


def lazy_memory() -> LazyMemory:
    return LazyMemory(BACKINGS["anonymous"], IMAGE, 0)


def test_contents_of_lazy_memory() -> None:
    """Each page gets its contents when it is touched."""
    memory = lazy_memory()
    memory.complete()
    assert bytes(memory.view) == IMAGE
    memory.close()


def test_dead_supplier_of_pages() -> None:
    """When the child that supplies the pages is killed, that is an error of the host, and the memory can be closed."""
    memory = lazy_memory()
    assert memory._pages is not None
    os.kill(memory._pages._child, signal.SIGKILL)
    with pytest.raises(HostLimit, match="has ended: signal 9"):
        memory.complete()
    memory.close()


def test_failed_supply_of_a_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """The errno with which the kernel refuses a page is in the error."""
    monkeypatch.setattr("kvm_util.userfault.ctypes.cast", lambda _pointer, _kind: NoAddress)
    memory = lazy_memory()
    with pytest.raises(HostLimit, match="UFFDIO_COPY: EFAULT"):
        memory.complete()
    memory.close()


class NoAddress:
    """A pointer to memory that no process has."""

    value = HOST_PAGE_SIZE


def test_refused_userfaultfd(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where userfaultfd is refused, the error says so, and nothing stays open."""
    monkeypatch.setattr("kvm_util.userfault._syscall", lambda *_: -1)
    with pytest.raises(HostLimit, match="userfaultfd"):
        lazy_memory()
