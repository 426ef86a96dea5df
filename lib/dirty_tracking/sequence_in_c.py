# SPDX-License-Identifier: GPL-2.0-only
"""A failing operation sequence as a C program of one file, which needs nothing of the suite: for a report to maintainers.

The program executes the same steps, and checks the last one for the same difference. Its functions are in sequence.c.
"""

import re
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dirty_tracking.modes import LOG_MODES, ClearLogMode, RingMode
from dirty_tracking.sequences import (
    MOST_PAGES,
    VCPUS,
    Clear,
    Collect,
    Create,
    Delete,
    FailedSequence,
    Get,
    Harvest,
    HostWrite,
    Load,
    Move,
    Reset,
    SetDirtyLogging,
    Step,
    Write,
)
from dirty_tracking.violations import Kind, Violation

_TEMPLATE = Path(__file__).with_name("sequence.c")
_WIDTH = 100
_SLOTS = 4  # of the program: that of the guest's code, and those of the steps


class InBothLanguages:
    """The evidence of a sequence that failed, as a script and as a C program."""

    def __init__(self, sequence: FailedSequence) -> None:
        self._sequence = sequence

    def lines(self) -> list[str]:
        """The script, and the program."""
        program = c_program(self._sequence).splitlines()
        return [
            *self._sequence.lines(),
            "",
            "the same as a C program (gcc -O2 -Wall -o sequence FILE.c):",
            "",
            *program,
        ]

    def data(self) -> dict[str, Any]:
        """As ``script`` and ``c_program``."""
        return {**self._sequence.data(), "c_program": c_program(self._sequence)}


def c_program(sequence: FailedSequence) -> str:
    """The C source that repeats *sequence*: its exit status is 1 where KVM still answers as it did, and 0 where it does not.

    A difference that the program cannot check, such as another exit of KVM_RUN, ends it with status 4 and the difference.
    Where the last step fills a ring, the program looks for spurious entries behind the last such exit only.
    """
    found = [str(violation) for violation in sequence.violations]
    calls = [_create_vm(sequence.mode), *map(_call, sequence.steps)]
    steps = [*map(_wrapped, calls), *filter(None, map(_check, sequence.violations))]
    values = {
        "TITLE": "\n * ".join(
            textwrap.wrap(f"KVM breaks the contract of dirty logging: {'; '.join(found)}", _WIDTH - 10)
        ),
        "MOST_PAGES": str(MOST_PAGES),
        "VCPUS": str(VCPUS),
        "SLOTS": str(_SLOTS),
        "HAS_RINGS": str(int(LOG_MODES[sequence.mode].uses_ring)),
        "RING_ENTRIES": str(sequence.ring_entries),
        "MANUAL": str(int(LOG_MODES[sequence.mode].manual)),
        "STEPS": "\n".join(steps),
    }
    text = _TEMPLATE.read_text(encoding="ascii")
    for name, value in values.items():
        text = text.replace(f"@{name}@", value)
    return text


def _create_vm(name: str) -> str:
    mode = LOG_MODES[name]
    if issubclass(mode, RingMode):
        return f"create_vm({mode.cap_name}, RING_ENTRIES * sizeof(struct kvm_dirty_gfn))"
    if issubclass(mode, ClearLogMode):
        return f"create_vm(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, {mode.flags})"
    return "create_vm(0, 0)"


def _call(step: Step) -> str:
    match step:
        case Create(slot, place, npages, logged):
            return f"create_slot({slot}, {place}, {npages}, {int(logged)})"
        case Delete(slot):
            return f"delete_slot({slot})"
        case Move(slot, place):
            return f"move_slot({slot}, {place})"
        case SetDirtyLogging(slot, enable):
            return f"set_dirty_logging({slot}, {int(enable)})"
        case Write(slot, pages, vcpu):
            return f"write_pages({vcpu}, {slot}, {_pages(pages)})"
        case Load(slot, pages, vcpu):
            return f"load_pages({vcpu}, {slot}, {_pages(pages)})"
        case HostWrite(slot, pages):
            return f"write_pages_from_host({slot}, {_pages(pages)})"
        case Collect():
            return "collect()"
        case Get(slot):
            return f"get_dirty_log({slot})"
        case Clear(slot, first_page, num_pages, pages):
            return f"clear_dirty_log({slot}, {first_page}, {num_pages}, {_pages(pages)})"
        case Harvest(vcpu, most):
            return f"harvest_ring({vcpu}, {most})"
        case Reset():
            return "reset_dirty_rings()"
    raise NotImplementedError(f"{step} has no function in {_TEMPLATE.name}")


def _check(violation: Violation) -> str:
    known = violation.slot in range(1, _SLOTS) and all(page < MOST_PAGES for page in violation.pages)
    place = f"{violation.slot}, {_pages(violation.pages)}"
    match violation.kind:
        case Kind.RESET_COUNT | Kind.VALUE:
            return ""  # the steps check that themselves
        case Kind.LOST if known:
            return _wrapped(f"must_report({place})")
        case Kind.SPURIOUS if known and violation.pages:
            return _wrapped(f"may_report(0, {place})")
        case Kind.DUPLICATE if known:
            return _wrapped(f"may_report(1, {place})")
    # Neither of these has a place in a string literal, nor in a format.
    text = re.sub(r"[^ !#-$&-\[\]-~]", "'", f"not checked here: {violation}")
    literals = [f'"{line}"' for line in textwrap.wrap(text, _WIDTH - 20, drop_whitespace=False)]
    return "\terrx(SKIP, " + "\n\t     ".join(literals) + ");"


def _pages(pages: Sequence[int]) -> str:
    runs = [f"{{ {first}, {count} }}" for first, count in _runs(pages)]
    return f"PAGES({', '.join(runs or ['{ 0, 0 }'])})"


def _runs(pages: Sequence[int]) -> Iterator[tuple[int, int]]:
    """The runs of consecutive pages, as first page and count, in the order of *pages*.

    >>> list(_runs((4, 5, 6, 1, 9)))
    [(4, 3), (1, 1), (9, 1)]
    """
    first = count = 0
    for page in pages:
        if count and page == first + count:
            count += 1
            continue
        if count:
            yield first, count
        first, count = page, 1
    if count:
        yield first, count


def _wrapped(step: str) -> str:
    return textwrap.fill(f"{step};", _WIDTH, initial_indent="\t", subsequent_indent="\t\t", break_on_hyphens=False)
