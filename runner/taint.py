# SPDX-License-Identifier: GPL-2.0-only
"""The kernel's taint flags: each is set once, when something happens after which the kernel trusts itself less.

The list is that of Documentation/admin-guide/tainted-kernels.rst.
"""

import os

from runner.kernel_log import Kind

TAINTED = "/proc/sys/kernel/tainted"
_LONGEST = 32  # bytes: more than a number of 64 bits has

TITLE = "taint flag"  # of a report of kind TAINT, before the flag's letter
WARN_TITLE = f"{TITLE} W"

# By bit: letter and meaning
_FLAGS = (
    ("P", "a module with a proprietary licence was loaded"),
    ("F", "a module was loaded by force"),
    ("S", "the hardware is used outside of its specification"),
    ("R", "a module was removed by force"),
    ("M", "the processor reported a machine check"),
    ("B", "a page was found in a bad state"),
    ("U", "user space asked for this flag"),
    ("D", "the kernel oopsed, or met a BUG"),
    ("A", "an ACPI table was replaced"),
    ("W", "a WARN in the kernel"),
    ("C", "a staging driver was loaded"),
    ("I", "a fault of the firmware is worked around"),
    ("O", "a module from outside of the kernel's tree was loaded"),
    ("E", "a module without a signature was loaded"),
    ("L", "a soft lockup occurred"),
    ("K", "the kernel was live-patched"),
    ("X", "the distribution's own flag"),
    ("T", "the layout of structures is randomized"),
    ("N", "a test inside the kernel ran"),
    ("J", "fwctl changed the state of a device"),
)
# The flags by which the kernel reports a fault of its own, with the kinds of reports in its log that come with each. What an
# administrator or a driver does (modules, ACPI tables, live patches, ...) sets others, and a machine check is the hardware's.
_FAULTS = {
    "B": {Kind.BUG, Kind.KASAN, Kind.OOPS},
    "D": {Kind.BUG, Kind.OOPS, Kind.PANIC},
    "L": {Kind.STALL},
    "W": {*Kind},
}
_FAULT_BITS = sum(1 << bit for bit, (letter, _) in enumerate(_FLAGS) if letter in _FAULTS)


def taint_flags(path: str = TAINTED) -> int | None:
    """The flags that are set, as a number; None if they cannot be read (a kernel without CONFIG_PROC_SYSCTL)."""
    try:
        file = os.open(
            path, os.O_RDONLY | os.O_CLOEXEC
        )  # each test reads them several times, some where CPUs are emulated
        try:
            return int(os.read(file, _LONGEST))
        finally:
            os.close(file)
    except OSError:
        return None


def describe_set(path: str = TAINTED) -> list[str]:
    """Letter and meaning of each flag that is set, or that they are not watched."""
    flags = taint_flags(path)
    return [f"not watched: {path} cannot be read"] if flags is None else describe(flags)


def describe(flags: int) -> list[str]:
    """Letter and meaning of each flag in *flags*."""
    known = [f"{letter} ({meaning})" for bit, (letter, meaning) in enumerate(_FLAGS) if flags >> bit & 1]
    newer = range(len(_FLAGS), flags.bit_length())
    return known + [f"bit {bit}" for bit in newer if flags >> bit & 1]


def new_faults(before: int | None, now: int | None) -> int:
    """The flags that were set since *before* and by which the kernel reports a fault of its own; none if one is unknown."""
    return 0 if before is None or now is None else now & ~before & _FAULT_BITS


def unreported(flags: int, kinds: set[Kind]) -> int:
    """Those of *flags* that do not come with a report in the kernel's log.

    :param kinds: of the reports that the log has
    """
    return sum(flags & 1 << bit for bit, (letter, _) in enumerate(_FLAGS) if not kinds & _FAULTS.get(letter, set()))
