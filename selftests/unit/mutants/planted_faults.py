# SPDX-License-Identifier: GPL-2.0-only
"""A pytest plugin that falsifies what KVM answered, in each test's body: ``-p ...planted_faults --planted NAME``.

It keeps each test's outcome in the file that ``--outcomes`` names.
"""

import errno
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dirty_tracking.bitmap import set_pages
from dirty_tracking.ring import DirtyRing
from kvm_util import ioctl
from kvm_util.vm import Vm
from selftests.unit.mutants.faults import falsify_bitmaps

PATCH = pytest.MonkeyPatch()  # undone after each test's body
Entries = tuple[list[int], list[int]]


def _falsify_reports(bitmap_fault: Callable[[bytearray], None], ring_fault: Callable[[Entries], Entries]) -> None:
    harvest = DirtyRing.harvest
    falsify_bitmaps(PATCH, lambda _slot, bitmap: bitmap_fault(bitmap))
    PATCH.setattr(DirtyRing, "harvest", lambda ring, most=None: ring_fault(harvest(ring, most)))


def lose_reports() -> None:
    """The last page of each report is missing from it."""

    def lose_a_bit(bitmap: bytearray) -> None:
        for page in set_pages(bitmap)[-1:]:
            bitmap[page // 8] &= ~(1 << page % 8)

    _falsify_reports(lose_a_bit, lambda taken: (taken[0][:-1], taken[1][:-1]))


def add_reports() -> None:
    """Each report has a page more: the first that is not in it; in rings a page of slot 1 that no test uses."""

    def add_a_bit(bitmap: bytearray) -> None:
        pages = set(set_pages(bitmap))
        page = next((page for page in range(len(bitmap) * 8) if page not in pages), 0)
        bitmap[page // 8] |= 1 << page % 8

    _falsify_reports(add_a_bit, lambda taken: ([*taken[0], 1], [*taken[1], 1 << 30]))


def do_not_track_anew() -> None:
    """CLEAR and RESET are not passed on, and said to be done; and CLEAR changes the mask that it only is to read."""

    def falsified(_vm: Vm, _slot: int, bitmap: bytearray, *_range: int) -> None:
        bitmap[:] = bytes(len(bitmap))

    PATCH.setattr(Vm, "clear_dirty_log", falsified)
    PATCH.setattr(Vm, "reset_dirty_rings", lambda _vm: 0)


def miscount_resets() -> None:
    """KVM_RESET_DIRTY_RINGS says one entry more than it took."""
    reset = Vm.reset_dirty_rings
    PATCH.setattr(Vm, "reset_dirty_rings", lambda vm: reset(vm) + 1)


def mistake_errors() -> None:
    """What a test calls itself fails, with an error that no test can expect; see pytest_runtest_call()."""


def falsified_ioctl(fd: int, request: int, arg: Any = None) -> tuple[int, int]:
    """As :func:`kvm_util.ioctl.raw_ioctl`."""
    ioctl.raw_ioctl(fd, request, arg)
    return -1, errno.EXDEV


FAULTS = {
    fault.__name__: fault for fault in (lose_reports, add_reports, do_not_track_anew, miscount_resets, mistake_errors)
}
_outcomes: dict[str, str] = {}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--planted", choices=list(FAULTS), required=True)
    parser.addoption("--outcomes", type=Path)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Falsify the test's own body only: a fixture's check that fails proves nothing about the test."""
    FAULTS[item.config.option.planted]()
    module = getattr(item, "module", None)
    if item.config.option.planted == mistake_errors.__name__ and module and hasattr(module, "raw_ioctl"):
        PATCH.setattr(module, "raw_ioctl", falsified_ioctl)
    try:
        yield
    finally:
        PATCH.undo()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" or report.outcome != "passed":
        _outcomes[report.nodeid] = report.outcome


def pytest_unconfigure(config: pytest.Config) -> None:
    config.option.outcomes.write_text(json.dumps(_outcomes))
