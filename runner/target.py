# SPDX-License-Identifier: GPL-2.0-only
"""What a run under another kernel needs, found and checked before anything is booted."""

import re
from dataclasses import dataclass, replace
from typing import Any

from runner.errors import CannotTest
from runner.kernel import ROOT, Kernel, find_kernel, kernels_at_hand
from runner.kernel_options import AT_HAND
from runner.modules import Module, check_parameters, kvm_modules, parse_parameters
from runner.qemu import INSTALL, Machine, Qemu, available_memory, find_qemu

# Sizes at which a cell takes seconds where every instruction is emulated, as the suite's options have them
EMULATION_SIZES = {"test_mem": "32M", "iterations": "6", "ring_count": "4096"}


@dataclass(frozen=True)
class Target:
    """A kernel, and the machine to boot it in.

    :ivar parameters: those of KVM's modules that are asked for
    :ivar time_limit: for how long the machine may tell nothing, in seconds
    """

    kernel: Kernel
    modules: list[Module]
    parameters: dict[str, str]
    qemu: Qemu
    machine: Machine
    time_limit: float

    @property
    def label(self) -> str:
        """A name for kernel and parameters that can be part of a path."""
        parameters = ",".join(f"{name}={value}" for name, value in self.parameters.items()) or "defaults"
        return re.sub(r"[^\w.,=+-]", "_", f"{self.kernel.release}-{parameters}")

    @property
    def booted_machine(self) -> Machine:
        """The machine with all of the kernel's command line: the parameters are there too, for a KVM that is built in."""
        parameters = (f"{name}={value}" for name, value in self.parameters.items())
        return replace(self.machine, append=" ".join((*parameters, self.machine.append)))

    @property
    def lines(self) -> list[str]:
        """What a run's header tells of it."""
        image = self.kernel.image
        shown = image.relative_to(ROOT) if image.is_relative_to(ROOT) else image
        asked = " ".join(f"{name}={value}" for name, value in self.parameters.items()) or "none asked for"
        spare = " and a spare one" if self.qemu.emulated else ""
        append = f", command line: {self.machine.append}" if self.machine.append else ""
        return [
            f"kernel   {self.kernel.release} ({shown})",
            f"machine  {self.qemu}, {self.machine.cpus} CPUs{spare}, {self.machine.memory} MiB{append}",
            f"params   {asked}",
        ]

    @property
    def data(self) -> dict[str, Any]:
        """The same for the results file."""
        return {
            "image": str(self.kernel.image),
            "parameters": self.parameters,
            "qemu": self.qemu.version,
            "accel": self.qemu.accel,
            "emulated": self.qemu.emulated,
            "cpu_model": self.qemu.cpu_model,
            "cpus": self.machine.cpus,
            "memory": self.machine.memory,
            "append": self.machine.append,
            "time_limit": self.time_limit,
        }


def find_target(
    kernel: str, parameters: str, accel: str | None, cpu_model: str | None, machine: Machine, time_limit: float
) -> Target:
    """Find and check all that is needed to test *kernel*.

    :param kernel: as :func:`~runner.kernel.find_kernel` takes it, or ``auto`` for one that is at hand
    :raises CannotTest: something is missing or does not fit
    """
    wanted = parse_parameters(parameters)
    qemu = find_qemu(cpu_model, accel or "auto", {name.partition(".")[0] for name in wanted})
    if kernel == AT_HAND:
        found = next(iter(kernels_at_hand()), None)
        if found is None:
            raise CannotTest(f"no kernel to boot is at hand: {INSTALL} linux-image-cloud-amd64")
    else:
        found = find_kernel(kernel)
    free = available_memory()
    if machine.memory > free:
        raise CannotTest(f"--vm-memory: {machine.memory} MiB are not there, the host has {free} MiB free")
    modules = kvm_modules(found, qemu.vendor)
    check_parameters(wanted, modules, qemu.vendor)
    return Target(found, modules, wanted, qemu, machine, time_limit)
