# SPDX-License-Identifier: GPL-2.0-only
"""The packages: imports point one way, the library can be imported anywhere, and its documented examples work."""

import ast
import doctest
import subprocess
import sys
from pathlib import Path

import pytest

import kvm_util
from runner import ROOT

# What each package may import of the suite, and of other people's packages
SUITE = {
    "kvm_util": {"kvm_util"},
    "dirty_tracking": {"dirty_tracking", "kvm_util"},
    "runner": {"kvm_util", "runner"},
    "harness": {"dirty_tracking", "harness", "kvm_util", "runner"},
}
OTHERS = {
    "kvm_util": {"elftools"},
    "dirty_tracking": {"hypothesis"},
    "runner": {"elftools", "packaging", "pytest"},
    "harness": {"_pytest", "jinja2", "markupsafe", "numpy", "pygal", "pytest", "scipy", "xdist"},
}
# The commands of runner/ read what a run of pytest has left: they are on top of all packages, and import each other only.
COMMANDS = {
    "check_kernel.py",
    "check_regression.py",
    "coverage.py",
    "hosts.py",
    "kernel_matrix.py",
    "kernel_runs.py",
    "prove_fix.py",
    "run_verdicts.py",
    "runs_summary.py",
    "ssh_run.py",
}
FILES = {
    package: [path for path in sorted((ROOT / folder).rglob("*.py")) if path.name not in COMMANDS]
    for package, folder in {name: "runner" if name == "runner" else f"lib/{name}" for name in SUITE}.items()
}


def imported(path: Path) -> list[str]:
    """The modules that a file imports, anywhere in it."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            found.append(node.module or "")
        elif isinstance(node, ast.Import):
            found += [name.name for name in node.names]
    return found


@pytest.mark.parametrize("package", list(SUITE))
def test_imports_point_one_way(package: str) -> None:
    """A package imports the packages below it, the standard library, and what it is allowed of other people's."""
    allowed = SUITE[package] | OTHERS[package] | sys.stdlib_module_names
    wrong = [
        f"{path.relative_to(ROOT)} imports {module}"
        for path in FILES[package]
        for module in imported(path)
        if module.partition(".")[0] not in allowed
    ]
    assert FILES[package]
    assert wrong == []


def test_neutral_modules_name_no_architecture() -> None:
    """Only modules of an architecture import it by name; all others take ``kvm_util.arch.current``."""
    neutral = [path for files in FILES.values() for path in files if "arch" not in path.relative_to(ROOT).parts]
    assert [path for path in neutral if any("x86_64" in module for module in imported(path))] == []


def test_import_on_another_architecture() -> None:
    """Every module of the two libraries can be imported on a machine that the suite has no guest code for."""
    modules = [
        ".".join(path.relative_to(ROOT / "lib").with_suffix("").parts).removesuffix(".__init__")
        for package in ("kvm_util", "dirty_tracking")
        for path in FILES[package]
        if "x86_64" not in path.parts
    ]
    lines = ["import platform", "platform.machine = lambda: 'riscv64'", f"import {', '.join(modules)}"]
    lines += ["from kvm_util.arch import current", "print(current.NAME, current.init_vcpu)"]
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], cwd=ROOT, env={"PYTHONPATH": "lib"}, capture_output=True, text=True
    )
    assert done.stderr.splitlines()[-1] == "NotImplementedError: init_vcpu: the suite has no guest code for riscv64 yet"


@pytest.mark.usefixtures("kvm")
def test_documented_examples() -> None:
    """The examples in the library's documentation do what they show, on real KVM."""
    done = doctest.testmod(kvm_util, optionflags=doctest.IGNORE_EXCEPTION_DETAIL)
    assert (done.attempted > 0, done.failed) == (True, 0)
