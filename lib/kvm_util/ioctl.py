# SPDX-License-Identifier: GPL-2.0-only
"""ioctl numbers as ``<asm-generic/ioctl.h>`` builds them, and the one call that every KVM ioctl goes through."""

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
    """An ioctl or another call on a file of KVM's that failed: its name, what was asked, and the errno by name."""

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
    """The symbolic name of *code*, such as ``EINVAL``."""
    return errno.errorcode.get(code, f"errno {code}")


# ctypes lets the other threads run during a foreign call; fcntl.ioctl() does so only for integer arguments
# (Modules/fcntlmodule.c copies small buffers and keeps the lock), and a KVM_RUN that kept it would stop the collector.
_libc_ioctl = ctypes.CDLL(None, use_errno=True).ioctl
_libc_ioctl.argtypes = [ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p]
_libc_ioctl.restype = ctypes.c_int


# What starts a thread of the kernel's: the one that zaps huge pages for nx_huge_pages, at KVM_CREATE_VM or, since Linux 6.13,
# at the first KVM_RUN as a child of the process (kvm_arch_post_init_vm(), kvm_mmu_post_init_vm(), arch/x86/kvm/mmu/mmu.c)
_THREAD_STARTERS = ("KVM_CREATE_VM", "KVM_RUN")
# Linux 6.13 has ENOMEM for each reason ("vhost: return task creation error instead of NULL")
_NO_THREAD = (errno.EAGAIN, errno.ENOMEM)


def raw_ioctl(fd: int, request: int, arg: Any = None) -> tuple[int, int]:
    """Make the system call and return (result, errno); errno is 0 unless the result is negative."""
    result: int = _libc_ioctl(fd, request, arg)
    return result, ctypes.get_errno() if result < 0 else 0


def ioctl(fd: int, request: int, name: str, arg: Any = None, asked: str = "") -> int:
    """Make the system call and return its non-negative result.

    :param name: the ioctl's name, for the error message
    :param asked: the arguments in words, for the error message
    :raises KvmError: when the kernel answers with an error
    :raises HostLimit: when it does, and a limit of the host's explains that
    """
    result, code = raw_ioctl(fd, request, arg)
    if result < 0:
        fail(code, name, asked)
    return result


def fail(code: int, name: str, asked: str = "", size: int = 0) -> NoReturn:
    """Raise what :func:`ioctl` raises for error *code*.

    :param size: how many bytes of memory were asked for
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
    """Have a system call on a file of KVM's, which is no ioctl, fail as :func:`ioctl` does; the parameters are fail()'s."""
    code = 0
    try:
        yield
    except OSError as error:
        code = error.errno or 0
    if code:  # only here, for the OSError is not to be seen any more
        fail(code, name, asked, size)
