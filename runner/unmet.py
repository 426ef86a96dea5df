# SPDX-License-Identifier: GPL-2.0-only
"""Check that this Python has what the suite needs, as any other than the virtual environment's may not.

It has to run on old Pythons too, up to the message.
"""

import sys
from importlib.util import find_spec

_OLDEST_PYTHON = (3, 11)
_OLDEST_PYTEST = (8, 0)
_MODULES = {"pytest": "pytest", "elftools": "pyelftools", "hypothesis": "hypothesis"}
_REMEDY = "take 'make run', or '.venv/bin/python -m pytest' ('make .venv/run' sets it up)"


def unmet(remedy: str = _REMEDY) -> str:
    """What is missing, in one line with the remedy; empty if nothing is."""
    if sys.version_info < _OLDEST_PYTHON:
        return _line("Python 3.11 or newer", "{}.{}".format(*sys.version_info), remedy)
    for module, package in _MODULES.items():
        if find_spec(module) is None:
            return _line(package, "none", remedy)
    import pytest

    try:
        __file__.encode()
    except UnicodeEncodeError:  # xdist would send it to its workers
        return "the path of the suite is not ASCII, and the locale says that all is: unset PYTHONUTF8, or set LC_ALL=C.UTF-8"
    if tuple(map(int, pytest.__version__.split(".")[:2])) < _OLDEST_PYTEST:
        return _line("pytest 8.0 or newer", pytest.__version__, remedy)
    return ""


def _line(needed: str, found: str, remedy: str) -> str:
    return f"the suite needs {needed}, {sys.executable} has {found}: {remedy}"


def leave(reason: str, status: int) -> None:
    """Print *reason* and exit with *status*."""
    sys.stderr.write(f"ERROR: {reason}\n")
    sys.exit(status)
