# SPDX-License-Identifier: GPL-2.0-only
"""The user's selection of cells and settings: parses it, checks it on this host, and plans the cells of a run.

An invalid or impossible selection is a pytest.UsageError: one line that begins with the option.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from dirty_tracking.cell import DENSITIES, MAX_VCPUS, STOPS, Cell, Settings, guest_data_size, place_test_memory
from dirty_tracking.modes import LOG_MODES, ring_accepted, smallest_ring
from dirty_tracking.ring import ENTRY_SIZE
from dirty_tracking.vm import PAGE
from harness.combinations import all_cells, pairwise_cells
from kvm_util import uapi
from kvm_util.arch import current as arch
from kvm_util.host_limits import (
    THREADS,
    Limit,
    address_space_limits,
    available_memory,
    memory_limits,
    overcommit_limits,
    thread_limits,
    tightest,
)
from kvm_util.kvm import Kvm
from kvm_util.memory import BACKINGS, GIB, KIB, MIB, size_text

DIMENSIONS: dict[str, tuple[str, ...]] = {
    "log_mode": tuple(LOG_MODES),
    "guest_mode": tuple(arch.GUEST_MODES),
    "backing": tuple(BACKINGS),
    "stop": tuple(STOPS),
    "density": tuple(DENSITIES),
}
DEFAULT_VCPUS = (1, 2)
# To KVM, huge pages that are shared are like others: these are for those who name them, and for the tests of huge pages.
_DEFAULT_BACKINGS = tuple(name for name, backing in BACKINGS.items() if not (backing.shared and backing.page_size))
# The values that run where none are named
DEFAULTS = DIMENSIONS | {"backing": _DEFAULT_BACKINGS}

# Memory of a worker without the guest's: interpreter, tables, the judge's sets (measured: below 120 MiB for 1 GiB)
_WORKER_MEMORY = 150 * MIB
_HOUR = 3_600_000  # in milliseconds
_UNITS = {"k": KIB, "m": MIB, "g": GIB, "t": 1024 * GIB}


@dataclass(frozen=True)
class PlannedCell:
    """A cell of the run; *missing* is why it cannot run on this host, None if it can."""

    cell: Cell
    missing: str | None = None


def parse_names(option: str, text: str, choices: Sequence[str]) -> tuple[str, ...]:
    """Parse comma-separated names; returned in the order of *choices*."""
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in choices:
            raise pytest.UsageError(f"{option}: no such value: {name!r} (choose from {', '.join(choices)})")
    return tuple(choice for choice in choices if choice in names)


def parse_number(option: str, text: str, least: int, most: int | None = None) -> int:
    """Parse a whole number from *least* to *most*, in any base that Python has a prefix for."""
    value = _whole_number(text)
    if value is None:
        raise pytest.UsageError(f"{option}: {text!r} is not a whole number")
    if value < least or (most is not None and value > most):
        bounds = f"at least {least}" if most is None else f"from {least} to {most}"
        raise pytest.UsageError(f"{option}: {text} is out of range, it must be {bounds}")
    return value


def _whole_number(text: str) -> int | None:
    try:
        return int(text, 0)
    except ValueError:
        return None


def parse_milliseconds(option: str, text: str) -> float:
    """Parse a time in milliseconds, above 0 and at most an hour."""
    try:
        value = float(text)
    except ValueError:
        raise pytest.UsageError(f"{option}: {text!r} is not a number of milliseconds") from None
    if not 0 < value <= _HOUR:
        raise pytest.UsageError(f"{option}: {text} ms is out of range, it must be above 0 and at most {_HOUR}")
    return value


def parse_size(option: str, text: str) -> int:
    """Parse a size with an optional unit (K, M, G, T) into bytes; it must be one or more whole pages."""
    unit = text[-1:].lower()
    value = _whole_number(text[:-1] if unit in _UNITS else text)
    if value is None:
        raise pytest.UsageError(
            f"{option}: {text!r} is no size: write a whole number and a unit (K, M, G or T), such as 64M"
        )
    size = value * _UNITS.get(unit, 1)
    if size % PAGE:
        raise pytest.UsageError(f"{option}: {text} is not a multiple of the page size ({PAGE})")
    if size < PAGE:
        raise pytest.UsageError(f"{option}: {text} is out of range, it must be at least a page ({PAGE})")
    return size


def check_values(settings: Settings, vcpus: int) -> None:
    """Check what does not depend on the host.

    :param vcpus: number of vCPUs of the largest VM
    """
    count = settings.ring_count
    if count & (count - 1):
        raise pytest.UsageError(f"--ring-count: {count} is not a power of two")
    if vcpus > MAX_VCPUS:
        raise pytest.UsageError(f"--vcpus: {vcpus} is out of range, a page has words for {MAX_VCPUS}")


def check_settings(settings: Settings, vcpus: int, workers: int) -> None:
    """Check what can be checked without KVM.

    :param vcpus: number of vCPUs of the largest VM
    :param workers: number of cells that run at the same time
    """
    check_values(settings, vcpus)
    check_memory(settings, vcpus, workers, [*memory_limits(), *overcommit_limits()])
    check_memory(settings, vcpus, 1, address_space_limits())
    if workers > 1 and (limit := tightest(thread_limits(), workers * THREADS)):
        raise pytest.UsageError(
            f"-n: {workers} workers need {workers * THREADS} threads, but {limit.text}, {max(limit.left, 0)} of them free"
            f" (fewer workers, or {limit.remedy})"
        )


def check_memory(settings: Settings, vcpus: int, workers: int, limits: Sequence[Limit]) -> None:
    """Check that *limits* leave enough memory for *workers* cells at the same time."""
    needed = workers * _worker_memory(settings, vcpus)
    if (limit := tightest(limits, needed)) is None:
        return
    if workers * vcpus * settings.ring_count * ENTRY_SIZE > needed // 2:
        option, what = "--ring-count", f"rings of {settings.ring_count} entries"
    else:
        option, what = "--test-mem", size_text(settings.test_mem)
    verb = f"{workers} at a time need" if workers > 1 else "need" if option == "--ring-count" else "needs"
    fewer = ", fewer workers with -n" if workers > 1 else ""
    raise pytest.UsageError(
        f"{option}: {what} {verb} {needed // MIB} MiB of memory, but {limit.text},"
        f" {max(limit.left, 0) // MIB} MiB of it free (a smaller {option}{fewer}, or {limit.remedy})"
    )


def workers_here(settings: Settings, vcpus: int) -> int:
    """How many cells with *vcpus* vCPUs can run at the same time within the host's limits on memory and threads."""
    needed = _worker_memory(settings, vcpus)
    if tightest(address_space_limits(), needed):
        return 0
    threads = min((limit.left for limit in thread_limits()), default=sys.maxsize)
    return max(0, min(available_memory() // needed, threads // THREADS))


def _worker_memory(settings: Settings, vcpus: int) -> int:
    """Bytes that one worker needs: guest memory, and per vCPU its write stream, expected values and ring."""
    npages = settings.slot_size // PAGE
    per_vcpu = 12 * npages + settings.ring_count * ENTRY_SIZE  # stream and expected values
    return settings.slot_size + guest_data_size(settings.slot_size, vcpus) + vcpus * per_vcpu + _WORKER_MEMORY


def check_with_kvm(kvm: Kvm, settings: Settings, dimensions: dict[str, tuple[Any, ...]]) -> None:
    """Check what depends on this host's KVM."""
    most = kvm.check_extension(uapi.KVM_CAP_MAX_VCPUS)
    if max(dimensions["vcpus"]) > most:
        raise pytest.UsageError(f"--vcpus: {max(dimensions['vcpus'])} is out of range, this KVM has at most {most}")
    limit = arch.guest_phys_limit(kvm.supported_cpuid)
    for backing in dimensions["backing"]:
        names = {name: values[0] for name, values in dimensions.items()}
        cell = Cell(**names | {"backing": backing, "vcpus": max(dimensions["vcpus"])})
        try:
            place_test_memory(settings, cell, limit)
        except ValueError as error:
            option = "--test-mem" if settings.phys_offset is None else "--phys-offset"
            raise pytest.UsageError(f"{option}: {error}") from None
    for mode in (LOG_MODES[name] for name in dimensions["log_mode"]):
        if mode.uses_ring and mode.supported(kvm) is None:
            count, largest = settings.ring_count, mode.largest_ring(kvm)
            if count > largest:
                raise pytest.UsageError(f"--ring-count: {count} is out of range, this KVM takes at most {largest}")
            if not ring_accepted(kvm, count, mode):
                smallest = smallest_ring(kvm, mode)
                raise pytest.UsageError(f"--ring-count: {count} is out of range, this KVM takes at least {smallest}")


def plan(kvm: Kvm | None, settings: Settings, dimensions: dict[str, tuple[Any, ...]], full: bool) -> list[PlannedCell]:
    """The cells of a run: of the values that this host supports, and one for each other value, with the reason.

    :param kvm: None if KVM cannot be used; then all values count as supported, and each cell is skipped with the reason
    """
    reasons: dict[str, dict[Any, str]] = {name: {} for name in dimensions}
    if kvm is not None:
        checks: dict[str, Callable[[str], str | None]] = {
            "log_mode": lambda name: LOG_MODES[name].supported(kvm),
            "guest_mode": lambda name: arch.GUEST_MODES[name].missing(kvm),
            "backing": lambda name: BACKINGS[name].missing(settings.slot_size),
        }
        for name, check in checks.items():
            reasons[name] = {value: reason for value in dimensions[name] if (reason := check(value))}
    present = {name: tuple(v for v in values if v not in reasons[name]) for name, values in dimensions.items()}
    planned = []
    if all(present.values()):
        cells = (all_cells if full else pairwise_cells)(present)
        # By backing, so that one cell can use the memory of the one before.
        planned += [
            PlannedCell(cell) for cell in sorted(cells, key=lambda cell: present["backing"].index(cell.backing))
        ]
    some = {name: (present[name] or values)[0] for name, values in dimensions.items()}
    for name, absent in reasons.items():
        planned += [PlannedCell(Cell(**some | {name: value}), reason) for value, reason in absent.items()]
    return planned
