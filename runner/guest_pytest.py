# SPDX-License-Identifier: GPL-2.0-only
"""guest_pytest.py SESSION [options of pytest]: pytest in the booted kernel.

It starts while KVM is loaded, and runs the tests once it reads a line. SESSION is a GuestSession as JSON.
"""

import gc
import json
import sys

gc.disable()  # until LateGarbageCollection enables it

import pytest  # noqa: E402 (the import makes little garbage, and much work for the collector)

from runner.guest_session import GuestSession  # noqa: E402


class LateGarbageCollection:
    """Collects garbage once the tests are collected: what exists until then stays, and searching it takes emulated time."""

    def pytest_collection_finish(self) -> None:
        gc.freeze()
        gc.enable()


if __name__ == "__main__":
    session = GuestSession(**json.loads(sys.argv[1]))
    sys.stdin.readline()
    sys.exit(pytest.main(sys.argv[2:], plugins=[session, LateGarbageCollection()]))
