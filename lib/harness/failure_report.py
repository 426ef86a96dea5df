# SPDX-License-Identifier: GPL-2.0-only
"""The report of a failed test on KVM: violation, environment, and the command that reproduces it."""

import os
import re
import shlex
import sys
from dataclasses import asdict, dataclass, fields
from pathlib import PurePath
from typing import Any

from dirty_tracking.cell import Cell, Settings
from dirty_tracking.violations import ContractViolation
from harness.version import suite_version
from kvm_util.host import Host
from kvm_util.wording import NO_BREAK, WIDTH, wrapped

# Parameters that decide which code paths of KVM run; the text report has only these, the JSON file has all.
_RELEVANT_PARAMETERS = ("tdp_mmu", "eager_page_split", "npt", "ept", "pml", "ept_ad", "nx_huge_pages", "pvm_emul_batch")


def environment_lines(host: Host) -> list[str]:
    """Version of the suite, kernel, backend with the parameters that decide its code paths, and CPU."""
    relevant = [
        f"{name}={value}" for name, value in host.parameters.items() if name.partition(".")[2] in _RELEVANT_PARAMETERS
    ]
    backend = f"backend  {host.backend} ({', '.join(relevant)})"
    return [suite_line(), f"kernel   {host.kernel}", *column(backend), f"cpu      {host.cpu}"]


def suite_line() -> str:
    """The line that gives the suite's version."""
    return f"suite    {suite_version()}"


def column(text: str) -> list[str]:
    """Wrap a line that begins with a name in the left column; later lines leave that column empty."""
    return wrapped(text, WIDTH, "", " " * 9)


def this_pytest() -> str:
    """The command of this pytest, without arguments."""
    if standalone := os.environ.get("DIRTY_TRACKING_COMMAND"):  # set by runner/standalone_start.py
        return standalone
    python = sys.executable
    if python.startswith(os.getcwd() + os.sep):
        python = os.path.relpath(python)
    return shlex.join([python, "-m", "pytest"])


def cell_command(pytest: str, cell: Cell, settings: Settings) -> str:
    """The command that runs *cell* again with the same seed and settings.

    :param pytest: the command that runs pytest on the same kernel
    """
    arguments = ["selftests/matrix/test_dirty_log.py"]
    for field in fields(cell):
        arguments += [f"--{field.name.replace('_', '-')}", str(getattr(cell, field.name))]
    defaults = Settings()
    for field in fields(settings):
        value = getattr(settings, field.name)
        if field.name == "seed" or value != getattr(defaults, field.name):
            text = hex(value) if field.name == "phys_offset" else str(value)
            arguments += [f"--{field.name.replace('_', '-')}", text]
    return f"{pytest} {shlex.join(arguments)}"


@dataclass(frozen=True)
class Context:
    """Where and with what a test ran.

    :ivar test: its id
    :ivar reproduce: the command that runs it again
    :ivar cell: the cell of the matrix that it is; None for any other test
    """

    host: Host
    settings: Settings
    test: str
    reproduce: str
    cell: Cell | None = None

    def lines(self) -> list[str]:
        """Where the test ran, what ran, and the command that reproduces it."""
        cell = []
        if self.cell is not None:
            dimensions = [f"{field.name}{NO_BREAK}{getattr(self.cell, field.name)}" for field in fields(self.cell)]
            cell = [*column(f"cell     {', '.join(dimensions)}"), f"seed     {self.settings.seed}"]
        return [*environment_lines(self.host), *cell, f"reproduce {self.reproduce}"]


def file_name(test: str) -> str:
    """A file's name for the test with this id: its file and its name, without folders and odd characters.

    >>> file_name("selftests/interface/test_slots.py::test_enabling_logging_twice[dirty-log]")
    'test_slots-test_enabling_logging_twice_dirty-log_'
    """
    file, _, name = test.partition("::")
    return re.sub(r"[^\w-]", "_", f"{PurePath(file).stem}-{name}")


def failure_data(violation: ContractViolation, context: Context) -> dict[str, Any]:
    """All data of a violation, for the results folder."""
    findings = [asdict(one) | {"kind": one.kind.name, "pages": list(one.pages)} for one in violation.violations]
    evidence = violation.evidence.data() if violation.evidence is not None else {}
    return {**asdict(context), "message": str(violation), "findings": findings, **evidence}
