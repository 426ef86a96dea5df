# SPDX-License-Identifier: GPL-2.0-only
"""What a failed cell shows: where it ran, what was wrong where, and the command that reproduces it."""

import os
import shlex
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from dirty_tracking.cell import Cell, Settings
from dirty_tracking.dirty_log_run import DirtyTrackingError
from dirty_tracking.violations import Kind
from harness.version import suite_version
from kvm_util.host import Host
from kvm_util.wording import NO_BREAK, WIDTH, counted, wrapped

_FIRST_PAGES = 8
_FINDINGS = 12
_MAP_COLUMNS = 64
_MAP_ROWS = 8

# Parameters that decide which of KVM's dirty-tracking paths run; the text report shows these, the JSON file has all.
_TELLING_PARAMETERS = ("tdp_mmu", "eager_page_split", "npt", "ept", "pml", "ept_ad", "nx_huge_pages", "pvm_emul_batch")

# How the map marks a part of the slot; the first that applies wins.
_MARKS = ((Kind.LOST, "L"), (Kind.VALUE, "V"), (Kind.SPURIOUS, "S"), (Kind.DUPLICATE, "D"))


def environment_lines(host: Host) -> list[str]:
    """Version of the suite, kernel, backend with the parameters that decide its code paths, and CPU."""
    telling = [
        f"{name}={value}" for name, value in host.parameters.items() if name.partition(".")[2] in _TELLING_PARAMETERS
    ]
    backend = f"backend  {host.backend} ({', '.join(telling)})"
    return [suite_line(), f"kernel   {host.kernel}", *column(backend), f"cpu      {host.cpu}"]


def suite_line() -> str:
    """The line that gives the suite's version."""
    return f"suite    {suite_version()}"


def this_pytest() -> str:
    """The command of this pytest, without arguments."""
    python = sys.executable
    if python.startswith(os.getcwd() + os.sep):
        python = os.path.relpath(python)
    return shlex.join([python, "-m", "pytest"])


def reproduce_line(command: str) -> str:
    """The line that gives the *command* which makes a failure again."""
    return f"reproduce {command}"


@dataclass(frozen=True)
class Context:
    """What a cell ran with.

    :ivar pytest: the command that runs pytest on the same kernel
    """

    host: Host
    settings: Settings
    pytest: str


def repeat_command(cell: Cell, context: Context) -> str:
    """The command that runs *cell* again with the same seed and settings."""
    settings = context.settings
    arguments = ["selftests/matrix/test_dirty_log.py"]
    for field in fields(cell):
        arguments += [f"--{field.name.replace('_', '-')}", str(getattr(cell, field.name))]
    defaults = Settings()
    for field in fields(settings):
        value = getattr(settings, field.name)
        if field.name == "seed" or value != getattr(defaults, field.name):
            text = hex(value) if field.name == "phys_offset" else str(value)
            arguments += [f"--{field.name.replace('_', '-')}", text]
    return f"{context.pytest} {shlex.join(arguments)}"


def context_lines(cell: Cell, context: Context) -> list[str]:
    """What every failure of a cell tells: where it ran, what ran, and the command that reproduces it."""
    dimensions = [f"{field.name}{NO_BREAK}{getattr(cell, field.name)}" for field in fields(cell)]
    return [
        *environment_lines(context.host),
        *column(f"cell     {', '.join(dimensions)}"),
        f"seed     {context.settings.seed}",
        reproduce_line(repeat_command(cell, context)),
    ]


def failure_text(error: DirtyTrackingError, context: Context) -> str:
    """The whole report of a broken contract."""
    run = error.run
    figures = run.figures
    kinds = ", ".join(
        f"{kind.name} ({kind.value})" for kind in dict.fromkeys(finding.kind for finding in error.violations)
    )
    done = [
        counted(figures.writes, "write"),
        f"{counted(figures.reaps, 'collection')} of dirty pages",
        counted(figures.ring_full_exits, "ring-full exit"),
    ]
    lines = [
        *wrapped(f"KVM broke the contract of dirty tracking in iteration {figures.iterations}: {kinds}"),
        "",
        *context_lines(run.cell, context),
        f"figures  {', '.join(done)}",
        "",
        "what was wrong, in the order in which it happened:",
        *(line for finding in error.violations[:_FINDINGS] for line in wrapped(str(finding), first="  ", later="    ")),
    ]
    if len(error.violations) > _FINDINGS:
        lines.append(f"  ... and {counted(len(error.violations) - _FINDINGS, 'finding')} more")
    pages = _first_pages(error)
    if pages:
        lines += ["", "first pages concerned:"]
        lines += [line for page in pages for line in wrapped(run.oracle.history(page), first="  ", later="    ")]
        lines += ["", *slot_map(error, run.memslot.npages)]
    return "\n".join(lines)


def failure_data(error: DirtyTrackingError, context: Context) -> dict[str, Any]:
    """The same for the results folder, as plain data."""
    run = error.run
    return {
        "host": asdict(context.host),
        "cell": asdict(run.cell),
        "settings": asdict(context.settings),
        "reproduce": repeat_command(run.cell, context),
        "figures": asdict(run.figures),
        "findings": [
            asdict(finding) | {"kind": finding.kind.name, "pages": list(finding.pages)} for finding in error.violations
        ],
        "history": [run.oracle.history(page) for page in _first_pages(error)],
        "map": slot_map(error, run.memslot.npages),
    }


def slot_map(error: DirtyTrackingError, npages: int) -> list[str]:
    """The slot as a few lines of text, each character a run of pages: what is wrong there, or ``.`` for nothing."""
    per_mark = -(-npages // (_MAP_COLUMNS * _MAP_ROWS))
    marks = ["."] * -(-npages // per_mark)
    for kind, mark in reversed(_MARKS):
        for page in _pages(error, [kind]):
            if page < npages:
                marks[page // per_mark] = mark
    rows = ["".join(marks[start : start + _MAP_COLUMNS]) for start in range(0, len(marks), _MAP_COLUMNS)]
    legend = ", ".join(f"{mark} {kind.value}" for kind, mark in _MARKS)
    title = f"slot map, {counted(per_mark, 'page')} a character: {legend}"
    return [*wrapped(title), *(f"  {row}" for row in rows)]


def column(text: str) -> list[str]:
    """A line that begins with a name of the left column, which is to stay empty where it needs more lines."""
    return wrapped(text, WIDTH, "", " " * 9)


def _pages(error: DirtyTrackingError, kinds: Sequence[Kind]) -> Iterable[int]:
    return (page for finding in error.violations if finding.kind in kinds for page in finding.pages)


def _first_pages(error: DirtyTrackingError) -> list[int]:
    """A few of the wrong pages, each kind of finding being represented."""
    npages = error.run.memslot.npages
    pages: dict[int, None] = {}
    for finding in error.violations:
        pages.update(dict.fromkeys([page for page in finding.pages if page < npages][:_FIRST_PAGES]))
    return list(pages)[: 2 * _FIRST_PAGES]
