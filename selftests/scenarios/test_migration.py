# SPDX-License-Identifier: GPL-2.0-only
"""Live migration by pre-copy: after the last round, source and copy of guest memory are byte-identical (migration.py)."""

import random
from contextlib import closing

import pytest

from dirty_tracking.cell import Settings
from dirty_tracking.migration import Migration
from dirty_tracking.vm import PAGE
from dirty_tracking.writers import Pace
from dirty_tracking.writers_vm import WritersVm
from kvm_util.kvm import Kvm
from kvm_util.memory import BACKINGS
from kvm_util.wording import counted
from selftests.scenarios.guests import HOT, RING, streams

pytestmark = pytest.mark.threads

# The vCPUs are stopped when a round has at most so many pages: the hot ones, and a few of the guest program's
ENOUGH = HOT + 8
SMALL = [(700, "shmem"), (300, "anonymous")]
LARGE = [(8192 + 5, "anonymous_thp"), (700, "shmem"), (64, "anonymous")]


@pytest.mark.parametrize(("vcpus", "pattern"), [(1, "sequential"), (2, "random")])
def test_precopy_migration(
    kvm: Kvm, request: pytest.FixtureRequest, settings: Settings,
    thorough: bool, log_mode: str, vcpus: int, pattern: str,
) -> None:  # fmt: skip
    """Pre-copy of all memslots, while the guest writes until the last round, ends with an identical copy of its memory."""
    own_properties = list(request.node.user_properties)
    name = f"{log_mode}, {counted(vcpus, 'vCPU')}, {pattern}"
    draw = random.Random(f"{settings.seed}/{name}")
    shapes = LARGE if thorough else SMALL
    for count, backing in shapes:
        if reason := BACKINGS[backing].missing(count * PAGE):
            pytest.skip(reason)
    npages = sum(count for count, _ in shapes)
    for _ in range(10 if thorough else 1):
        vm = WritersVm(kvm, log_mode, shapes, streams(vcpus, npages, pattern, draw), RING, Pace.VERY_SPARSE)
        with vm, closing(Migration(vm, ENOUGH, 20 if thorough else 6)) as migration:
            vm.populate()
            vm.writers.resume()
            migration.run()
            figures = [("migration", name), ("rounds", migration.figures())]
            request.node.user_properties[:] = [*own_properties, *figures]
            migration.verify()
