# SPDX-License-Identifier: GPL-2.0-only
"""Makefile, make_venv.sh and the benchmark: no argument is silently ignored, and each error is one line."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from runner import ROOT
from selftests.unit.commands import start

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="no make on this machine (apt install make)")


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """The files of a fresh clone that make needs."""
    folder = tmp_path / "clone"
    folder.mkdir()
    for name in ("Makefile", "make_venv.sh", *(path.name for path in ROOT.glob("requirements*.txt"))):
        shutil.copy(ROOT / name, folder)
    return folder


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run", "KERNEL=debian:6.12"], "means nothing to 'make run': KERNEL is for check-kernel coverage fetch"),
        (["fetch", "run", "KERNEL=debian:6.1"], "means nothing to 'make run': KERNEL is for check-kernel coverage fetch"),
        (["run", "bench", "C_TEST=x"], "'C_TEST=x' means nothing to 'make run': C_TEST is for bench"),
        (["run", "KVM_PARAMS=kvm.tdp_mmu=0"], "'KVM_PARAMS=kvm.tdp_mmu=0' means nothing to 'make run'"),
        (["check-kernel", "KERNEL=debian:6.12", "KVM_PARAM=kvm.tdp_mmu=0"], "no such variable: KVM_PARAM (there are ARGS"),
        (["run", "ARG=-v"], "no such variable: ARG (there are ARGS WORKERS"),
        (["run", "VENV=/usr"], "no such variable: VENV (there are ARGS WORKERS"),
        (["check-kernel", "KERNEL=debian:6.12", "WORKERS=2"], "means nothing to 'make check-kernel': WORKERS is for run"),
        (["matrix", "WORKERS=2"], "'WORKERS=2' means nothing to 'make matrix': WORKERS is for run unit test"),
        (["lint", "ARGS=-v"], "means nothing to 'make lint': ARGS is for run check-kernel check-regression hosts matrix"),
        (["KERNEL=debian:6.12"], "'KERNEL=debian:6.12' means nothing to 'make help'"),
        (["run", "WORKERS=abc"], "WORKERS: 'abc' is neither a number nor auto"),
        (["test", "WORKERS="], "WORKERS: '' is neither a number nor auto"),
        (["test", "WORKERS=2 3"], "WORKERS: '2 3' is neither a number nor auto"),
        (["matrix", "MATRIX="], "make matrix: MATRIX names no file"),
        (["compare", "BASE=results/a"], "make compare: BASE and NEW name the results folders of runs"),
        (["rejudge"], "make rejudge: RESULTS names the results folder of a run: RESULTS=results/a"),
        (["check-regression", "NEW=a"], "make check-regression: BASE and NEW name two kernels: BASE=debian:6.1 NEW=~/linux"),
        (["hosts"], "make hosts: HOSTS names no host: HOSTS='root@a root@b'"),
        (["report"], "make report: RUNS names the results folders of runs"),
        (["report", "RUNS=results/a", "OUTPUT="], "OUTPUT is a file"),
        (["compare", "RUNS=results/a"], "'RUNS=results/a' means nothing to 'make compare': RUNS is for report"),
        (["prove-fix"], "make prove-fix: BUG names no bug: BUG=ring-reset-interrupted"),
        (["coverage"], "make coverage: KERNEL names no build tree of a kernel with GCOV"),
        (["run", "BUG=x"], "'BUG=x' means nothing to 'make run': BUG is for prove-fix"),
        (["check-kernel"], "make check-kernel: no kernel is named: KERNEL=debian:6.12"),
        (["check-kernel", "KERNEL="], "make check-kernel: no kernel is named: KERNEL=debian:6.12"),
    ],
    ids=" ".join,
)  # fmt: skip
def test_unused_variable_is_an_error(clone: Path, words: list[str], message: str) -> None:
    """A variable that the target does not use is one line of error, before anything is set up."""
    done = start(["make", *words], clone)
    assert done.returncode != 0
    assert message in done.stderr
    assert len((done.stdout + done.stderr).splitlines()) == 1
    assert not (clone / ".venv").exists()


@pytest.mark.parametrize(("prefix", "status"), [("", 2), ("MAKEFLAGS= ", 0)])
def test_variables_of_a_parent_make(clone: Path, prefix: str, status: int) -> None:
    """Variables of a parent make are refused like any others, unless its recipe clears MAKEFLAGS."""
    parent = clone.parent / "Makefile"
    parent.write_text(f"suite:\n\t@{prefix}$(MAKE) -C clone help\n")
    done = start(["make", "V=1"], clone.parent)
    assert done.returncode == status
    assert ("no such variable: V (there are ARGS" in done.stderr) == bool(status)


@pytest.mark.parametrize("name", ["KERNEL", "KVM_PARAMS"])
def test_kernel_in_the_environment(clone: Path, name: str) -> None:
    """KERNEL or KVM_PARAMS in the environment is refused by targets that would seem to use it, and ignored by others."""
    refused = start(["make", "-n", "run"], clone, **{name: "x"})
    assert refused.returncode != 0
    assert f"'{name}=x' means nothing to 'make run'" in refused.stderr
    assert start(["make", "-n", "lint"], clone, **{name: "x"}).returncode == 0
    done = start(["make", "-n", "check-kernel", "KERNEL=y"], clone, **{name: "x"})
    assert done.returncode == 0, done.stderr
    assert '"y" --kvm-params' in done.stdout


@pytest.mark.parametrize(
    ("words", "command"),
    [
        (["run", "WORKERS=2", "ARGS=-k 'a or b' --x=y"], "test_dirty_log.py -n 2 --kernel auto -k 'a or b' --x=y"),
        (["check-kernel", "KERNEL=~/a b", "KVM_PARAMS=kvm.x=1 kvm.y=2"], '"~/a b" --kvm-params "kvm.x=1 kvm.y=2"'),
        (["fetch", "KERNEL=debian:6.1"], "-m runner.fetch debian:6.1"),
        (["fetch"], "-m runner.fetch debian:6.12"),
        (["fetch", "run", "ARGS=-v"], "--kernel auto -v"),
        (["bench", "C_TEST=a b"], '-m bench.bench --c-test "a b"'),
        (["prove-fix", "BUG=x"], '-m runner.prove_fix "x"'),
        (["matrix"], 'runner/kernel_matrix.py "matrix.toml"'),
        (["check-regression", "BASE=~/a b", "NEW=c kvm.x=1", "ARGS=-k d"], 'check_regression.py "~/a b" "c kvm.x=1" -k d'),
        (["check-regression", "BASE=a", "NEW=b"], "./make_venv.sh .venv requirements-analysis.txt"),
        (["rejudge", "RESULTS=a b"], '-m harness.compare --rejudge  -- "a b"'),
        (["compare", "BASE=a", "NEW=b"], "./make_venv.sh .venv requirements.txt"),
        (["compare", "BASE=lib", "NEW=several"], "./make_venv.sh .venv requirements-analysis.txt"),
        (["report", "RUNS=results/a results/b", "OUTPUT=a b.html"], '--output "a b.html" -- results/a results/b'),
        (["hosts", "HOSTS=a root@b", "ARGS=test -k c"], 'runner/hosts.py "$HOSTS" test -k c'),
        (["report", "RUNS=results/a"], "./make_venv.sh .venv requirements-report.txt"),
        (["run", "PYTHON=/a b/python3"], 'PYTHON="/a b/python3" ./make_venv.sh .venv requirements.txt'),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_variable_reaches_its_command(clone: Path, words: list[str], command: str) -> None:
    """A variable's value appears in the command that the target runs, with spaces and quotes, and decides what it installs."""
    (clone / "several/1").mkdir(parents=True)
    (clone / "several/1/results.json").touch()
    done = start(["make", "-n", *words], clone)
    assert done.returncode == 0, done.stderr
    assert command in done.stdout


def test_environment_that_hides_modules(clone: Path) -> None:
    """Variables that hide modules or plugins are not passed on to the suite; PYTEST_ADDOPTS is."""
    with (clone / "Makefile").open("a") as file:
        file.write("\nshow:\n\t@env\n")
    hiding = ["PYTHONPATH", "PYTHONHOME", "PYTHONSAFEPATH", "PYTHONOPTIMIZE"]
    hiding += ["PYTEST_PLUGINS", "PYTEST_DISABLE_PLUGIN_AUTOLOAD"]
    done = start(["make", "show"], clone, **dict.fromkeys([*hiding, "PYTEST_ADDOPTS"], "1"))
    shown = [line.partition("=")[0] for line in done.stdout.splitlines()]
    assert {*hiding, "PYTEST_ADDOPTS"} & {*shown} == {"PYTEST_ADDOPTS"}


@pytest.mark.parametrize(
    ("named", "collected"),
    [([], "selftests/matrix/test_dirty_log.py"), (["selftests/unit/test_uapi.py"], "selftests/unit/test_uapi.py")],
    ids=["default", "named"],
)
def test_file_in_args_replaces_matrix(named: list[str], collected: str) -> None:
    """By default make run collects the main test; if ARGS names a file, only that one."""
    options = start(["make", "-n", "run", "WORKERS=0"], ROOT).stdout.splitlines()[-1].split()[3:]
    done = start([sys.executable, "-m", "pytest", *options, "--collect-only", "-qq", *named], ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("selftests/")]
    assert {line.partition(":")[0] for line in lines} == {collected}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--c-test", "/nope"], "bench: --c-test: /nope is no program that can be run (C_TEST=<path of a built"),
        (["--c-test", "bench/loops.c"], "bench: --c-test: bench/loops.c is no program that can be run"),
        (["--rounds", "0"], "bench: --rounds and --iterations must be at least 1"),
    ],
)
def test_invalid_benchmark_arguments(words: list[str], message: str) -> None:
    """Invalid arguments of the benchmark are one line of error, before anything is measured."""
    done = start([sys.executable, "-m", "bench.bench", *words], ROOT, PYTHONPATH=".:lib")
    assert done.returncode != 0
    assert len(done.stderr.splitlines()) == 1
    assert message in done.stderr
    assert not done.stdout


# --- the virtual environment ------------------------------------------------------------------------------------------


# A fake pip, since the real one takes seconds; the file FOLDER/pip-does controls it.
PIP = """
import pathlib, sys, time
folder = pathlib.Path(__file__).parent.parent
order = (folder / "pip-does").read_text()
if order == "fail":
    sys.exit("WARNING: Retrying\\nERROR: Could not find it\\nERROR: No matching distribution found for pytest==9.2.0")
if order == "wait":
    (folder / "waits").touch()
    time.sleep(30)
"""


def make_script(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


class Maker:
    """Runs make_venv.sh in *folder* with a fake pip."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.venv = folder / ".venv"
        self.environment = {"PYTHONPATH": str(folder)}
        (folder / "pip").mkdir()
        (folder / "pip" / "__init__.py").touch()
        (folder / "pip" / "__main__.py").write_text(PIP)
        self.pip("install")

    def pip(self, does: str) -> None:
        (self.folder / "pip-does").write_text(does)

    def __call__(self, python: str = "", status: int = 0) -> str:
        words = ["./make_venv.sh", ".venv", "requirements.txt"]
        done = start(words, self.folder, **self.environment, PYTHON=python)
        assert done.returncode == status, done.stderr
        assert not done.stdout
        assert not (self.venv / ".incomplete").exists()
        return done.stderr


@pytest.fixture
def maker(clone: Path) -> Maker:
    return Maker(clone)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "usage: make_venv.sh VENV REQUIREMENTS, as 'make .venv/run' calls it"),
        ([".venv"], "usage: make_venv.sh VENV REQUIREMENTS, as 'make .venv/run' calls it"),
        ([".venv", "nope.txt"], "nope.txt cannot be read"),
        ([".", "requirements.txt"], ". is there, and is no virtual environment: remove it"),
    ],
)
def test_make_venv_with_bad_arguments(clone: Path, words: list[str], message: str) -> None:
    """Missing or wrong arguments of make_venv.sh are one line of error, and nothing is removed."""
    done = start(["./make_venv.sh", *words], clone)
    assert done.returncode == 1
    assert done.stderr == f"make_venv.sh: {message}\n"
    assert (clone / "requirements.txt").exists()


@pytest.mark.parametrize(
    ("python", "message"),
    [
        ("nopython", "no such program: nopython (PYTHON=... names a Python 3.11 or newer)"),
        ("/bin/true", "/bin/true is no Python (PYTHON=... names a Python 3.11 or newer)"),
        ("./old", "Python 3.11 or newer is needed, ./old is 3.9.2 (PYTHON=... names another one)"),
    ],
)
def test_unsuitable_python(clone: Path, python: str, message: str) -> None:
    """A Python that is missing or too old is one line of error and leaves nothing behind, also through make."""
    make_script(clone / "old", "echo False 3.9.2")
    done = start(["./make_venv.sh", ".venv", "requirements.txt"], clone, PYTHON=python)
    assert done.returncode == 1
    assert done.stderr == f"make_venv.sh: {message}\n"
    assert not (clone / ".venv").exists()
    (clone / ".venv").mkdir()
    (clone / ".venv" / "run").touch()
    done = start(["make", "guest_code", f"PYTHON={python}"], clone)
    assert done.returncode != 0
    assert message in done.stderr


def test_working_environment_is_kept(maker: Maker) -> None:
    """A working environment is kept; only its packages are installed again."""
    assert maker() == "make_venv.sh: installing the packages of requirements.txt into .venv\n"
    (maker.venv / "mine").touch()
    assert maker() == "make_venv.sh: installing the packages of requirements.txt into .venv\n"
    assert (maker.venv / "mine").exists()
    same = os.path.realpath(shutil.which("python3") or "")
    assert "made again" not in maker(python=same)


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        ("incomplete", "it was not complete"),
        ("dangling", "its Python is gone, or is another one by now"),
        ("upgraded", "its Python is gone, or is another one by now"),
        ("other", "it was made with another Python"),
    ],
)
def test_broken_environment_is_recreated(maker: Maker, damage: str, why: str) -> None:
    """An environment that is incomplete, or whose Python is gone, upgraded or another one, is recreated."""
    maker()
    (maker.venv / "mine").touch()
    python = ""
    if damage == "incomplete":
        (maker.venv / ".incomplete").touch()
    elif damage == "dangling":
        (maker.venv / "bin" / "python").unlink()
        (maker.venv / "bin" / "python").symlink_to("/nonexistent/python3")
    elif damage == "upgraded":
        next((maker.venv / "lib").glob("python3.*")).rename(maker.venv / "lib" / "python3.0")
    else:
        other = make_script(  # identifies itself as another Python than ours
            maker.folder / "other",
            f'[ "${{2#*version_info, }}" = "$2" ] || exec echo another\nexec {sys.executable} "$@"',
        )
        python = str(other)
    assert maker(python).splitlines()[0] == f"make_venv.sh: .venv is made again: {why}"
    assert not (maker.venv / "mine").exists()
    assert (maker.venv / "bin" / "python").exists()


def test_unavailable_packages(maker: Maker) -> None:
    """If pip fails, one line has the reason and the remedy; no incomplete environment is left, an old one is kept."""
    maker.pip("fail")
    output = maker(status=1).splitlines()
    assert output[1:] == [
        "make_venv.sh: no packages from pip: No matching distribution found for pytest==9.2.0"
        " (no network? docs/setup.md, 'Without network'; all that pip said is in build/pip.log)"
    ]
    assert "WARNING: Retrying" in (maker.folder / "build" / "pip.log").read_text()
    assert not maker.venv.exists()
    maker.pip("install")
    maker()
    (maker.venv / "mine").touch()
    maker.pip("fail")
    maker(status=1)
    assert (maker.venv / "mine").exists()


def test_concurrent_environment_setup(maker: Maker) -> None:
    """A second make_venv.sh waits for the first, and recreates the environment if the first is killed."""
    maker.pip("wait")
    words = ["./make_venv.sh", ".venv", "requirements.txt"]
    environment = os.environ | maker.environment
    first = subprocess.Popen(
        words, cwd=maker.folder, env=environment, stderr=subprocess.DEVNULL, start_new_session=True
    )
    wait_until((maker.folder / "waits").exists)
    assert (maker.venv / ".incomplete").exists()
    maker.pip("install")
    said = maker.folder / "output"
    with said.open("wb") as output:
        second = subprocess.Popen(words, cwd=maker.folder, env=environment, stderr=output)
    wait_until(said.read_text)
    assert said.read_text() == "make_venv.sh: another run makes .venv: waiting for it\n"
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    assert second.wait(timeout=20) == 0
    assert "make_venv.sh: .venv is made again: it was not complete" in said.read_text()
    assert not (maker.venv / ".incomplete").exists()


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
