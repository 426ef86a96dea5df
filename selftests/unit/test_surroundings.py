# SPDX-License-Identifier: GPL-2.0-only
"""The suite and its programs with incomplete Pythons, unusual environments and unusual paths."""

import sys
from pathlib import Path

import pytest

from runner import ROOT
from selftests.unit.commands import ONE_CELL, QUICK, Done, start

USAGE_ERROR = 4


def run_pytest(folder: Path, /, *words: str, **environment: str) -> Done:
    command = [sys.executable, "-m", "pytest", *ONE_CELL, *QUICK, "--collect-only", *words]
    return start(command, folder, **environment)


def error_line(done: Done) -> str:
    """The only line of output of a run that was refused."""
    assert done.returncode == USAGE_ERROR, done.stdout + done.stderr
    (line,) = (done.stdout + done.stderr).strip().splitlines()
    return line


HIDE = """
import importlib.util
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "{}" else find_spec(name, *rest)
"""


@pytest.mark.parametrize(
    ("plugin", "needs", "has"),
    [
        (HIDE.format("elftools"), "pyelftools", "none"),
        (HIDE.format("hypothesis"), "hypothesis", "none"),
        ("import pytest\npytest.__version__ = '7.2.1'\n", "pytest 8.0 or newer", "7.2.1"),
    ],
    ids=["elftools", "hypothesis", "pytest"],
)
def test_python_without_the_packages(tmp_path: Path, plugin: str, needs: str, has: str) -> None:
    """A missing or old package is one line that names the commands with a complete environment."""
    (tmp_path / "hide.py").write_text(plugin)
    assert error_line(run_pytest(ROOT, "-p", "hide", PYTHONPATH=str(tmp_path))) == (
        f"ERROR: the suite needs {needs}, {sys.executable} has {has}: take 'make run', or '.venv/bin/python -m pytest'"
        " ('make .venv/run' sets it up)"
    )


@pytest.mark.parametrize("program", ["check_kernel.py", "check_regression.py", "kernel_matrix.py"])
def test_program_without_the_packages(tmp_path: Path, program: str) -> None:
    """A missing package has exit status 128, which git bisect run does not take for a verdict."""
    words = [sys.executable, "-S", str(ROOT / "runner" / program), "nothing"]  # -S: without any packages
    done = start(words, tmp_path)
    assert done.returncode == 128
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("ERROR: the suite needs pytest, ")


def test_workers_without_xdist() -> None:
    """If xdist is not loaded, -n is an error that says how to load it, and everything else works."""
    assert error_line(run_pytest(ROOT, "-n2", PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")) == (
        "ERROR: -n needs pytest-xdist: it is not loaded (add -p xdist, or unset PYTEST_DISABLE_PLUGIN_AUTOLOAD)"
    )
    for words in (["-p", "xdist", "-n0"], []):
        done = run_pytest(ROOT, *words, PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")
        assert done.returncode == 0, done.stdout + done.stderr


SURROUNDINGS = {
    "safe-path": {"PYTHONSAFEPATH": "1"},
    "no-bytecode": {"PYTHONDONTWRITEBYTECODE": "1"},
    "ascii": {"LC_ALL": "C", "LANG": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    "no-tmpdir": {"TMPDIR": "/nonexistent"},
    "no-home": {"HOME": ""},
    "addopts": {"PYTEST_ADDOPTS": "--color=yes -rs"},
}


@pytest.mark.parametrize("name", SURROUNDINGS)
def test_unusual_environments(name: str) -> None:
    """Settings of Python, pytest and the locale in the environment do not break a run, nor its workers."""
    done = run_pytest(ROOT, "-n1", **SURROUNDINGS[name])
    assert done.returncode == 0, done.stdout + done.stderr


def test_foreign_modules_of_same_names(tmp_path: Path) -> None:
    """Packages of the same names in PYTHONPATH do not hide the suite's own."""
    for package in ("kvm_util", "dirty_tracking", "harness", "runner", "selftests"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text("raise ImportError('not the suite')\n")
    done = run_pytest(ROOT, PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr


def test_unusual_checkout_path(tmp_path: Path) -> None:
    """The suite runs from a path with spaces and non-ASCII letters; where Python assumes ASCII, it is a usage error."""
    folder = tmp_path / "mit Leerzeichen, \u00fcberall"
    folder.mkdir()
    files = (
        "conftest.py",
        "pytest.ini",
        "pyproject.toml",
        "known_bugs.toml",
        "lib",
        "runner",
        "guest_code",
        "selftests",
    )
    for name in files:
        (folder / name).symlink_to(ROOT / name)
    done = run_pytest(folder, "-n1")
    assert done.returncode == 0, done.stdout + done.stderr
    line = error_line(run_pytest(folder, "-n1", **SURROUNDINGS["ascii"]))
    assert line.startswith("ERROR: the path of the suite is not ASCII")
