# SPDX-License-Identifier: GPL-2.0-only
"""QEMU: what it can accelerate with, and one machine that it runs."""

import ctypes
import json
import os
import re
import select
import signal
import subprocess
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runner.emulator import Emulator, find_emulator
from runner.emulator_faults import faults_of, withheld, without
from runner.emulator_probe import probe
from runner.errors import CannotTest

_VENDORS = ("kvm_intel", "kvm_amd")
# Without ERMS and FSRM the kernel clears and copies memory by words, not by string instructions, which TCG does byte by byte.
_EMULATED_CPU = "max,-erms,-fsrm"
_LIBC = ctypes.CDLL(None)
_PR_SET_PDEATHSIG = 1  # include/uapi/linux/prctl.h


@dataclass(frozen=True)
class Qemu:
    """An emulator, and what it is to accelerate with.

    :ivar vendor: KVM's module for the CPU that its machines have
    :ivar restrictions: what it is kept from for the faults of its emulation, a line each
    """

    emulator: Emulator
    accel: str
    cpu_model: str
    vendor: str
    restrictions: tuple[str, ...] = ()

    @property
    def emulated(self) -> bool:
        """Whether the machine's instructions are emulated."""
        return self.accel.startswith("tcg")

    def __str__(self) -> str:
        how = "emulated by" if self.emulated else "virtualized by"
        return f"{how} QEMU {self.emulator.version} ({self.accel}, CPU {self.cpu_model})"


@dataclass(frozen=True)
class Machine:
    """What a machine is made of.

    :ivar memory: in MiB
    :ivar cpus: those that the tests run on
    :ivar append: more of the kernel's command line
    """

    memory: int
    cpus: int
    append: str


def find_qemu(cpu_model: str | None, accel: str, wanted: Collection[str], named: str | None = None) -> Qemu:
    """A QEMU, with nested virtualization where the host offers it, else with emulation of AMD's.

    :param cpu_model: as QEMU's ``-cpu`` takes it; None for the one that is known to work
    :param accel: one of ACCELERATORS; auto is kvm where the host has the nested virtualization that is asked for
    :param wanted: modules that are asked for by their parameters: ``kvm_amd`` can be emulated on any host
    :param named: the path of the QEMU to use; None to choose
    :raises CannotTest: there is none
    """
    nested = _nested_vendor()
    if accel == "kvm" and nested is None:
        raise CannotTest("--accel kvm: this host offers no nested virtualization (kvm_intel.nested, kvm_amd.nested)")
    others = {vendor for vendor in _VENDORS if vendor in wanted and vendor != nested}
    if nested and accel != "tcg" and (accel == "kvm" or not others):
        return Qemu(find_emulator(named, emulates=False), "kvm", cpu_model or "host", nested)
    return _emulating(find_emulator(named, emulates=True), cpu_model or _EMULATED_CPU)


def _emulating(emulator: Emulator, cpu_model: str) -> Qemu:
    """*emulator* with its emulation of a CPU, less what that does wrong.

    :raises CannotTest: it does something wrong that the tests cannot do without
    """
    faults = [fault for fault in faults_of(emulator.version) if fault.avoid]
    # What such versions do wrong needs two CPUs at work at once.
    accel = f"tcg,thread={'single' if faults else 'multi'}"
    restrictions = [f"all CPUs share a thread, as QEMU {emulator.version} {fault.does}" for fault in faults[-1:]]
    failed = probe(emulator.command, cpu_model, accel)
    offered = without(cpu_model, withheld(failed))
    left = failed if offered == cpu_model else probe(emulator.command, offered, accel)
    if left:
        raise CannotTest(f"QEMU {emulator.version} ({emulator.origin}) with CPU {offered}: {next(iter(left.values()))}")
    restrictions += [f"the CPU is {offered}, as {reason}" for reason in failed.values()]
    # TCG emulates SVM with nested paging, and no VMX.
    return Qemu(emulator, accel, offered, "kvm_amd", tuple(restrictions))


def _nested_vendor() -> str | None:
    """The host's KVM module when it can be used and offers nested virtualization."""
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return None
    for vendor in _VENDORS:
        parameter = Path(f"/sys/module/{vendor}/parameters/nested")
        if parameter.exists() and parameter.read_text().strip() in ("Y", "1"):
            return vendor
    return None


class Deadline(Exception):
    """No message has come from the machine for too long."""


class RunningMachine:
    """A machine from its start to its end.

    :param initramfs: the descriptor of a file with it
    :param console: where the first serial port's output goes
    :raises CannotTest: QEMU does not start
    """

    def __init__(self, qemu: Qemu, machine: Machine, kernel: Path, initramfs: int, console: Path) -> None:
        # All that the kernel says goes to the console: it is the log that a panic leaves. -1: end at once on a panic.
        # Huge pages are for the hugetlb backings; those of 1 GiB can only be had at boot.
        huge_pages = "hugepagesz=1G hugepages=1 hugepagesz=2M hugepages=40" if qemu.emulated else ""
        command_line = f"console=ttyS0 ignore_loglevel panic=-1 {huge_pages} {machine.append}"
        # One more than the tests get; see guest_init.
        cpus = machine.cpus + 1 if qemu.emulated else machine.cpus
        self._console = console
        self._errors = console.with_name("qemu.log")
        with self._errors.open("wb") as errors:
            self._process = subprocess.Popen(
                [
                    *(*qemu.emulator.command, "-accel", qemu.accel, "-cpu", qemu.cpu_model, "-smp", str(cpus)),
                    *("-m", f"{machine.memory}M", "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
                    *("-serial", f"file:{console}", "-serial", "stdio"),
                    *("-kernel", str(kernel), "-initrd", f"/proc/self/fd/{initramfs}", "-append", command_line),
                ],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                pass_fds=[initramfs],
                preexec_fn=_end_with_parent,
            )

    def messages(self, patience: float) -> Iterator[dict[str, Any]]:
        """The messages of the programs in the machine, until it ends.

        :param patience: for how long no message may come, in seconds
        :raises Deadline: no message came for so long
        """
        assert self._process.stdout is not None
        port = self._process.stdout.fileno()
        rest = b""
        while True:
            if not select.select([port], [], [], patience)[0]:
                raise Deadline
            data = os.read(port, 1 << 16)
            if not data:
                return
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                try:
                    yield json.loads(line)
                except json.JSONDecodeError:
                    raise CannotTest(f"the machine's report is garbled: {line[:80]!r}") from None

    def console(self) -> str:
        """What the console has shown so far."""
        text = self._console.read_text(errors="replace") if self._console.exists() else ""
        return re.sub(r"\x1b\[[0-9;?=]*[A-Za-z]|\x1bc|\r", "", text)

    def check_emulator(self) -> None:
        """After the machine has ended: make sure that it did so by itself.

        :raises CannotTest: QEMU failed, or something ended it
        """
        status = self._process.wait()
        lines = self._errors.read_text(errors="replace").strip().splitlines()
        # SIGTERM, SIGINT and SIGHUP have it end in good order, with status 0 (qemu_kill_report(), system/runstate.c).
        if status or any("terminating on signal" in line for line in lines):
            how = f"signal {signal.Signals(-status).name}" if status < 0 else f"status {status}"
            raise CannotTest(f"QEMU ended with {how}: {lines[-1] if lines else 'it said nothing'}")

    def stop(self) -> None:
        """End the machine, if it has not ended yet."""
        self._process.kill()
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()


def _end_with_parent() -> None:
    """Have the kernel end this process when its parent ends, however that comes."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
