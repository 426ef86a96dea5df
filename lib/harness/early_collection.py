# SPDX-License-Identifier: GPL-2.0-only
"""Whether tests match what was asked for, found on this host before a kernel is fetched or booted for them."""

import os
import subprocess
import sys
from typing import Any

import pytest

from harness.kernel_options import options_given, selection_options
from runner import ROOT

# Options of its own would come from there: those of this run are on its command line already.
_NOT_INHERITED = ("PYTEST_ADDOPTS", "PYTEST_PLUGINS")
# All cells that may be in the plan of any kernel, as the device is not asked what this host has
_ANY_KERNELS_CELLS = ["--full", "--kvm-device=/dev/null", "--test-mem=4M"]
_ERROR = "ERROR: "


def any_test_matches(option: Any, dimensions: list[str], tests: list[str]) -> bool:
    """Collect *tests* as the session in the kernel will, but with the cells of any kernel.

    :param dimensions: the options that choose cells
    :raises pytest.UsageError: an expression is wrong, a path is not there, or a test's file cannot be imported
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
    return not mistake


def no_test_matches(option: Any, tests: list[str]) -> str:
    """The line that says so, with what was asked for."""
    words = [word if word.startswith("-") else repr(word) for word in selection_options(option)]
    places = [os.path.relpath(test, ROOT) if os.path.isabs(test) else test for test in tests if test[0] != "-"]
    return f"no test {'matches ' if words else ''}{' '.join([*words, 'in', *places])}"
