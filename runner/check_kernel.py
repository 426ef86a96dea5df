# SPDX-License-Identifier: GPL-2.0-only
"""Test a kernel, with an exit status as ``git bisect run`` wants it; see _USAGE."""

import os
import sys
from pathlib import Path

if __name__ == "__main__":
    # Python puts the program's own folder there; and the user may have taken any Python.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    from runner.unmet import leave, unmet

    if reason := unmet():
        leave(reason, 128)

import pytest

from harness.kernel_options import AUTO
from runner import ROOT
from runner.suite_pytest import is_path, make_absolute, run

_USAGE = """\
usage: check_kernel.py KERNEL [options of pytest, and tests to run]

Boots KERNEL in QEMU and runs the suite in it. KERNEL is a bzImage, a build tree, a .deb, an unpacked package, the release
of an installed kernel, or debian:6.12. `pytest --help` has the options, among them those of the machine.

exit status
  0    good: all tests passed
  1    bad: a test failed, or the kernel reported a bug, oopsed, panicked or hung
  125  it cannot be tested: it does not boot, has no KVM, is no kernel for this machine
  128  nothing can be tested like this: a wrong option, no test that matches; this ends a bisection
  130  interrupted"""
# pytest's own exit statuses that say nothing about the kernel (https://docs.pytest.org/en/stable/reference/exit-codes.html)
STATUSES: dict[int, int] = {
    pytest.ExitCode.INTERRUPTED: 130,
    pytest.ExitCode.INTERNAL_ERROR: 128,
    pytest.ExitCode.USAGE_ERROR: 128,
    pytest.ExitCode.NO_TESTS_COLLECTED: 128,
}


def main(arguments: list[str]) -> int:
    """Run pytest with the kernel that *arguments* name first."""
    if {"-h", "--help"} & {*arguments}:
        print(_USAGE)
        return 0
    if mistake := _find_mistake(arguments):
        print(f"check_kernel.py: {mistake}", file=sys.stderr)
        return 128
    kernel, *options = arguments
    # Paths are relative to the user's folder, tests to the suite's, where pytest finds its settings.
    if is_path(kernel):
        kernel = os.path.abspath(os.path.expanduser(kernel))
    options = make_absolute(options)
    os.chdir(ROOT)
    status = run([f"--kernel={kernel}", "-v", *options])
    return STATUSES.get(status, status)


def _find_mistake(arguments: list[str]) -> str | None:
    if not arguments or not arguments[0] or arguments[0].startswith("-"):
        return "no kernel is named: check_kernel.py KERNEL [options of pytest], such as debian:6.12; see --help"
    if arguments[0] == AUTO:
        return f"{AUTO} is no kernel to check: name one (debian:6.12); make run takes a local one where it needs one"
    if any(argument.partition("=")[0] == "--kernel" for argument in arguments):
        return "--kernel: the kernel is named already, as the first argument"
    return None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
