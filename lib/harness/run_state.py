# SPDX-License-Identifier: GPL-2.0-only
"""What the plugins share about a run, in the stash of pytest's config."""

from typing import TYPE_CHECKING

import pytest

from dirty_tracking.cell import Settings
from harness.interruption import Interruption
from harness.journal import Journal, PastRun
from harness.selection import PlannedCell

if TYPE_CHECKING:
    from runner.target import Target

# The cells of the matrix; empty if the tests run in another kernel
PLAN = pytest.StashKey[list[PlannedCell]]()
SETTINGS = pytest.StashKey[Settings]()
INTERRUPTION = pytest.StashKey[Interruption]()
# The other kernel with its machine, and the tests to run there; absent if all tests run on this host
TARGET: "pytest.StashKey[Target]" = pytest.StashKey()
REMOTE_TESTS = pytest.StashKey[list[str]]()
# The journal that this process writes; absent in workers, in a booted kernel, and where nothing runs
JOURNAL = pytest.StashKey[Journal]()
# The run that is resumed; absent in any other
RESUMED = pytest.StashKey[PastRun]()
# Why --kernel auto found no other kernel; absent if none was needed
NO_LOCAL_KERNEL = pytest.StashKey[str]()


def is_worker(config: pytest.Config) -> bool:
    """Whether this process is a worker of xdist."""
    return hasattr(config, "workerinput")
