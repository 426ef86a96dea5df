#!/usr/bin/python3 -SE
# SPDX-License-Identifier: GPL-2.0-only
"""The init process of the booted kernel: it loads KVM, runs pytest, and reports to the host over a serial port.

Its job is in ``/job.json``, its messages are lines of JSON. The host kills the machine at the end.
"""

import contextlib
import ctypes
import json
import os
import subprocess
import sys
import time

JOB = "/job.json"
OUTPUT = "/run/output"
INIT_MARKER = "guest_init: begins"  # in the kernel's log, between its boot and the first user space

MOUNTS = (
    ("proc", "/proc"),
    ("sysfs", "/sys"),
    ("devtmpfs", "/dev"),
    ("tmpfs", "/dev/shm"),
    ("tmpfs", "/run"),
    ("tmpfs", "/tmp"),
)

libc = ctypes.CDLL(None, use_errno=True)


class CannotTest(Exception):
    """This kernel cannot be tested; the text says why."""


class Job:
    """The content of JOB; no dataclass, as every import costs emulated time.

    :ivar modules: path and arguments of each module, and whether it is optional, in the order in which to load them
    :ivar parameters: values of KVM's parameters to check afterwards, such as ``kvm.tdp_mmu``
    :ivar command: pytest, which is started before the modules are loaded and gets a line of input afterwards
    """

    def __init__(
        self,
        report_port: str,
        modules: list[tuple[str, str, bool]],
        parameters: dict[str, str],
        keep_off_cpu_0: bool,
        command: list[str],
        environment: dict[str, str],
    ) -> None:
        self.report_port = report_port
        self.modules = modules
        self.parameters = parameters
        self.keep_off_cpu_0 = keep_off_cpu_0
        self.command = command
        self.environment = environment


def main(job: Job) -> None:
    """Run the whole job, and report how it ended."""
    for kind, path in MOUNTS:
        os.makedirs(path, exist_ok=True)
        libc.mount(kind.encode(), path.encode(), kind.encode(), 0, None)
    with open("/dev/kmsg", "w") as log:
        log.write(INIT_MARKER)
    allow_huge_shmem()
    send(job, booted=os.uname().release)
    if job.keep_off_cpu_0:
        keep_off_cpu_0()
    suite = start_suite(job.command, job.environment)
    try:
        for path, arguments, optional in job.modules:
            load_module(path, arguments, optional)
        if not os.path.exists("/dev/kvm"):
            raise CannotTest("there is no /dev/kvm: this kernel has no KVM for this CPU")
        for name, wanted in job.parameters.items():
            check_parameter(name, wanted)
    except CannotTest as error:
        send(job, cannot_test=str(error))
        return
    suite.communicate(b"\n")
    with open(OUTPUT, errors="replace") as output:
        send(job, exit_status=suite.returncode, output=output.read()[-20000:])


def allow_huge_shmem() -> None:
    """Allow huge pages in shared memory that asks for them, for the backing ``shmem_thp``; a kernel without them stays so.

    The kernel's command line can do that since Linux 6.14 only.
    """
    with contextlib.suppress(OSError), open("/sys/kernel/mm/transparent_hugepage/shmem_enabled", "w") as switch:
        switch.write("advise")


def load_module(path: str, arguments: str, optional: bool) -> None:
    """Load a module; without an optional one, the tests that need it skip."""
    with open(path, "rb") as file:
        data = file.read()
    if libc.init_module(data, ctypes.c_ulong(len(data)), arguments.encode()) and not optional:
        reason = os.strerror(ctypes.get_errno())
        raise CannotTest(
            f"module {os.path.basename(path)} does not load here: {reason} (its reason is in the console log)"
        )


def check_parameter(name: str, wanted: str) -> None:
    """Check that a parameter, such as ``kvm.tdp_mmu``, has the value that the user wants."""
    module, _, parameter = name.partition(".")
    path = f"/sys/module/{module}/parameters/{parameter}"
    try:
        with open(path) as file:
            found = file.read().strip()
    except OSError:
        raise CannotTest(f"KVM parameter {name}: this kernel shows no parameter of that name") from None
    if not took_effect(wanted, found):
        raise CannotTest(f"KVM parameter {name}={wanted} did not take effect: it is {found}")


def took_effect(wanted: str, found: str) -> bool:
    """Whether a parameter that was set to *wanted* may read as *found*.

    Some take words that they do not show: ``auto`` leaves the choice to KVM, and ``force`` is Y (set_nx_huge_pages(),
    arch/x86/kvm/mmu/mmu.c).
    """
    return wanted == "auto" or normalized({"force": "Y"}.get(wanted, wanted)) == normalized(found)


def normalized(value: str) -> str:
    """A value in one spelling: Y and N for those of a bool (kstrtobool()), decimal for numbers of any base."""
    lower = value.lower()
    if lower in ("y", "yes", "on", "1", "t", "true"):
        return "Y"
    if lower in ("n", "no", "off", "0", "f", "false"):
        return "N"
    try:
        return str(int(lower, 0))
    except ValueError:
        return value


def keep_off_cpu_0() -> None:
    """Run the tests on the other CPUs: QEMU's TCG may corrupt a guest that runs on the first one.

    Each FXRSTOR or XRSTOR of any CPU clears a bit in the first CPU's hflags2, without a lock (cpu_clear_ignne() in
    target/i386/tcg/*/fpu_helper.c, QEMU 4.2 to 10.2 at least). Another bit of that word says whether nested paging is on. If
    VMRUN or #VMEXIT changes it at the same moment, the change is lost: the guest ends in a triple fault, or reads the host's
    memory as its own and the kernel panics ("corrupted stack end detected inside scheduler").
    """
    cpus = os.cpu_count() or 1
    if cpus > 1:
        os.sched_setaffinity(0, range(1, cpus))


def start_suite(command: list[str], environment: dict[str, str]) -> "subprocess.Popen[bytes]":
    """Start pytest: it is imported while modules load, and waits for a line on its standard input."""
    with open(OUTPUT, "wb") as output:
        return subprocess.Popen(
            command, cwd="/suite", env=environment, stdin=subprocess.PIPE, stdout=output, stderr=subprocess.STDOUT
        )


def send(job: Job, **message: object) -> None:
    """Send a message to the host."""
    with open(job.report_port, "w") as port:
        port.write(json.dumps(message) + "\n")


if __name__ == "__main__":
    with open(JOB) as file:
        job = Job(**json.load(file))
    try:
        main(job)
        while True:
            time.sleep(60)
    except BaseException as error:
        print(f"guest_init: {type(error).__name__}: {error}", file=sys.stderr)
        send(job, cannot_test=f"init failed: {type(error).__name__}: {error}")
        raise
