# SPDX-License-Identifier: GPL-2.0-only
"""What the host or a container withholds: an error that such a limit explains says nothing about KVM.

Whether one does is looked up when the error comes, and as close to it as can be: what was taken then is soon given back. A
limit that is near explains nothing: it has to be reached. An error that no limit explains may be KVM's.
"""

import errno
import os
import resource
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from kvm_util import cgroups

PROC = Path("/proc")
MIB = 1 << 20

# What a test has of these at once, at most: vCPUs, collectors, KVM's helper threads; VMs, vCPUs and what the interpreter opens
THREADS = 16
FILES = 64
# What KVM takes at once, at most, and has given back when it says that it could not: about 11 bytes for each page of a slot
# (reverse map, page tracking, dirty log: kvm_alloc_memslot_metadata(), arch/x86/kvm/x86.c), of which the largest has 4 GiB
_KVM_TAKES = 12 * MIB
OTHER_THREAD_LIMITS = "the whole host has as many as it may (sysctl kernel.threads-max, kernel.pid_max)"
_CAP_SYS_ADMIN, _CAP_SYS_RESOURCE = 21, 24  # <linux/capability.h>


class HostLimit(Exception):
    """The host withholds what a test needs; the text is one line: which resource, which limit, and what to do."""


@dataclass(frozen=True)
class Limit:
    """A limit with its value, in words, what it leaves, and what to do about it."""

    text: str
    left: int
    remedy: str

    def __str__(self) -> str:
        return f"{self.text} ({self.remedy})"


def explain(code: int, size: int = 0) -> str | None:
    """The limit that explains error *code* of a system call, in one line; None when none does.

    :param size: how many bytes were asked for, if that is known
    """
    limit = None
    if code in (errno.EMFILE, errno.ENFILE):
        return _why_no_file()
    if code == errno.ENOMEM:
        limit = tightest([*address_space_limits(), *promise_limits(), *memory_limits()], size + _KVM_TAKES)
    if code == errno.EFBIG:
        most = _rlimit(resource.RLIMIT_FSIZE)
        if most is not None and most < size:
            limit = Limit(f"RLIMIT_FSIZE lets a file have {most} bytes", most, "ulimit -f unlimited")
    return None if limit is None else str(limit)


def tightest(limits: Sequence[Limit], needed: int) -> Limit | None:
    """The limit that leaves least, when it leaves less than *needed*."""
    limit = min(limits, key=lambda limit: limit.left, default=None)
    return limit if limit is not None and limit.left < needed else None


def thread_limits() -> list[Limit]:
    """What limits the number of threads."""
    remedy = "docker run --pids-limit, or TasksMax= of a systemd unit"
    found = [
        Limit(f"{group.file} allows {group.most} threads", group.most - group.taken, remedy) for group in cgroups.pids()
    ]
    most = _rlimit(resource.RLIMIT_NPROC)
    if most is not None and not _exempt_from_nproc():
        text = f"RLIMIT_NPROC lets this user have {most} threads"
        found.append(Limit(text, most - _threads_of_user(), "ulimit -u unlimited"))
    return found


def file_limits() -> list[Limit]:
    """What limits the number of open files."""
    most = _rlimit(resource.RLIMIT_NOFILE)
    if most is None:
        return []
    try:
        left = most - len(os.listdir("/proc/self/fd"))
    except OSError:
        left = 0  # that would have been one file more
    return [Limit(f"RLIMIT_NOFILE lets a process have {most} files open", left, "ulimit -n 1024")]


def address_space_limits() -> list[Limit]:
    """What limits the memory that this process may map, in bytes."""
    found = []
    for kind, name, option, taken in (
        (resource.RLIMIT_AS, "RLIMIT_AS", "-v", "VmSize"),
        (resource.RLIMIT_DATA, "RLIMIT_DATA", "-d", "VmData"),
    ):
        most = _rlimit(kind)
        if most is not None:
            text = f"{name} lets a process map {most // MIB} MiB"
            found.append(Limit(text, most - _kib("self/status", taken), f"ulimit {option} unlimited"))
    return found


def memory_limits() -> list[Limit]:
    """What limits the memory that this process and others may use together, in bytes."""
    remedy = "docker run --memory, or MemoryMax= of a systemd unit"
    found = [
        Limit(f"{group.file} allows {group.most // MIB} MiB", group.most - group.taken, remedy)
        for group in cgroups.memory()
    ]
    text = f"the host has {_kib('meminfo', 'MemTotal') // MIB} MiB"
    return [*found, Limit(text, _kib("meminfo", "MemAvailable"), "end other programs")]


def any_limit_of_mapped_memory() -> str | None:
    """The one that leaves least, however much that is."""
    limit = tightest([*address_space_limits(), *promise_limits()], sys.maxsize)
    return None if limit is None else str(limit)


def huge_page_limits(page_size: int) -> list[Limit]:
    """What limits the hugetlb pages of a size that this process may have, in bytes, beside the pool."""
    remedy = "raise it; a pod of Kubernetes has to ask for hugepages- in its limits"
    return [
        Limit(f"{group.file} allows {group.most // MIB} MiB", group.most - group.taken, remedy)
        for group in cgroups.huge_pages(page_size)
    ]


def promise_limits() -> list[Limit]:
    """What limits the memory that all processes may map together, in bytes: with vm.overcommit_memory=2 no more than there is.

    MAP_NORESERVE is ignored then, and what is kept back for root and the user's shell is not given either
    (Documentation/mm/overcommit-accounting.rst, __vm_enough_memory() in mm/util.c).
    """
    if _text("sys/vm/overcommit_memory") != "2":
        return []
    most = _kib("meminfo", "CommitLimit")
    kept = sum(int(_text(f"sys/vm/{who}_reserve_kbytes") or 0) << 10 for who in ("admin", "user"))
    text = f"with vm.overcommit_memory=2 all processes may map {most // MIB} MiB, used or not"
    return [Limit(text, most - _kib("meminfo", "Committed_AS") - kept, "sysctl vm.overcommit_memory=0")]


def available_memory() -> int:
    """Bytes of memory that this process and its children can have without swapping."""
    return max(0, min(limit.left for limit in (*memory_limits(), *promise_limits())))


def oom_kills() -> int:
    """How many processes the kernel has killed so far for want of memory: those of this group, if there are such."""
    of_group = cgroups.oom_kills()
    return int(_field("vmstat", "oom_kill", " ") or 0) if of_group is None else of_group


@contextmanager
def explained(what: str, size: int = 0) -> Iterator[None]:
    """Turn an error of a system call that a limit explains into one that says so.

    :param what: what was to be done, in words
    :param size: how many bytes were asked for
    :raises HostLimit: in place of an OSError
    """
    try:
        yield
    except OSError as error:
        if line := explain(error.errno or 0, size):
            raise HostLimit(f"{what}: {line}") from error
        raise


class _Refusals:
    """The threads that control groups have refused since this process began; each explains one error."""

    def __init__(self) -> None:
        self._explained = cgroups.refused_threads()

    def take_one(self) -> bool:
        """Whether there was one more."""
        if cgroups.refused_threads() <= self._explained:
            return False
        self._explained += 1
        return True


_refusals = _Refusals()


def why_thread_refused() -> str | None:
    """The limit for which the kernel has just refused a thread; None when it has not, as far as can be seen."""
    return _name_thread_limit() if _refusals.take_one() or _refuses_threads() else None


def why_no_thread() -> str | None:
    """The limit for which the interpreter could not start a thread, a while ago; others have ended since."""
    return (
        _name_thread_limit()
        if _refusals.take_one() or tightest(thread_limits(), THREADS) or _refuses_threads()
        else None
    )


def _name_thread_limit() -> str:
    reason = tightest(thread_limits(), THREADS) or explain(errno.ENOMEM, _rlimit(resource.RLIMIT_STACK) or 0)
    return f"no more threads can be started: {reason or OTHER_THREAD_LIMITS}"


def _refuses_threads() -> bool:
    thread = threading.Thread(target=int)
    try:
        thread.start()
    except RuntimeError:
        _refusals.take_one()  # this one
        return True
    thread.join()
    return False


def _why_no_file() -> str | None:
    # RLIMIT_NOFILE counts the files of this process alone, which gives none back in between.
    try:
        os.close(os.open("/", os.O_RDONLY | os.O_CLOEXEC))
    except OSError as error:
        limit = tightest(file_limits(), 1) if error.errno == errno.EMFILE else None
        reason = limit or f"{error.strerror} (sysctl fs.file-max)"
        return f"no more files can be opened: {reason}"
    return None


def capable(capability: int) -> bool:
    """Whether this process has a capability, and not just within a user namespace of its own."""
    whole = (_text("self/uid_map") or "").split() == ["0", "0", "4294967295"]
    return whole and bool(int(status("CapEff") or "0", 16) >> capability & 1)


def _exempt_from_nproc() -> bool:
    """Whether RLIMIT_NPROC is not for this process (copy_process(), kernel/fork.c)."""
    root = os.getuid() == 0 and (_text("self/uid_map") or "").split()[:2] == ["0", "0"]
    return root or capable(_CAP_SYS_ADMIN) or capable(_CAP_SYS_RESOURCE)


def _threads_of_user() -> int:
    """How many threads the processes of this user have, as far as they can be seen."""
    total = 0
    for folder in PROC.glob("[0-9]*"):
        try:
            lines = (folder / "status").read_text().splitlines()
        except OSError:
            continue  # it has ended
        fields = {name: value.split() for name, _, value in (line.partition(":") for line in lines)}
        if int(fields["Uid"][0]) == os.getuid():
            total += int(fields["Threads"][0])
    return total


def _rlimit(kind: int) -> int | None:
    """A soft resource limit; None for none, or when a filter hides it."""
    try:
        most = resource.getrlimit(kind)[0]
    except OSError:
        return None
    return None if most == resource.RLIM_INFINITY else most


def status(name: str) -> str | None:
    """A field of /proc/self/status."""
    return _field("self/status", name)


def _kib(file: str, name: str) -> int:
    """A size in *file*, in bytes.

    :raises HostLimit: the file, or the line, is not shown here
    """
    if (value := _field(file, name)) is None:
        raise HostLimit(f"{PROC / file} has no {name} line here (mount the kernel's own in its place)")
    return int(value.split()[0]) << 10


def _field(file: str, name: str, separator: str = ":") -> str | None:
    lines = (line.partition(separator) for line in (_text(file) or "").splitlines())
    return next((value.strip() for key, _, value in lines if key == name), None)


def _text(file: str) -> str | None:
    try:
        return (PROC / file).read_text().strip()
    except OSError:
        return None
