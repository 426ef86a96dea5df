# SPDX-License-Identifier: GPL-2.0-only
"""Plugin: the cases of each test, by cell and by log mode, and the markers and properties of each test."""

from dataclasses import asdict
from typing import Any

import pytest

from dirty_tracking.cell import Cell
from dirty_tracking.modes import LOG_MODES
from harness.kernel_options import OWN_TESTS
from harness.run_state import PLAN
from runner.guest_session import guest_session

# Groups of log modes that the marker log_modes accepts
_GROUPS = {
    "ring": [name for name, mode in LOG_MODES.items() if mode.uses_ring],
    "bitmap": [name for name, mode in LOG_MODES.items() if not mode.uses_ring],
    "clear": [name for name, mode in LOG_MODES.items() if mode.manual],
}


def log_modes_of(node: Any) -> list[str]:
    """The log modes of a test, in the order of its marker ``log_modes``; all of them without one."""
    marker = node.get_closest_marker("log_modes")
    names = list(LOG_MODES) if marker is None else [mode for name in marker.args for mode in _GROUPS.get(name, [name])]
    for name in names:
        if name not in LOG_MODES:
            raise pytest.UsageError(
                f"{node.nodeid}: no log mode {name!r} (there are {', '.join([*_GROUPS, *LOG_MODES])})"
            )
    return names


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Make a case of each cell, or of each log mode; a single log mode is not in the test's id."""
    if "planned_cell" in metafunc.fixturenames:
        planned = metafunc.config.stash[PLAN]
        metafunc.parametrize("planned_cell", planned, ids=[str(planned_cell.cell) for planned_cell in planned])
    of_test = any(marker.name == "log_modes" for marker in metafunc.definition.own_markers)  # not of its file
    if of_test and "log_mode" not in metafunc.fixturenames:
        metafunc.fixturenames.append("log_mode")
    if "log_mode" in metafunc.fixturenames and not _has_its_own(metafunc, "log_mode"):
        modes = log_modes_of(metafunc.definition)
        if len(modes) > 1:
            metafunc.parametrize("log_mode", modes, indirect=True)


def _has_its_own(metafunc: pytest.Metafunc, argument: str) -> bool:
    """Whether a test parametrizes *argument* itself."""
    names = [marker.args[0] for marker in metafunc.definition.iter_markers("parametrize")]
    return any(argument in (name.split(",") if isinstance(name, str) else name) for name in names)


def cell_of(item: pytest.Item) -> Cell | None:
    """The cell of the matrix that a test is; None for any other test."""
    planned = item.callspec.params.get("planned_cell") if hasattr(item, "callspec") else None
    return None if planned is None else planned.cell


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark the tests that use KVM, before ``-m`` selects, and add each test's cell to its report."""
    on_host = guest_session(config) is None
    for item in items:
        names = getattr(item, "fixturenames", [])
        if "log_mode" not in names and any(marker.name == "log_modes" for marker in item.own_markers):
            # pytest has dropped what pytest_generate_tests() added to a test with parameters (prune_dependency_tree()).
            names.append("log_mode")
        on_kvm = "kvm" in names
        if on_kvm:
            item.add_marker("kvm")
        if item.nodeid.startswith(OWN_TESTS):
            item.add_marker("unit")
        if on_host and item.get_closest_marker("disposable_kernel"):
            why = "could harm the kernel, or changes settings of it: only in one that is booted for it (make check-kernel)"
            item.add_marker(pytest.mark.skip(why))
        item.user_properties.append(("kvm", on_kvm))
        if cell := cell_of(item):
            item.user_properties += asdict(cell).items()
