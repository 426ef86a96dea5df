# SPDX-License-Identifier: GPL-2.0-only
"""What the tests run on: kernel, KVM's modules and their parameters, CPU."""

import ctypes
import errno
import os
import signal
from dataclasses import dataclass
from pathlib import Path

from kvm_util import filtered_calls
from kvm_util.arch import current as arch
from kvm_util.host_limits import available_memory

_MODULES = Path("/sys/module")
_NUMA_BALANCING = Path("/proc/sys/kernel/numa_balancing")
_MPOL_LOCAL = 4  # <linux/mempolicy.h>


@dataclass(frozen=True)
class Host:
    """A host's facts, as reports show them and known bugs are matched against.

    :ivar backend: the vendor module that KVM runs on (``kvm_intel``, ``kvm_amd``, ``kvm_pvm`` ...); ``unknown`` without one
    :ivar parameters: ``module.parameter`` of kvm and the backend, with their values
    """

    kernel: str
    backend: str
    parameters: dict[str, str]
    cpu: str
    cpus: int
    memory: int

    @property
    def kernel_version(self) -> tuple[int, ...]:
        """The release's leading numbers, such as (6, 12, 117)."""
        return version_numbers(self.kernel)


def version_numbers(release: str) -> tuple[int, ...]:
    """The numbers that *release* begins with: (6, 12, 117) for ``6.12.117+deb12-amd64``."""
    numbers: list[int] = []
    for part in release.split("."):
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        if not digits:
            break
        numbers.append(int(digits))
        if digits != part:
            break
    return tuple(numbers)


# Backends that run a guest which is not their own kind by KVM's instruction emulator, and know only what that knows
EMULATING_BACKENDS = ("kvm_pvm",)


def missing_facts(host: Host) -> str | None:
    """Why too little is known of a host to judge its KVM; None when it is enough."""
    if host.backend == "unknown":
        return (
            f"KVM's parameters, which decide what is right, are not shown here: {_MODULES} has no kvm_* (mount sysfs)"
        )
    return None


def keep_memory_in_place() -> str | None:
    """Have the kernel leave this process's memory where it is, now and in threads that begin later.

    Automatic NUMA balancing takes pages out of the page tables now and then, to see who comes for them; KVM then maps them
    anew, and what it maps writable it reports as dirty (make_spte(), arch/x86/kvm/mmu/spte.c). A policy that is set by hand
    keeps it off (task_numa_work(), kernel/sched/fair.c). Kernels without NUMA do not have the call, and need none.

    :returns: why it cannot be had, and what to do; None when it is not needed or done. One node is no reason to go without:
        balancing that was switched on takes pages there too
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(arch.SYS_SET_MEMPOLICY, _MPOL_LOCAL, None, 0) == 0:
        return None
    code = ctypes.get_errno()
    try:
        if _NUMA_BALANCING.read_text().strip() == "0":
            return None
    except FileNotFoundError:
        return None  # a kernel without it
    except OSError:
        pass  # hidden: it may be on
    refused = filtered_calls.why_refused("set_mempolicy", code) or errno.errorcode.get(code)
    return (
        "automatic NUMA balancing would have KVM report pages that nobody wrote (sysctl kernel.numa_balancing=0), and"
        f" set_mempolicy, which keeps it off, is refused: {refused}"
    )


def let_signals_in() -> None:
    """Have the signals that end a KVM_RUN come to this thread, and those that it will start.

    Whoever started the process may have blocked them, which is inherited: each vCPU that is to stop would look as if it hung.
    """
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1, signal.SIGALRM})


def _backend() -> str:
    """The vendor module that is in use: one that was loaded, rather than one built in, for this CPU's vendor if several."""
    found = [path for path in _MODULES.glob("kvm_*") if (path / "parameters").is_dir()]
    vendor = {"GenuineIntel": "kvm_intel", "AuthenticAMD": "kvm_amd", "HygonGenuine": "kvm_amd"}.get(arch.cpu_vendor())
    found.sort(key=lambda path: (not (path / "initstate").exists(), path.name != vendor, path.name))
    return found[0].name if found else "unknown"


def this_host() -> Host:
    """Look at the machine."""
    backend = _backend()
    parameters = {}
    for module in ("kvm", backend):
        for path in sorted((_MODULES / module / "parameters").glob("*")):
            if os.access(path, os.R_OK):
                parameters[f"{module}.{path.name}"] = path.read_text().strip()
    return Host(
        os.uname().release, backend, parameters, arch.cpu_model(), len(os.sched_getaffinity(0)), available_memory()
    )
