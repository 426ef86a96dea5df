# SPDX-License-Identifier: GPL-2.0-only
"""Boots a kernel whose init runs programs of the host instead of pytest, such as C tests."""

import io
import select
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from runner import initramfs
from runner.arch import this_arch
from runner.cpio import CpioWriter
from runner.errors import CannotTest
from runner.guest_init import Job
from runner.kernel import Kernel
from runner.modules import kvm_modules
from runner.qemu import Machine, RunningMachine, find_qemu

PROGRAMS = "/programs"  # the folder that has them in the booted kernel


def boot_programs(
    kernel: Kernel,
    parameters: Mapping[str, str],
    programs: Iterable[Path],
    command: list[str],
    folder: Path,
    machine: Machine,
    time_limit: float,
) -> Iterator[dict[str, Any]]:
    """Boot *kernel* under emulation, with *programs* in PROGRAMS, and run *command* there once KVM is loaded.

    :param parameters: of KVM's modules
    :param command: it has the modules of ``runner``, and may send messages to the report port
    :param folder: for the files of the run
    :param time_limit: for how many seconds there may be no message
    :returns: the messages as they come; the last one has *command*'s ``exit_status`` and the end of its ``output``
    :raises CannotTest: the kernel ended before that, or was silent for too long
    """
    qemu = find_qemu(None, "tcg", ())
    modules = kvm_modules(kernel, qemu.vendor)
    job = Job(
        report_port=this_arch().report_port,
        modules=[(module.guest_path, module.arguments(parameters), module.optional) for module in modules],
        parameters=dict(parameters),
        keep_off_cpu_0=qemu.keeps_off_cpu_0,
        command=command,
        environment={"PATH": "/usr/bin:/bin"},
    )
    with initramfs.build(folder, modules, job) as archive:
        archive.seek(0, io.SEEK_END)
        added = CpioWriter(archive)
        for program in programs:
            added.add_file(f"{PROGRAMS}/{program.name}", program.read_bytes(), 0o755)
        added.finish()
        archive.flush()
        files = (folder / name for name in ("console.log", "qemu.log"))
        running = RunningMachine(qemu, machine, kernel.image, archive.fileno(), *files)
        try:
            yield from _messages(running, time_limit)
        finally:
            running.close()


def _messages(machine: RunningMachine, time_limit: float) -> Iterator[dict[str, Any]]:
    deadline = time.monotonic() + time_limit
    while select.select([machine], [], [], max(deadline - time.monotonic(), 0))[0]:
        deadline = time.monotonic() + time_limit
        messages = machine.receive()
        if messages is None:
            raise CannotTest(f"the kernel ended early\n{machine.console()}")
        for message in messages:
            if "cannot_test" in message:
                raise CannotTest(message["cannot_test"])
            yield message
            if "exit_status" in message:
                return
    raise CannotTest(f"no message for {time_limit:g} s\n{machine.console()}")
