# SPDX-License-Identifier: GPL-2.0-only
"""Recognizing system calls that a container's seccomp filter refuses.

A filter's error code could just as well be the kernel's. A probe settles it: the same system call, with arguments that have
nothing to do with KVM and for which the kernel returns something else. A call without a probe is never excused.
"""

import ctypes
import errno
import mmap
import os
from collections.abc import Callable

from kvm_util import host_limits

_FILTERED = "2"  # Seccomp: in /proc/self/status
_NO_SUCH_POLICY = 0x3FFF
_UFFD_USER_MODE_ONLY = 1  # <linux/userfaultfd.h>; needs no privilege, so the kernel gets as far as checking the flags
_NO_SUCH_FLAG = 1 << 30

_libc = ctypes.CDLL(None, use_errno=True)


def why_refused(call: str, code: int) -> str | None:
    """The explanation if a seccomp filter made system call *call* fail with *code*; None if none did.

    :param call: a key of ``_PROBES``
    :param code: the errno
    """
    if code in (errno.EPERM, errno.ENOSYS) and host_limits.status("Seccomp") == _FILTERED and _PROBES[call]() == code:
        return (
            f"{errno.errorcode[code]}, which is the seccomp filter's answer (allow the call in the container's profile:"
            " docker run --security-opt seccomp=FILE)"
        )
    return None


def _memfd_create() -> int:
    return _errno_of(lambda: os.close(os.memfd_create("probe", os.MFD_CLOEXEC)))


def _madvise() -> int:
    with mmap.mmap(-1, mmap.PAGESIZE) as page:
        return _errno_of(lambda: page.madvise(mmap.MADV_NORMAL))


def _set_mempolicy() -> int:
    from kvm_util.arch import (
        current as arch,  # imported here: kvm_util.arch imports kvm_util.memory, which imports this module
    )

    return _errno_of_number(arch.SYS_SET_MEMPOLICY, _NO_SUCH_POLICY, None, 0)


def _userfaultfd() -> int:
    from kvm_util.arch import current as arch

    return _errno_of_number(arch.SYS_USERFAULTFD, _UFFD_USER_MODE_ONLY | _NO_SUCH_FLAG)


_PROBES: dict[str, Callable[[], int]] = {
    "memfd_create": _memfd_create,
    "madvise": _madvise,
    "set_mempolicy": _set_mempolicy,
    "userfaultfd": _userfaultfd,
}


def _errno_of(call: Callable[[], None]) -> int:
    try:
        call()
    except OSError as error:
        return error.errno or 0
    return 0


def _errno_of_number(number: int, *arguments: int | None) -> int:
    return ctypes.get_errno() if _libc.syscall(number, *arguments) < 0 else 0
