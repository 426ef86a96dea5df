# SPDX-License-Identifier: GPL-2.0-only
"""The host under test: kernel, KVM modules and their parameters, CPU; and setting up this process for tests on it."""

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
    """Facts about a host. Reports show them, and known bugs are matched against them.

    :ivar kernel: the release, as ``uname -r`` shows it
    :ivar backend: KVM's vendor module (``kvm_intel``, ``kvm_amd``, ``kvm_pvm`` ...), or ``unknown``
    :ivar parameters: values of the parameters of kvm and the backend, by ``module.parameter``
    :ivar cpu: model name, family, model and stepping
    :ivar cpus: how many CPUs this process may run on
    :ivar memory: available memory in bytes
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
    """The leading numbers of *release*: (6, 12, 117) for ``6.12.117+deb12-amd64``."""
    numbers: list[int] = []
    for part in release.split("."):
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        if not digits:
            break
        numbers.append(int(digits))
        if digits != part:
            break
    return tuple(numbers)


# Backends that run these tests' guests in KVM's instruction emulator, and support only the instructions it knows.
# kvm_pvm (pagetable-based virtual machine) runs only paravirtualized guests directly.
EMULATING_BACKENDS = ("kvm_pvm",)


def missing_facts(host: Host) -> str | None:
    """Why too little is known about a host to judge its KVM; None if enough is known."""
    if host.backend == "unknown":
        return (
            "KVM's parameters, which determine its correct behaviour, are not visible here:"
            f" {_MODULES} has no kvm_* (mount sysfs)"
        )
    return None


def opt_out_of_numa_balancing() -> str | None:
    """Exempt this thread, and the threads it starts, from automatic NUMA balancing.

    NUMA balancing unmaps pages now and then to see which CPU touches them. KVM then maps them again, and marks a page dirty
    when it maps it writable (make_spte(), arch/x86/kvm/mmu/spte.c), although the guest has not written it. An explicit memory
    policy exempts a task (task_numa_work(), kernel/sched/fair.c). A single node is no protection: when enabled, balancing
    unmaps pages there too.

    :returns: why that failed and what to do; None on success, or if the kernel has no NUMA balancing or it is disabled
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
        pass  # not readable: it may be enabled
    refused = filtered_calls.why_refused("set_mempolicy", code) or errno.errorcode.get(code)
    return (
        "automatic NUMA balancing would make KVM report pages that were not written (sysctl kernel.numa_balancing=0), and"
        f" set_mempolicy, which prevents that, is refused: {refused}"
    )


def unblock_kick_signals() -> None:
    """Unblock the signals that kick a vCPU out of KVM_RUN, for this thread and those it starts.

    The signal mask is inherited: if the parent process blocked them, every vCPU to be stopped would look hung.
    """
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1, signal.SIGALRM})


def _backend() -> str:
    """The vendor module in use. A loaded module is preferred to a built-in one, then the one for this CPU's vendor."""
    found = [path for path in _MODULES.glob("kvm_*") if (path / "parameters").is_dir()]
    vendor = {"GenuineIntel": "kvm_intel", "AuthenticAMD": "kvm_amd", "HygonGenuine": "kvm_amd"}.get(arch.cpu_vendor())
    found.sort(key=lambda path: (not (path / "initstate").exists(), path.name != vendor, path.name))
    return found[0].name if found else "unknown"


def this_host() -> Host:
    """Collect the facts about this machine."""
    backend = _backend()
    parameters = {}
    for module in ("kvm", backend):
        for path in sorted((_MODULES / module / "parameters").glob("*")):
            if os.access(path, os.R_OK):
                parameters[f"{module}.{path.name}"] = path.read_text().strip()
    return Host(
        os.uname().release, backend, parameters, arch.cpu_model(), len(os.sched_getaffinity(0)), available_memory()
    )
