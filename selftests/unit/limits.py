# SPDX-License-Identifier: GPL-2.0-only
"""Resource limits and seccomp filters to put on a child process, as callables for ``preexec_fn``."""

import ctypes
import errno
import os
import resource
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

Limit = Callable[[], object]

# <linux/prctl.h>, <linux/seccomp.h>, <linux/filter.h>
_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _PR_SET_THP_DISABLE = 38, 22, 41
_SECCOMP_MODE_FILTER = 2
_LOAD_WORD, _JUMP_IF_EQUAL, _RETURN = 0x20, 0x15, 0x06
_RET_ALLOW, _RET_ERRNO = 0x7FFF0000, 0x00050000

_GROUPS = Path("/sys/fs/cgroup")
_NAMES_IN_V1 = {"memory.max": "memory.limit_in_bytes"}

_LIBC = ctypes.CDLL(None, use_errno=True)


class _Program(ctypes.Structure):
    """struct sock_fprog."""

    _fields_ = (("len", ctypes.c_ushort), ("filter", ctypes.c_void_p))


def rlimit(kind: int, value: int) -> Limit:
    """Set a resource limit, soft and hard."""
    return lambda: resource.setrlimit(kind, (value, value))


def no_thp() -> None:
    """Disable transparent huge pages for the process and its children."""
    _prctl(_PR_SET_THP_DISABLE, 1)


def skip_without_user(user: int) -> None:
    """Skip the test if a process cannot change to *user*: its user namespace may lack the id."""
    ranges = [tuple(map(int, line.split())) for line in Path("/proc/self/uid_map").read_text().splitlines()]
    if not any(first <= user < first + count for first, _, count in ranges):
        pytest.skip(f"this user namespace has no user {user}")


def refused(*calls: int, code: int = errno.EPERM) -> Limit:
    """Install a seccomp filter that makes system calls fail with *code*, as those of containers do.

    :param calls: system call numbers
    """
    code_of_call = 0  # offset of the number in struct seccomp_data
    steps = [(_LOAD_WORD, 0, 0, code_of_call)]
    for call in calls:
        steps += [(_JUMP_IF_EQUAL, 0, 1, call), (_RETURN, 0, 0, _RET_ERRNO | code)]
    steps.append((_RETURN, 0, 0, _RET_ALLOW))
    text = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))

    def install() -> None:
        _prctl(_PR_SET_NO_NEW_PRIVS, 1)
        _prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(_Program(len(steps), ctypes.addressof(text))))

    return install


def _prctl(option: int, *arguments: object) -> None:
    if _LIBC.prctl(option, *arguments, *[0] * (4 - len(arguments))):
        raise OSError(ctypes.get_errno(), f"prctl({option})")


@contextmanager
def group(file: str, value: str) -> Iterator[Limit]:
    """Create a control group with *value* in *file*; yields a callable by which a child joins it.

    The test is skipped if this user may not create groups, or if they do not have the controller.

    :param file: its name in cgroup v2
    """
    controller = file.partition(".")[0]
    v1 = (_GROUPS / controller).is_dir()
    folder = (_GROUPS / controller if v1 else _GROUPS) / f"dirty-tracking-{os.getpid()}"
    try:
        folder.mkdir()
    except OSError as error:
        pytest.skip(f"no group can be created here: {error.strerror}")
    try:
        setting = folder / (_NAMES_IN_V1.get(file, file) if v1 else file)
        if not setting.exists():
            pytest.skip(f"no group can have the {controller} controller here")
        setting.write_text(value)
        if file == "memory.max":
            _forbid_swap(folder, value)
        yield lambda: (folder / "cgroup.procs").write_text(str(os.getpid()))
    finally:
        folder.rmdir()


def _forbid_swap(folder: Path, memory: str) -> None:
    """Give a group no swap in addition to its memory, if the kernel accounts swap."""
    for file, value in (("memory.swap.max", "0"), ("memory.memsw.limit_in_bytes", memory)):
        if (folder / file).exists():
            (folder / file).write_text(value)
