# SPDX-License-Identifier: GPL-2.0-only
"""ioctl numbers as in ``<asm-generic/ioctl.h>``, the one function that makes every KVM ioctl, and its errors."""

import ctypes
import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from kvm_util.host_limits import HostLimit, explain, why_thread_refused

_NRBITS, _TYPEBITS, _SIZEBITS = 8, 8, 14
_TYPESHIFT = _NRBITS
_SIZESHIFT = _TYPESHIFT + _TYPEBITS
_DIRSHIFT = _SIZESHIFT + _SIZEBITS
_NONE, _WRITE, _READ = 0, 1, 2

Struct = type[ctypes.Structure | ctypes.c_uint64]


def _ioc(direction: int, kind: int, number: int, size: int) -> int:
    return direction << _DIRSHIFT | size << _SIZESHIFT | kind << _TYPESHIFT | number


def _IO(kind: int, number: int) -> int:
    return _ioc(_NONE, kind, number, 0)


def _IOR(kind: int, number: int, struct: Struct) -> int:
    return _ioc(_READ, kind, number, ctypes.sizeof(struct))


def _IOW(kind: int, number: int, struct: Struct) -> int:
    return _ioc(_WRITE, kind, number, ctypes.sizeof(struct))


def _IOWR(kind: int, number: int, struct: Struct) -> int:
    return _ioc(_READ | _WRITE, kind, number, ctypes.sizeof(struct))


class KvmError(OSError):
    """A failed ioctl, or another failed system call on one of KVM's files.

    :ivar name: of the ioctl or system call
    :ivar asked: its arguments in words
    """

    def __init__(self, code: int, name: str, asked: str = "") -> None:
        super().__init__(code, os.strerror(code))
        self.name = name
        self.asked = asked

    def __reduce__(self) -> tuple[Any, ...]:
        return KvmError, (self.errno, self.name, self.asked)

    def __str__(self) -> str:
        asked = f"({self.asked})" if self.asked else ""
        return f"{self.name}{asked}: {errno_name(self.errno or 0)} ({self.strerror})"


def errno_name(code: int) -> str:
    """The symbolic name of errno *code*, such as ``EINVAL``."""
    return errno.errorcode.get(code, f"errno {code}")


# ctypes releases the GIL during a foreign call. fcntl.ioctl() may hold it: with a small buffer as its argument it copies the
# buffer and keeps the lock (Modules/fcntlmodule.c). A KVM_RUN that held the GIL would block the collecting thread.
_libc_ioctl = ctypes.CDLL(None, use_errno=True).ioctl
_libc_ioctl.argtypes = [ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p]
_libc_ioctl.restype = ctypes.c_int


# ioctls that start KVM's nx_huge_pages recovery thread: KVM_CREATE_VM or, since Linux 6.13, the first KVM_RUN, as a child of
# this process (kvm_arch_post_init_vm(), kvm_mmu_post_init_vm(), arch/x86/kvm/mmu/mmu.c)
_THREAD_STARTERS = ("KVM_CREATE_VM", "KVM_RUN")
# Linux 6.13 returns ENOMEM for every reason (fixed by "vhost: return task creation error instead of NULL")
_NO_THREAD = (errno.EAGAIN, errno.ENOMEM)


def raw_ioctl(fd: int, request: int, arg: Any = None) -> tuple[int, int]:
    """Make the system call; returns (result, errno), with errno 0 unless the result is negative."""
    result: int = _libc_ioctl(fd, request, arg)
    return result, ctypes.get_errno() if result < 0 else 0


def ioctl(fd: int, request: int, name: str, arg: Any = None, asked: str = "") -> int:
    """Make the system call and return its non-negative result.

    :param name: the ioctl's name, for the error message
    :param asked: the arguments in words, for the error message
    :raises KvmError: the ioctl failed
    :raises HostLimit: the ioctl failed, and a limit of the host explains why
    """
    result, code = raw_ioctl(fd, request, arg)
    if result < 0:
        fail(code, name, asked)
    return result


def fail(code: int, name: str, asked: str = "", size: int = 0) -> NoReturn:
    """Raise the KvmError or HostLimit for errno *code*; the parameters are those of :func:`ioctl`.

    :param size: how many bytes of memory the call asked for
    """
    error = KvmError(code, name, asked)
    limit = explain(code, size)
    if limit is None and name in _THREAD_STARTERS and code in _NO_THREAD:
        limit = why_thread_refused()
    if limit is not None:
        raise HostLimit(f"{error}: {limit}") from error
    raise error


@contextmanager
def call_on_kvm(name: str, asked: str, size: int = 0) -> Iterator[None]:
    """Raise KvmError or HostLimit in place of the body's OSError, for system calls on KVM's files other than ioctl.

    The parameters are those of :func:`fail`.
    """
    code = 0
    try:
        yield
    except OSError as error:
        code = error.errno or 0
    if code:  # not in the except clause: the OSError must not become the new error's context
        fail(code, name, asked, size)
