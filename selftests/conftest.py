# SPDX-License-Identifier: GPL-2.0-only
"""What many tests of the contract begin with."""

import random
from collections.abc import Callable

import pytest

from dirty_tracking.cell import Settings
from dirty_tracking.modes import LOG_MODES
from dirty_tracking.platform import ring_order_is_write_order
from kvm_util.host import Host


@pytest.fixture(params=list(LOG_MODES))
def log_mode(request: pytest.FixtureRequest, needs_log_mode: Callable[[str], None]) -> str:
    """Each log mode by name; skips those that KVM does not have."""
    needs_log_mode(request.param)
    return str(request.param)


@pytest.fixture(params=[name for name, mode in LOG_MODES.items() if mode.uses_ring])
def ring_mode(request: pytest.FixtureRequest, needs_log_mode: Callable[[str], None]) -> str:
    """Each log mode with rings, likewise."""
    needs_log_mode(request.param)
    return str(request.param)


@pytest.fixture
def entries_in_order(host: Host, lacks: Callable[[str], None]) -> None:
    """For tests that hold a ring to the order of the writes."""
    if not ring_order_is_write_order(host):
        lacks("with kvm_intel.pml=Y rings are not in the order of the writes before Linux 6.14")


@pytest.fixture
def draw(request: pytest.FixtureRequest, settings: Settings) -> random.Random:
    """Random numbers that the run's seed and the test's name decide."""
    return random.Random(f"{settings.seed}/{request.node.name}")
