# SPDX-License-Identifier: GPL-2.0-only
"""The kernel, QEMU and machine of a run in another kernel, found and checked before anything is booted."""

import os
import re
from dataclasses import dataclass, replace
from typing import Any

from kvm_util.host_limits import MIB, available_memory
from kvm_util.wording import counted
from runner.arch import this_arch
from runner.errors import CannotTest
from runner.kernel import Kernel, find_kernel, local_kernels
from runner.modules import Module, check_parameters, kvm_modules, parse_parameters
from runner.qemu import Machine, Qemu, find_qemu
from runner.store import shown

# The kernel to fetch where there is no local one: the one that the suite is run in most
DEFAULT_KERNEL = "debian:6.12"
# The suite's options for sizes at which a cell takes seconds although TCG emulates every instruction
EMULATION_SIZES = {"test_mem": "32M", "iterations": "6", "ring_count": "4096"}

MOST_MACHINES = 16
_WORTH_A_BOOT = 10  # tests
_TEST_MODULES = ("brd",)  # disks in memory, to swap to


@dataclass(frozen=True)
class Target:
    """A kernel, and the machine to boot it in.

    :ivar parameters: of KVM's modules, as the user wants them
    :ivar added: of KVM's modules, added by the suite
    :ivar time_limit: the longest time without a message from the guest, in seconds
    :ivar machines: how many machines share the tests
    :ivar machine_without_threads: every second of them, which runs tests that start no threads; None if all are the same
    """

    kernel: Kernel
    modules: list[Module]
    parameters: dict[str, str]
    added: dict[str, str]
    qemu: Qemu
    machine: Machine
    time_limit: float
    machines: int = 1
    machine_without_threads: Machine | None = None

    @property
    def label(self) -> str:
        """A name for kernel and parameters that can be a part of a path."""
        parameters = ",".join(f"{name}={value}" for name, value in self.parameters.items()) or "defaults"
        return re.sub(r"[^\w.,=+-]", "_", f"{self.kernel.release}-{parameters}")

    def booted_machine(self, threads: bool) -> Machine:
        """A machine with the parameters on the kernel's command line as well, for a KVM that is built in.

        :param threads: whether tests that start threads run there
        """
        machine = self.machine if threads else self.machine_without_threads or self.machine
        parameters = (f"{name}={value}" for name, value in (self.added | self.parameters).items())
        return replace(machine, append=" ".join((*parameters, machine.append)))

    @property
    def lines(self) -> list[str]:
        """The lines of a run's header."""
        image = self.kernel.image
        asked = _words(self.parameters) or "none asked for"
        added = f"; added: {_words(self.added)}" if self.added else ""
        spare = " and a spare one" if self.qemu.has_spare_cpu(self.machine) else ""
        append = f", command line: {self.machine.append}" if self.machine.append else ""
        return [
            f"kernel   {self.kernel.release} ({shown(image)})",
            f"qemu     {self.qemu.emulator.version} ({self.qemu.emulator.origin})",
            f"machine  {self.qemu}, {counted(self.machine.cpus, 'CPU')}{spare}, {self.machine.memory} MiB{append}",
            *([f"         {self._sharing}"] if self.machines > 1 else []),
            *(f"         {restriction}" for restriction in self.qemu.restrictions),
            f"params   {asked}{added}",
        ]

    @property
    def _sharing(self) -> str:
        """How the machines share the tests."""
        if self.machine_without_threads is None:
            return f"{self.machines} of them share the tests (--machines)"
        cpus = counted(self.machine_without_threads.cpus, "CPU")
        return (
            f"{self.machines} share the tests (--machines); {self.machines // 2} with {cpus}, for tests without threads"
        )

    @property
    def data(self) -> dict[str, Any]:
        """The same facts for results.json."""
        return {
            "image": str(self.kernel.image),
            "parameters": self.parameters,
            "added_parameters": self.added,
            "qemu": self.qemu.emulator.version,
            "qemu_origin": self.qemu.emulator.origin,
            "accel": self.qemu.accel,
            "emulated": self.qemu.emulated,
            "cpu_model": self.qemu.cpu_model,
            "machines": self.machines,
            "cpus": self.machine.cpus,
            "memory": self.machine.memory,
            "append": self.machine.append,
            "time_limit": self.time_limit,
        }


def find_target(
    kernel: str | None,
    parameters: str,
    accel: str | None,
    cpu_model: str | None,
    qemu: str | None,
    machine: Machine,
    time_limit: float,
) -> Target:
    """Find and check all that is needed to test *kernel*; what is missing is fetched where that is possible.

    :param kernel: as :func:`~runner.kernel.find_kernel` takes it, or None for a local one
    :raises CannotTest: something is missing or does not fit
    """
    wanted = parse_parameters(parameters)
    free = available_memory() // MIB
    if machine.memory > free:
        raise CannotTest(
            f"--vm-memory: {machine.memory} MiB are not there, the host or its control group has {free} MiB free"
            " (a smaller --vm-memory)"
        )
    found_qemu = find_qemu(cpu_model, accel or "auto", {name.partition(".")[0] for name in wanted}, qemu)
    found, modules = _local_kernel(found_qemu.vendor) if kernel is None else _with_modules(kernel, found_qemu.vendor)
    check_parameters(wanted, modules, found_qemu.vendor)
    added = {
        name: value
        for name, value in this_arch().added_parameters.items()
        if name not in wanted
        and any(name == f"{module.name}.{known}" for module in modules for known in module.parameters)
    }
    return Target(found, modules, wanted, added, found_qemu, machine, time_limit)


def number_of_machines(target: Target, asked: int, tests: int) -> int:
    """How many machines are to share the tests: as many as asked for, else what this host's CPUs and memory allow.

    An emulated machine takes about one of the host's CPUs: several of its own are rarely busy at once.

    :param asked: 0 for no wish
    :param tests: how many tests there are; no machine is to be without one, and a few tests are not worth another boot
    :raises CannotTest: there is too little memory for as many as asked for
    """
    free = available_memory() // MIB
    if asked * target.machine.memory > free:
        raise CannotTest(
            f"--machines: {asked} of {target.machine.memory} MiB need more than the {free} MiB that are free"
            " (fewer machines, or a smaller --vm-memory)"
        )
    if asked:
        return max(1, min(asked, tests))
    cpus = len(os.sched_getaffinity(0)) // (1 if target.qemu.emulated else target.machine.cpus)
    return max(1, min(cpus, free // target.machine.memory, tests // _WORTH_A_BOOT, MOST_MACHINES))


def with_one_cpu(target: Target, tests: int, with_threads: int) -> Target:
    """*target* with one CPU in all machines if no test starts threads, and in every second one if enough tests start none.

    A kernel with one CPU takes half the emulated time for these: the grace periods of RCU cost next to nothing.

    :param tests: how many tests there are
    :param with_threads: how many of them start threads
    """
    one_cpu = replace(target.machine, cpus=1)
    if not with_threads:
        return replace(target, machine=one_cpu)
    pairs = target.machines // 2
    if pairs and (tests - with_threads) // _WORTH_A_BOOT >= pairs:
        return replace(target, machine_without_threads=one_cpu)
    return target


def _local_kernel(vendor: str) -> tuple[Kernel, list[Module]]:
    """The newest local kernel that has KVM, with its modules; one is fetched if there is none."""
    for kernel in local_kernels():
        try:
            return kernel, kvm_modules(kernel, vendor, _TEST_MODULES)
        except CannotTest:
            continue  # such as a kernel for guests, which has no KVM
    return _with_modules(DEFAULT_KERNEL, vendor)


def _with_modules(name: str, vendor: str) -> tuple[Kernel, list[Module]]:
    kernel = find_kernel(name)
    return kernel, kvm_modules(kernel, vendor, _TEST_MODULES)


def _words(parameters: dict[str, str]) -> str:
    return " ".join(f"{name}={value}" for name, value in parameters.items())
