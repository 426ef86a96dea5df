# SPDX-License-Identifier: GPL-2.0-only
"""guest_pytest.py SESSION [options of pytest]: pytest in the booted kernel.

It starts while KVM is loaded, and runs the tests once it reads a line. SESSION is a GuestSession as JSON.
"""

import json
import sys

import pytest

from runner.guest_session import GuestSession

if __name__ == "__main__":
    session = GuestSession(**json.loads(sys.argv[1]))
    sys.stdin.readline()
    sys.exit(pytest.main(sys.argv[2:], plugins=[session]))
