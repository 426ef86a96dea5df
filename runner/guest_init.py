#!/usr/bin/python3 -SE
# SPDX-License-Identifier: GPL-2.0-only
"""The first program in the booted kernel: loads KVM, runs pytest, and tells the host about it on the second serial port.

It gets its orders from ``/orders.json``; what it tells are lines of JSON. The host ends the machine.
"""

import ctypes
import fcntl
import json
import os
import subprocess
import sys
import time

ORDERS = "/orders.json"
REPORTS = "/dev/ttyS1"
OUTPUT = "/run/output"
BEGINS = "guest_init: begins"  # in the kernel's log, between its boot and its first program
FINIT_MODULE = {"x86_64": 313}

MOUNTS = (
    ("proc", "/proc"),
    ("sysfs", "/sys"),
    ("devtmpfs", "/dev"),
    ("tmpfs", "/dev/shm"),
    ("tmpfs", "/run"),
    ("tmpfs", "/tmp"),
    ("debugfs", "/sys/kernel/debug"),
)

libc = ctypes.CDLL(None, use_errno=True)


class CannotTest(Exception):
    """This kernel cannot be tested; the text says why."""


def main() -> None:
    """Do it all; never returns."""
    for kind, path in MOUNTS:
        os.makedirs(path, exist_ok=True)
        libc.mount(kind.encode(), path.encode(), kind.encode(), 0, None)  # a kernel without debugfs goes without it
    with open("/dev/kmsg", "w") as log:
        log.write(BEGINS)
    with open(ORDERS) as file:
        orders = json.load(file)
    tell(hello=os.uname().release)
    if orders["keep_off_cpu_0"]:
        keep_off_cpu_0()
    suite = start(orders["command"], orders["environment"])
    try:
        for path, arguments in orders["modules"]:
            load(path, arguments)
        if not os.path.exists("/dev/kvm"):
            raise CannotTest("there is no /dev/kvm: this kernel has no KVM for this CPU")
        for name, wanted in orders["parameters"].items():
            check_parameter(name, wanted)
    except CannotTest as error:
        tell(cannot=str(error))
    else:
        finish(suite)
    while True:
        time.sleep(60)


def load(path: str, arguments: str) -> None:
    """Load a module."""
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    number = FINIT_MODULE[os.uname().machine]
    if libc.syscall(number, file, arguments.encode(), 0):
        reason = os.strerror(ctypes.get_errno())
        raise CannotTest(
            f"module {os.path.basename(path)} does not load here: {reason} (its reason is in the console log)"
        )
    os.close(file)


def check_parameter(name: str, wanted: str) -> None:
    """Check that a parameter has the value that was asked for."""
    module, _, parameter = name.partition(".")
    path = f"/sys/module/{module}/parameters/{parameter}"
    try:
        with open(path) as file:
            found = file.read().strip()
    except OSError:
        raise CannotTest(f"KVM parameter {name}: this kernel has none of that name that it shows") from None
    if not took_effect(wanted, found):
        raise CannotTest(f"KVM parameter {name}={wanted} did not take effect: it is {found}")


def took_effect(wanted: str, found: str) -> bool:
    """Whether a parameter that shows *found* may have been set to *wanted*.

    Some take words that they do not show: ``auto`` leaves the choice to KVM, and ``force`` is Y (set_nx_huge_pages(),
    arch/x86/kvm/mmu/mmu.c).
    """
    return wanted == "auto" or comparable({"force": "Y"}.get(wanted, wanted)) == comparable(found)


def comparable(value: str) -> str:
    """A value in one spelling: those of a bool (kstrtobool()), and numbers of any base."""
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
    """Run the tests on the other CPUs: in QEMU's TCG, a guest that runs on the first one is now and then corrupted.

    Each FXRSTOR or XRSTOR of any CPU clears a bit in the first CPU's hflags2, without a lock (cpu_clear_ignne() in
    target/i386/tcg/*/fpu_helper.c, QEMU 4.2 to 10.2 at least). The same word tells whether nested paging is on. When VMRUN or
    #VMEXIT changes that at the same moment, the change is lost: the guest ends in a triple fault, or the host's memory is
    taken for the guest's and the kernel panics ("corrupted stack end detected inside scheduler").
    """
    cpus = os.cpu_count() or 1
    if cpus > 1:  # with a single one there is no other to do it
        os.sched_setaffinity(0, range(1, cpus))


def start(command: list[str], environment: dict[str, str]) -> "subprocess.Popen[bytes]":
    """Start pytest, which waits for a line before it begins."""
    with open(OUTPUT, "wb") as output:
        return subprocess.Popen(
            command, cwd="/suite", env=environment, stdin=subprocess.PIPE, stdout=output, stderr=subprocess.STDOUT
        )


def finish(suite: "subprocess.Popen[bytes]") -> None:
    """Let pytest begin, which reports to the host itself, and tell how it ended."""
    suite.communicate(b"\n")
    with open(OUTPUT, errors="replace") as output:
        tell(ended=suite.returncode, output=output.read()[-20000:])


def tell(**message: object) -> None:
    """Send the host a message."""
    with open(REPORTS, "w") as port:
        # No other program's message may come in between.
        fcntl.flock(port, fcntl.LOCK_EX)
        port.write(json.dumps(message) + "\n")


if __name__ == "__main__":
    try:
        main()
    except BaseException as error:
        print(f"guest_init: {type(error).__name__}: {error}", file=sys.stderr)
        tell(cannot=f"the first program failed: {type(error).__name__}: {error}")
        raise
