# SPDX-License-Identifier: GPL-2.0-only
"""Collects the selected tests on this host, before a kernel is fetched or booted, to find out how many there are."""

import os
import subprocess
import sys
from typing import Any

import pytest

from harness.kernel_options import options_given, selection_options
from runner import ROOT

# The options of the first two are already part of this run's command line. With the third, pytest would compile the test
# modules again in the kernel, where that takes seconds: the initramfs has what is compiled here.
_NOT_INHERITED = ("PYTEST_ADDOPTS", "PYTEST_PLUGINS", "PYTHONDONTWRITEBYTECODE")
# Plans the cells of every kernel: without a KVM device, none is left out
_ANY_KERNELS_CELLS = ["--full", "--kvm-device=/dev/null", "--test-mem=4M"]
_ERROR = "ERROR: "


def matching_tests(option: Any, dimensions: list[str], tests: list[str]) -> int:
    """How many tests the session in the kernel finds at most; collects *tests* like it, with the cells of every kernel.

    :param option: the options of this run
    :param dimensions: names of the options that select cells
    :raises pytest.UsageError: an expression is invalid, a path does not exist, or a file cannot be imported
    """
    arguments = ["--collect-only", "-q", *_ANY_KERNELS_CELLS, "-p", "no:cacheprovider"]
    arguments += [*options_given(option, dimensions), *selection_options(option), *tests]
    environment = {name: value for name, value in os.environ.items() if name not in _NOT_INHERITED}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    mistake = done.returncode == pytest.ExitCode.USAGE_ERROR
    if mistake and (errors := [line for line in done.stderr.splitlines() if line.startswith(_ERROR)]):
        raise pytest.UsageError(errors[0].removeprefix(_ERROR).replace(f"{ROOT}/", ""))
    if done.returncode == pytest.ExitCode.INTERRUPTED:
        sys.stderr.write(done.stdout)
        raise pytest.UsageError("the tests cannot be collected, as shown above")
    return 0 if mistake else sum("::" in line for line in done.stdout.splitlines())


def no_test_matches(option: Any, tests: list[str]) -> str:
    """The error message for a selection that matches no test."""
    words = [word if word.startswith("-") else repr(word) for word in selection_options(option)]
    places = [os.path.relpath(test, ROOT) if os.path.isabs(test) else test for test in tests if test[0] != "-"]
    return f"no test {'matches ' if words else ''}{' '.join([*words, 'in', *places])}"
