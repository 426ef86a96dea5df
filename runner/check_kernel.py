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
# Options that name a file to write
_FILES = ("--results", "--junitxml", "--junit-xml")
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
    if _is_path(kernel):
        kernel = os.path.abspath(os.path.expanduser(kernel))
    options = _with_absolute_paths(options)
    sys.path[0] = str(ROOT)
    os.chdir(ROOT)
    status = int(pytest.main([f"--kernel={kernel}", "-v", *options]))
    return STATUSES.get(status, status)


def _with_absolute_paths(options: list[str]) -> list[str]:
    """*options* with the paths in them made absolute, each in one word: pytest would take a second word for a test's path."""
    words: list[str] = []
    left = iter(options)
    for option in left:
        name, equals, value = option.partition("=")
        if name in (*_FILES, "--qemu"):
            value = value if equals else next(left, "")
            if name in _FILES or _is_path(value):
                value = os.path.abspath(os.path.expanduser(value))
            words.append(f"{name}={value}")
        else:
            words.append(option)
    return words


def _is_path(name: str) -> bool:
    """Whether *name* is the path of a kernel or program, and not a name to look up."""
    return "/" in name or os.path.exists(name)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
