# SPDX-License-Identifier: GPL-2.0-only
"""pytest in the booted kernel: it is imported while KVM is loaded, and begins when it gets a line to read."""

import sys

import pytest

if __name__ == "__main__":
    sys.stdin.readline()
    sys.exit(pytest.main(sys.argv[1:]))
