# SPDX-License-Identifier: GPL-2.0-only
"""Known faults of QEMU's CPU emulation (TCG) that affect this suite, by version, and how to avoid them."""

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """A fault of the emulation.

    :ivar since: the first version with it
    :ivar until: the first version with the fix; empty if there is none
    :ivar does: what QEMU does wrong, to complete the sentence "QEMU <version> ..."
    :ivar seen: how it showed
    :ivar source: QEMU's commits and functions, threads
    :ivar avoid: whether to prefer a version without it
    :ivar checks: the checks of emulator_probe.py that find it
    :ivar withhold: the CPU features that the guest must not have then
    """

    name: str
    since: str
    until: str
    does: str
    seen: str
    source: str
    avoid: bool = False
    checks: tuple[str, ...] = ()
    withhold: tuple[str, ...] = ()


FAULTS = (
    Fault(
        name="page tables not updated atomically",
        since="0",
        until="7.2",
        does="sets accessed and dirty bits by plain stores, which undo what another CPU changes in the entry meanwhile",
        seen="read in the source, not tried: a page that KVM just write-protected may become writable",
        source="fixed by 4a1e9d4d11cd, 'target/i386: Use atomic operations for pte updates'",
        avoid=True,
    ),
    Fault(
        name="XSETBV not intercepted",
        since="0",
        until="8.2",
        does="lets a guest set XCR0 behind KVM's back; at the next VMRUN KVM restores the value that it knows, without AVX",
        seen="vector stores of 32 bytes take #UD in the guest: test_vector_store_is_logged[*-32] failed (7.2.22)",
        source="fixed by 24b34590d07f, 'target/i386: check intercept for XSETBV'",
        avoid=True,
        checks=("xsetbv",),
        withhold=("avx",),
    ),
    Fault(
        name="code translated before its page is locked",
        since="0",
        until="8.1",
        does="misses what another CPU writes to code while it translates it: the breakpoint by which a kernel switches a"
        " static key may stay for good",
        seen="'Oops: int3' in up to 2 of 3 boots; with one key switched in a loop, after at most 20 times (7.2.22)",
        source="fixed by deba78709ae8, 'accel/tcg: Always lock pages before translation'; reported in the thread"
        " 'qemu-x86_64 booting with 8.0.0 stil see int3: when running LTP tracing testing' (LKML, July 2023)",
        avoid=True,
    ),
    Fault(
        name="second page of translated code not recorded",
        since="8.1",
        until="9.1",
        does="does not notice changes to the second page of code that crosses a page boundary",
        seen="read in the source, not tried: a kernel that runs code that it has replaced",
        source="fixed by 3b279f73fa37, 'accel/tcg: Fix typo causing tb->page_addr[1] to not be recorded'",
        avoid=True,
    ),
    Fault(
        name="code invalidated before it is changed",
        since="0",
        until="",
        does="may translate code again after it notices another CPU's store to it and before it does the store: as with"
        " 'code translated before its page is locked', but rarely; not with thread=single",
        seen="'Oops: int3' with one key switched in a loop, three CPUs on two of the host's: in 8 of 11 runs, after at most"
        " 429 times (10.0 and 11.1 with Linux 6.12; in none of 4 with 7.2); with thread=single not in 1585 times",
        source="notdirty_write() in accel/tcg/cputlb.c; the runner boots again (lib/harness/remote.py)",
    ),
    Fault(
        name="task switches not intercepted",
        since="0",
        until="",
        does="switches the tasks of a guest itself, where the hypervisor intercepts that; it loads CR3 behind the hypervisor's"
        " back, and cannot take back a switch whose error code it fails to push",
        seen="KVM's emulation of task switches does not run. Without TDP the guest hangs; a #GP through a task gate, with a"
        " stack that is write-protected, ends in a triple fault (10.0): test_task_switch_is_logged",
        source="switch_tss_ra() and do_interrupt_protected() in target/i386/tcg/seg_helper.c: neither checks for"
        " SVM_EXIT_TASK_SWITCH",
    ),
    Fault(
        name="first CPU's flags changed by others",
        since="4.2",
        until="",
        does="clears a bit of the first CPU's hflags2 without a lock when any CPU restores its x87 state",
        seen="a guest or the kernel crashes where it runs on the first CPU: see keep_off_cpu_0() in guest_init.py",
        source="cpu_clear_ignne() in target/i386/tcg/*/fpu_helper.c, since bf13bfab0840, 'i386: implement IGNNE'",
    ),
)


def faults_of(version: str) -> list[Fault]:
    """The known faults of a version of QEMU, such as 7.2.22."""
    number = _number(version)
    return [
        fault
        for fault in FAULTS
        if _number(fault.since) <= number and not (fault.until and _number(fault.until) <= number)
    ]


def withheld(failed: Collection[str]) -> tuple[str, ...]:
    """The CPU features that the guest must not have if these checks of emulator_probe.py failed."""
    found = (fault for fault in FAULTS if not set(failed).isdisjoint(fault.checks))
    return tuple(dict.fromkeys(feature for fault in found for feature in fault.withhold))


def without(cpu_model: str, features: Iterable[str]) -> str:
    """A CPU model without some features, as QEMU's ``-cpu`` takes it."""
    return ",".join((cpu_model, *(f"-{feature}" for feature in features)))


def _number(version: str) -> tuple[int, ...]:
    """The numbers of a version, for comparisons; suffixes (-rc1, a distribution's) do not count."""
    match = re.match(r"\d+(?:\.\d+)*", version)
    if match is None:
        raise ValueError(f"not a version of QEMU: {version!r}")
    return tuple(int(part) for part in match[0].split("."))
