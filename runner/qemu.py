# SPDX-License-Identifier: GPL-2.0-only
"""QEMU: how it runs guests on this host, and one virtual machine from its launch to its end."""

import ctypes
import json
import os
import re
import signal
import subprocess
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runner.arch import this_arch
from runner.emulator import Emulator, find_emulator
from runner.emulator_faults import faults_of, withheld, without
from runner.emulator_probe import probe
from runner.errors import CannotTest

_LIBC = ctypes.CDLL(None)
_PR_SET_PDEATHSIG = 1  # include/uapi/linux/prctl.h
# Of the kernel's command line where the CPUs are emulated. Closing a VM waits for RCU grace periods, which would begin with a
# wait, and removes its files in debugfs, which nothing reads.
_QUICK = "debugfs=off rcutree.jiffies_till_first_fqs=0 rcutree.jiffies_till_next_fqs=1"


@dataclass(frozen=True)
class Qemu:
    """A QEMU program with an accelerator and a CPU model.

    :ivar vendor: KVM's module for this CPU, such as ``kvm_amd``
    :ivar restrictions: how the machine is restricted because of faults of the emulation, a line each
    """

    emulator: Emulator
    accel: str
    cpu_model: str
    vendor: str
    restrictions: tuple[str, ...] = ()

    @property
    def emulated(self) -> bool:
        """Whether TCG emulates the CPUs."""
        return self.accel.startswith("tcg")

    @property
    def keeps_off_cpu_0(self) -> bool:
        """Whether no test runs on the first of several CPUs."""
        return self.emulated and this_arch().emulated_cpu_0_unsafe

    def has_spare_cpu(self, machine: "Machine") -> bool:
        """Whether a machine gets a CPU more than the tests use, the first one. A single CPU is harmed by no other."""
        return self.keeps_off_cpu_0 and machine.cpus > 1

    def __str__(self) -> str:
        how = "emulated by" if self.emulated else "virtualized by"
        return f"{how} QEMU {self.emulator.version} ({self.accel}, CPU {self.cpu_model})"


@dataclass(frozen=True)
class Machine:
    """The size of a virtual machine.

    :ivar memory: in MiB
    :ivar cpus: how many CPUs the tests use
    :ivar append: more of the kernel's command line
    """

    memory: int
    cpus: int
    append: str


def find_qemu(cpu_model: str | None, accel: str, wanted: Collection[str], named: str | None = None) -> Qemu:
    """Choose a QEMU: with nested virtualization where the host offers it, else with TCG's emulation of a CPU.

    :param cpu_model: as QEMU's ``-cpu`` takes it; None for the one that is known to work
    :param accel: one of ACCELERATORS; auto is kvm if the host's nested virtualization is that of the *wanted* modules
    :param wanted: the modules that the user gives parameters for: ``kvm_amd`` can be emulated on any host
    :param named: the path of the QEMU to use; None to choose
    :raises CannotTest: there is none
    """
    nested = nested_vendor()
    if accel == "kvm" and nested is None:
        parameters = ", ".join(f"{vendor}.nested" for vendor in this_arch().vendor_modules)
        raise CannotTest(f"--accel kvm: this host offers no nested virtualization ({parameters})")
    others = {vendor for vendor in this_arch().vendor_modules if vendor in wanted and vendor != nested}
    if nested and accel != "tcg" and (accel == "kvm" or not others):
        return Qemu(find_emulator(named, emulates=False), "kvm", cpu_model or "host", nested)
    return _emulate(find_emulator(named, emulates=True), cpu_model or this_arch().emulated_cpu)


def _emulate(emulator: Emulator, cpu_model: str) -> Qemu:
    """*emulator* with TCG and a CPU model, without the features that it emulates wrongly.

    :raises CannotTest: it emulates something wrongly that the tests need
    """
    faults = [fault for fault in faults_of(emulator.version) if fault.avoid]
    # These faults show only while two CPUs run at once.
    accel = f"tcg,thread={'single' if faults else 'multi'}"
    restrictions = [f"all CPUs share a thread, as QEMU {emulator.version} {fault.does}" for fault in faults[-1:]]
    failed = probe(emulator.command, cpu_model, accel)
    offered = without(cpu_model, withheld(failed))
    left = failed if offered == cpu_model else probe(emulator.command, offered, accel)
    if left:
        raise CannotTest(f"QEMU {emulator.version} ({emulator.origin}) with CPU {offered}: {next(iter(left.values()))}")
    restrictions += [f"the CPU is {offered}, as {reason}" for reason in failed.values()]
    return Qemu(emulator, accel, offered, this_arch().emulated_module, tuple(restrictions))


def nested_vendor() -> str | None:
    """The host's KVM module, if /dev/kvm can be used and offers nested virtualization."""
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return None
    for vendor in this_arch().vendor_modules:
        parameter = Path(f"/sys/module/{vendor}/parameters/nested")
        if parameter.exists() and parameter.read_text().strip() in ("Y", "1"):
            return vendor
    return None


class RunningMachine:
    """A QEMU process from its launch to its end. The guest's second serial port sends messages and takes orders.

    :param initramfs: a file descriptor
    :param console: the file that the output of the first serial port goes to
    :param errors: the file that QEMU's own messages go to
    """

    def __init__(self, qemu: Qemu, machine: Machine, kernel: Path, initramfs: int, console: Path, errors: Path) -> None:
        arch = this_arch()
        # The whole kernel log goes to the console: it is what a panic leaves. panic=-1: reset, and so exit, at once.
        emulated = f"{_QUICK} {arch.emulated_command_line}" if qemu.emulated else ""
        command_line = f"console={arch.console} ignore_loglevel panic=-1 {emulated} {machine.append}"
        cpus = machine.cpus + qemu.has_spare_cpu(machine)
        self._console = console
        self._errors = errors
        self._rest = b""
        with self._errors.open("wb") as file:
            self._process = subprocess.Popen(
                [
                    *(*qemu.emulator.command, "-accel", qemu.accel, "-cpu", qemu.cpu_model, "-smp", str(cpus)),
                    *("-machine", arch.machine, "-m", f"{machine.memory}M", "-nodefaults", "-no-user-config"),
                    *("-display", "none", "-no-reboot"),
                    *("-serial", f"file:{console}", "-serial", "stdio"),
                    *("-kernel", str(kernel), "-initrd", f"/proc/self/fd/{initramfs}", "-append", command_line),
                ],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                pass_fds=[initramfs],
                preexec_fn=_die_with_parent,
            )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._orders, self._messages = self._process.stdin, self._process.stdout

    def close(self) -> None:
        """Kill QEMU, if it still runs."""
        self._process.kill()
        self._process.wait()
        with suppress(BrokenPipeError):
            self._orders.close()
        self._messages.close()

    def fileno(self) -> int:
        """The file descriptor that is readable when there is a message, or QEMU has exited."""
        return self._messages.fileno()

    def receive(self) -> list[dict[str, Any]] | None:
        """The messages of the guest that have arrived; None if QEMU has exited.

        :raises CannotTest: one is not JSON
        """
        data = os.read(self.fileno(), 1 << 16)
        if not data:
            return None
        *lines, self._rest = (self._rest + data).split(b"\n")
        messages = []
        for line in lines:
            try:
                messages.append(json.loads(line))
            except ValueError:
                raise CannotTest(f"the machine's report is garbled: {line[:80]!r}") from None
        return messages

    def order(self, text: str) -> None:
        """Send a line to the guest. If QEMU has exited, :meth:`receive` says so."""
        with suppress(BrokenPipeError):
            self._orders.write(f"{text}\n".encode())
            self._orders.flush()

    def console(self) -> str:
        """The output of the console so far, without escape sequences."""
        text = self._console.read_text(errors="replace") if self._console.exists() else ""
        return re.sub(r"\x1b\[[0-9;?=]*[A-Za-z]|\x1bc|\r", "", text)

    def check_exit(self) -> None:
        """Wait for QEMU to exit, and check that the guest made it do so.

        :raises CannotTest: QEMU failed, or a signal killed it
        """
        status = self._process.wait()
        lines = self._errors.read_text(errors="replace").strip().splitlines()
        # On SIGTERM, SIGINT and SIGHUP it exits with status 0 (qemu_kill_report(), system/runstate.c).
        if status or any("terminating on signal" in line for line in lines):
            how = f"signal {signal.Signals(-status).name}" if status < 0 else f"status {status}"
            raise CannotTest(f"QEMU ended with {how}: {lines[-1] if lines else 'no message'}")


def _die_with_parent() -> None:
    """Have the kernel kill this process when its parent exits, however it exits."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
