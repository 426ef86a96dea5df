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
_WITH_THREADS = "with threads:"  # begins the line with the number of such tests


def pytest_collection_finish(session: pytest.Session) -> None:
    """Print how many tests start threads; the session that collects loads this module as a plugin."""
    number = sum(item.get_closest_marker("threads") is not None for item in session.items)
    session.config.get_terminal_writer().line(f"{_WITH_THREADS} {number}")


def matching_tests(option: Any, dimensions: list[str], tests: list[str]) -> tuple[int, int]:
    """How many tests the session in the kernel finds at most, and how many of them start threads.

    It collects *tests* like that session, with the cells of every kernel.

    :param option: the options of this run
    :param dimensions: names of the options that select cells
    :raises pytest.UsageError: an expression is invalid, a path does not exist, or a file cannot be imported
    """
    arguments = ["--collect-only", "-q", *_ANY_KERNELS_CELLS, "-p", "no:cacheprovider", "-p", __name__]
    arguments += [*options_given(option, dimensions), *selection_options(option), *tests]
    environment = {name: value for name, value in os.environ.items() if name not in _NOT_INHERITED}
    # For -p, which comes before pytest's setting pythonpath; pytest itself may be in a folder that the user has there.
    folders = [str(ROOT / "lib"), environment.get("PYTHONPATH")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, folders))
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
    lines = [] if mistake else done.stdout.splitlines()
    with_threads = [int(line.removeprefix(_WITH_THREADS)) for line in lines if line.startswith(_WITH_THREADS)]
    return sum("::" in line for line in lines), sum(with_threads)


def no_test_matches(option: Any, tests: list[str]) -> str:
    """The error message for a selection that matches no test."""
    words = [word if word.startswith("-") else repr(word) for word in selection_options(option)]
    places = [os.path.relpath(test, ROOT) if os.path.isabs(test) else test for test in tests if test[0] != "-"]
    return f"no test {'matches ' if words else ''}{' '.join([*words, 'in', *places])}"
