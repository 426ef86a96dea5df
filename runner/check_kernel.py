# SPDX-License-Identifier: GPL-2.0-only
"""check_kernel.py KERNEL [options of pytest]: test a kernel, with an exit status as ``git bisect run`` wants it.

0: good; 1: bad; 125: it cannot be tested (it does not boot, has no KVM, is no kernel); 128: nothing can be tested like
this (wrong options, nothing selected), which ends a bisection; 130: interrupted.
"""

import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
_USAGE = "usage: check_kernel.py KERNEL [options of pytest]"
# pytest's own exit statuses that say nothing about the kernel (https://docs.pytest.org/en/stable/reference/exit-codes.html)
STATUSES: dict[int, int] = {
    pytest.ExitCode.INTERRUPTED: 130,
    pytest.ExitCode.INTERNAL_ERROR: 128,
    pytest.ExitCode.USAGE_ERROR: 128,
    pytest.ExitCode.NO_TESTS_COLLECTED: 128,
}


def main(arguments: list[str]) -> int:
    """Run pytest with the kernel that *arguments* name first."""
    if not arguments or not arguments[0] or arguments[0].startswith("-"):
        print(f"{_USAGE}: no kernel is named", file=sys.stderr)
        return 128
    kernel, *options = arguments
    # Paths are seen from where the user is, tests from the suite, which pytest has to be in to find its settings.
    if "/" in kernel or os.path.exists(kernel):
        kernel = os.path.abspath(os.path.expanduser(kernel))
    for index, option in enumerate(options):
        name, equals, value = option.partition("=")
        if name in ("--results", "--junitxml", "--junit-xml") and equals:
            options[index] = f"{name}={os.path.abspath(value)}"
    sys.path[0] = str(ROOT)
    os.chdir(ROOT)
    status = int(pytest.main([f"--kernel={kernel}", "-v", *options]))
    return STATUSES.get(status, status)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
