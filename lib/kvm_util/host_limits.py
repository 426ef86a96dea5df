# SPDX-License-Identifier: GPL-2.0-only
"""Resource limits of the host or a container. An error that such a limit explains says nothing about KVM.

Limits are checked right after the error, because resources in use at that time may be freed soon. A limit explains an error
only if it has been reached. An error that no limit explains may be KVM's.
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

# Upper bounds of what one test uses at a time. Threads: vCPUs, collectors, KVM's own. Files: VMs, vCPUs, the interpreter's.
THREADS = 16
FILES = 64
# Upper bound of what one ioctl allocates, and has freed again by the time it returns ENOMEM: about 11 bytes per page of a
# memslot (rmap, page track, dirty bitmap: kvm_alloc_memslot_metadata(), arch/x86/kvm/x86.c); the largest memslot has 4 GiB.
_KVM_ALLOCATES = 12 * MIB
OTHER_THREAD_LIMITS = "the limit of the whole host is reached (sysctl kernel.threads-max, kernel.pid_max)"
_CAP_SYS_ADMIN, _CAP_SYS_RESOURCE = 21, 24  # <linux/capability.h>


class HostLimit(Exception):
    """A test needs more than the host grants; the message is one line: which resource, which limit, and what to do."""


@dataclass(frozen=True)
class Limit:
    """One limit.

    :ivar text: the limit and its value, in words
    :ivar left: how much of it is free, in the resource's unit; may be negative
    :ivar remedy: what to do about it
    """

    text: str
    left: int
    remedy: str

    def __str__(self) -> str:
        return f"{self.text} ({self.remedy})"


def explain(code: int, size: int = 0) -> str | None:
    """The limit that explains why a system call has just failed with *code*, in one line; None if none does.

    :param size: how many bytes the call asked for, if known
    """
    limit = None
    if code in (errno.EMFILE, errno.ENFILE):
        return _why_no_file()
    if code == errno.ENOMEM:
        limit = tightest([*address_space_limits(), *overcommit_limits(), *memory_limits()], size + _KVM_ALLOCATES)
    if code == errno.EFBIG:
        most = _rlimit(resource.RLIMIT_FSIZE)
        if most is not None and most < size:
            limit = Limit(f"RLIMIT_FSIZE lets a file have {most} bytes", most, "ulimit -f unlimited")
    return None if limit is None else str(limit)


def tightest(limits: Sequence[Limit], needed: int) -> Limit | None:
    """The limit with the least left, if that is less than *needed*; else None."""
    limit = min(limits, key=lambda limit: limit.left, default=None)
    return limit if limit is not None and limit.left < needed else None


def thread_limits() -> list[Limit]:
    """The limits on the number of threads."""
    remedy = "docker run --pids-limit, or TasksMax= of a systemd unit"
    found = [
        Limit(f"{group.file} allows {group.limit} threads", group.limit - group.usage, remedy)
        for group in cgroups.pids()
    ]
    most = _rlimit(resource.RLIMIT_NPROC)
    if most is not None and not _exempt_from_nproc():
        text = f"RLIMIT_NPROC lets this user have {most} threads"
        found.append(Limit(text, most - _threads_of_user(), "ulimit -u unlimited"))
    return found


def file_limits() -> list[Limit]:
    """The limits on the number of open files."""
    most = _rlimit(resource.RLIMIT_NOFILE)
    if most is None:
        return []
    try:
        left = most - len(os.listdir("/proc/self/fd"))
    except OSError:
        left = 0  # listing the directory needs a file itself
    return [Limit(f"RLIMIT_NOFILE lets a process have {most} files open", left, "ulimit -n 1024")]


def address_space_limits() -> list[Limit]:
    """The limits on the memory that this process may map, in bytes."""
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
    """The limits on the memory that this process may use together with others, in bytes."""
    remedy = "docker run --memory, or MemoryMax= of a systemd unit"
    found = [
        Limit(f"{group.file} allows {group.limit // MIB} MiB", group.limit - group.usage, remedy)
        for group in cgroups.memory()
    ]
    text = f"the host has {_kib('meminfo', 'MemTotal') // MIB} MiB"
    return [*found, Limit(text, _kib("meminfo", "MemAvailable"), "end other programs")]


def tightest_mapping_limit() -> str | None:
    """The limit on mapped memory with the least left, in one line; None if there is no such limit."""
    limit = tightest([*address_space_limits(), *overcommit_limits()], sys.maxsize)
    return None if limit is None else str(limit)


def huge_page_limits(page_size: int) -> list[Limit]:
    """The limits on this process's hugetlb memory, in bytes, apart from the size of the pool.

    :param page_size: in bytes
    """
    remedy = "raise it; a pod of Kubernetes has to ask for hugepages- in its limits"
    return [
        Limit(f"{group.file} allows {group.limit // MIB} MiB", group.limit - group.usage, remedy)
        for group in cgroups.huge_pages(page_size)
    ]


def overcommit_limits() -> list[Limit]:
    """The limit on the memory that all processes may map together, in bytes; only there with vm.overcommit_memory=2.

    MAP_NORESERVE is ignored then, and the reserves for root and for the user's shell are not available
    (Documentation/mm/overcommit-accounting.rst, __vm_enough_memory() in mm/util.c).
    """
    if _text("sys/vm/overcommit_memory") != "2":
        return []
    most = _kib("meminfo", "CommitLimit")
    reserved = sum(int(_text(f"sys/vm/{who}_reserve_kbytes") or 0) << 10 for who in ("admin", "user"))
    text = f"with vm.overcommit_memory=2 all processes may map {most // MIB} MiB, used or not"
    return [Limit(text, most - _kib("meminfo", "Committed_AS") - reserved, "sysctl vm.overcommit_memory=0")]


def available_memory() -> int:
    """How many bytes of memory this process and its children can allocate without swapping."""
    return max(0, min(limit.left for limit in (*memory_limits(), *overcommit_limits())))


def oom_kills() -> int:
    """How many processes the OOM killer has killed so far: in this process's group if the kernel counts that, else in all."""
    of_group = cgroups.oom_kills()
    return int(_field("vmstat", "oom_kill", " ") or 0) if of_group is None else of_group


@contextmanager
def explained(what: str, size: int = 0) -> Iterator[None]:
    """Raise HostLimit in place of an OSError that a limit explains; other errors pass.

    :param what: the error in words, to begin the message with
    :param size: how many bytes the body asks for
    """
    try:
        yield
    except OSError as error:
        if line := explain(error.errno or 0, size):
            raise HostLimit(f"{what}: {line}") from error
        raise


class _Refusals:
    """Counts the forks that control groups have refused since this process began; each refusal explains one error."""

    def __init__(self) -> None:
        self._explained = cgroups.refused_threads()

    def take_one(self) -> bool:
        """Use up one refusal; False if none is left."""
        if cgroups.refused_threads() <= self._explained:
            return False
        self._explained += 1
        return True


_refusals = _Refusals()


def why_thread_refused() -> str | None:
    """The limit because of which the kernel has just failed to create a thread, in one line; None if no limit is reached."""
    return _name_thread_limit() if _refusals.take_one() or _refuses_threads() else None


def why_no_thread() -> str | None:
    """Like :func:`why_thread_refused` for an earlier failure: a limit that is merely close counts too.

    Threads that were running at the time may have ended since.
    """
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
        _refusals.take_one()  # the refusal of this very thread
        return True
    thread.join()
    return False


def _why_no_file() -> str | None:
    # RLIMIT_NOFILE counts only this process's files, and it has closed none since the error.
    try:
        os.close(os.open("/", os.O_RDONLY | os.O_CLOEXEC))
    except OSError as error:
        limit = tightest(file_limits(), 1) if error.errno == errno.EMFILE else None
        reason = limit or f"{error.strerror} (sysctl fs.file-max)"
        return f"no more files can be opened: {reason}"
    return None


def capable(capability: int) -> bool:
    """Whether this process has a capability in the initial user namespace."""
    whole = (_text("self/uid_map") or "").split() == ["0", "0", "4294967295"]
    return whole and bool(int(status("CapEff") or "0", 16) >> capability & 1)


def _exempt_from_nproc() -> bool:
    """Whether the kernel ignores RLIMIT_NPROC for this process (copy_process(), kernel/fork.c)."""
    root = os.getuid() == 0 and (_text("self/uid_map") or "").split()[:2] == ["0", "0"]
    return root or capable(_CAP_SYS_ADMIN) or capable(_CAP_SYS_RESOURCE)


def _threads_of_user() -> int:
    """How many threads this user's visible processes have."""
    total = 0
    for folder in PROC.glob("[0-9]*"):
        try:
            lines = (folder / "status").read_text().splitlines()
        except OSError:
            continue  # the process has ended
        fields = {name: value.split() for name, _, value in (line.partition(":") for line in lines)}
        if int(fields["Uid"][0]) == os.getuid():
            total += int(fields["Threads"][0])
    return total


def _rlimit(kind: int) -> int | None:
    """A soft resource limit; None if unlimited, or if a seccomp filter hides it."""
    try:
        most = resource.getrlimit(kind)[0]
    except OSError:
        return None
    return None if most == resource.RLIM_INFINITY else most


def status(name: str) -> str | None:
    """A field of /proc/self/status; None if there is no such field."""
    return _field("self/status", name)


def _kib(file: str, name: str) -> int:
    """A size in bytes, from a file of /proc that has it in kB.

    :raises HostLimit: the file or the line is missing, as when a container hides it
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
