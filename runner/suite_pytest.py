# SPDX-License-Identifier: GPL-2.0-only
"""pytest as `make run`, `make test` and check_kernel.py start it: runner.suite_pytest [options of pytest]."""

import os
import sys

import pytest

# Options whose value is a path. pytest looks for its settings and conftest.py beside each path that stands alone, before
# it knows these options: the path in `--results PATH` is one (locate_config(), _pytest/config/findpaths.py).
_PATHS = ("--results", "--resume", "--kvm-device", "--kernel", "--qemu", "--junitxml", "--junit-xml", "--log-file")
# Those that name a file, or a folder, to write
_FILES = ("--results", "--resume", "--junitxml", "--junit-xml", "--log-file")


def in_one_word(words: list[str]) -> list[str]:
    """Join each option with its path: ``--results=PATH``."""
    joined: list[str] = []
    left = iter(words)
    for word in left:
        value = next(left, None) if word in _PATHS else None
        joined.append(word if value is None else f"{word}={value}")
    return joined


def make_absolute(options: list[str], folder: str = "") -> list[str]:
    """*options* with absolute paths, as seen from *folder* or else from here, so that they can be used elsewhere."""
    words: list[str] = []
    for option in in_one_word(options):
        name, equals, value = option.partition("=")
        path = os.path.abspath(os.path.join(folder, os.path.expanduser(value)))
        if value and (name in _FILES or (name in ("--kernel", "--qemu") and is_path(value, folder))):
            value = path
        words.append(f"{name}{equals}{value}")
    return words


def is_path(name: str, folder: str = "") -> bool:
    """Whether *name* is a path, seen from *folder* or else from here, and not a release or a program to look up."""
    return "/" in name or os.path.exists(os.path.join(folder, name))


def run(arguments: list[str]) -> int:
    """Run pytest and return its exit status; an error outside the tests is one line."""
    _open_standard_files()
    try:
        return int(pytest.main(in_one_word(arguments)))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return pytest.ExitCode.INTERRUPTED
    except (OSError, ValueError) as error:  # of a --debug file, say, of PYTEST_ADDOPTS, or of where the output goes
        print(f"pytest: {error}", file=sys.stderr)
        return pytest.ExitCode.USAGE_ERROR


def _open_standard_files() -> None:
    """Replace standard files that were closed (``>&-``) by the null device."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            os.open(os.devnull, os.O_RDWR)  # it takes the lowest number that is free
            setattr(sys, name, open(number, "w" if number else "r"))  # noqa: SIM115 (open as long as the process lasts)


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
