# SPDX-License-Identifier: GPL-2.0-only
"""Makefile, make_venv.sh and the benchmark: nothing is accepted and ignored, and what is missing is one line."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from runner import ROOT
from selftests.unit.commands import start

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="no make on this machine (apt install make)")


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A clean clone, as far as make needs it."""
    folder = tmp_path / "clone"
    folder.mkdir()
    for name in ("Makefile", "make_venv.sh", "requirements.txt", "requirements-dev.txt"):
        shutil.copy(ROOT / name, folder)
    return folder


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run", "KERNEL=debian:6.12"], "'KERNEL=debian:6.12' means nothing to 'make run': KERNEL is for check-kernel fetch"),
        (["test", "KERNEL=debian:6.12"], "means nothing to 'make test': KERNEL is for check-kernel fetch"),
        (["matrix", "KERNEL=debian:6.12"], "means nothing to 'make matrix': KERNEL is for check-kernel fetch"),
        (["fetch", "run", "KERNEL=debian:6.1"], "means nothing to 'make run': KERNEL is for check-kernel fetch"),
        (["check-kernel", "test", "KERNEL=debian:6.1"], "means nothing to 'make test': KERNEL is for check-kernel fetch"),
        (["run", "bench", "C_TEST=x"], "'C_TEST=x' means nothing to 'make run': C_TEST is for bench"),
        (["run", "KVM_PARAMS=kvm.tdp_mmu=0"], "'KVM_PARAMS=kvm.tdp_mmu=0' means nothing to 'make run'"),
        (["test", "KVM_PARAMS=kvm.tdp_mmu=0"], "means nothing to 'make test': KVM_PARAMS is for check-kernel"),
        (["check-kernel", "KERNEL=debian:6.12", "KVM_PARAM=kvm.tdp_mmu=0"], "no such variable: KVM_PARAM (there are ARGS"),
        (["run", "ARG=-v"], "no such variable: ARG (there are ARGS WORKERS"),
        (["run", "VENV=/usr"], "no such variable: VENV (there are ARGS WORKERS"),
        (["check-kernel", "KERNEL=debian:6.12", "WORKERS=2"], "means nothing to 'make check-kernel': WORKERS is for run unit test test-all"),
        (["matrix", "WORKERS=2"], "'WORKERS=2' means nothing to 'make matrix': WORKERS is for run unit test test-all"),
        (["lint", "ARGS=-v"], "means nothing to 'make lint': ARGS is for run check-kernel matrix unit test test-all kill-matrix bench"),
        (["KERNEL=debian:6.12"], "'KERNEL=debian:6.12' means nothing to 'make help'"),
        (["run", "WORKERS=abc"], "WORKERS: 'abc' is neither a number nor auto"),
        (["run", "WORKERS=-1"], "WORKERS: '-1' is neither a number nor auto"),
        (["test", "WORKERS="], "WORKERS: '' is neither a number nor auto"),
        (["test", "WORKERS=2 3"], "WORKERS: '2 3' is neither a number nor auto"),
        (["matrix", "MATRIX="], "make matrix: MATRIX names no file"),
        (["check-kernel"], "make check-kernel: no kernel is named: KERNEL=debian:6.12"),
        (["check-kernel", "KERNEL="], "make check-kernel: no kernel is named: KERNEL=debian:6.12"),
    ],
    ids=" ".join,
)  # fmt: skip
def test_a_variable_that_would_be_ignored(clone: Path, words: list[str], message: str) -> None:
    """One line, before anything is set up."""
    done = start(["make", *words], clone)
    assert done.returncode != 0
    assert message in done.stderr
    assert len((done.stdout + done.stderr).splitlines()) == 1
    assert not (clone / ".venv").exists()


@pytest.mark.parametrize(("prefix", "status"), [("", 2), ("MAKEFLAGS= ", 0)])
def test_variables_of_a_parent_make(clone: Path, prefix: str, status: int) -> None:
    """They are refused like any others, unless the recipe keeps them back as docs/setup.md says."""
    parent = clone.parent / "Makefile"
    parent.write_text(f"suite:\n\t@{prefix}$(MAKE) -C clone help\n")
    done = start(["make", "V=1"], clone.parent)
    assert done.returncode == status
    assert ("no such variable: V (there are ARGS" in done.stderr) == bool(status)


@pytest.mark.parametrize("name", ["KERNEL", "KVM_PARAMS"])
def test_a_kernel_in_the_environment(clone: Path, name: str) -> None:
    """It counts as on the command line where it would be taken for tested, and nowhere else."""
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
        (["bench", "C_TEST=a b"], 'bench/bench.py --c-test "a b"'),
        (["matrix"], 'runner/kernel_matrix.py "matrix.toml"'),
        (["run", "PYTHON=/a b/python3"], 'PYTHON="/a b/python3" ./make_venv.sh .venv requirements.txt'),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_a_variable_reaches_its_command(clone: Path, words: list[str], command: str) -> None:
    """What is given appears in the command that the target runs, with its spaces and quotes."""
    done = start(["make", "-n", *words], clone)
    assert done.returncode == 0, done.stderr
    assert command in done.stdout


def test_what_keeps_the_suite_from_its_modules(clone: Path) -> None:
    """Of the user's Python and pytest nothing that hides modules or plugins reaches the suite; what adds options does."""
    with (clone / "Makefile").open("a") as file:
        file.write("\nshow:\n\t@env\n")
    hiding = (
        "PYTHONPATH",
        "PYTHONHOME",
        "PYTHONSAFEPATH",
        "PYTHONOPTIMIZE",
        "PYTEST_PLUGINS",
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD",
    )
    done = start(["make", "show"], clone, **dict.fromkeys([*hiding, "PYTEST_ADDOPTS"], "1"))
    shown = [line.partition("=")[0] for line in done.stdout.splitlines()]
    assert [name for name in (*hiding, "PYTEST_ADDOPTS") if name in shown] == ["PYTEST_ADDOPTS"]


@pytest.mark.parametrize("named", [True, False])
def test_a_file_in_args_is_all_that_runs(named: bool) -> None:
    """``make run`` has the matrix as what runs where nothing is named."""
    command = start(["make", "-n", "run", "WORKERS=0"], ROOT).stdout.splitlines()[-1].split()[3:]
    files = ["selftests/unit/test_uapi.py"] if named else []
    done = start([sys.executable, "-m", "pytest", *command, "--collect-only", "-qq", *files], ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    collected = {line.partition(":")[0] for line in done.stdout.splitlines() if line.startswith("selftests/")}
    assert collected == {"selftests/unit/test_uapi.py" if named else "selftests/matrix/test_dirty_log.py"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--c-test", "/nope"], "bench: --c-test: /nope is no program that can be run (C_TEST=<path of a built"),
        (["--c-test", "bench/loops.c"], "bench: --c-test: bench/loops.c is no program that can be run"),
        (["--rounds", "0"], "bench: --rounds and --iterations must be at least 1"),
    ],
)
def test_a_benchmark_that_cannot_be(words: list[str], message: str) -> None:
    """It is refused at once, not after a minute of others."""
    done = start([sys.executable, "bench/bench.py", *words], ROOT, PYTHONPATH=".:lib")
    assert done.returncode != 0
    assert len(done.stderr.splitlines()) == 1
    assert message in done.stderr
    assert not done.stdout


# --- the virtual environment ------------------------------------------------------------------------------------------


# In place of pip, which takes seconds: it does as the file FOLDER/pip-does says.
PIP = """
import pathlib, sys, time
order = (pathlib.Path(__file__).parent.parent / "pip-does").read_text()
if order == "fail":
    sys.exit("WARNING: Retrying\\nERROR: Could not find it\\nERROR: No matching distribution found for pytest==9.2.0")
if order == "wait":
    (pathlib.Path(__file__).parent.parent / "waits").touch()
    time.sleep(30)
"""


class Maker:
    """Runs make_venv.sh in *folder* with a pip of ours."""

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
def test_make_venv_without_its_arguments(clone: Path, words: list[str], message: str) -> None:
    """One line says what is missing or wrong, and nothing is removed."""
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
def test_a_python_that_will_not_do(clone: Path, python: str, message: str) -> None:
    """One line, a status that says so, and nothing half made; through make too, where an environment is there already."""
    (clone / "old").write_text("#!/bin/sh\necho False 3.9.2\n")
    (clone / "old").chmod(0o755)
    done = start(["./make_venv.sh", ".venv", "requirements.txt"], clone, PYTHON=python)
    assert done.returncode == 1
    assert done.stderr == f"make_venv.sh: {message}\n"
    assert not (clone / ".venv").exists()
    (clone / ".venv").mkdir()
    (clone / ".venv" / "run").touch()
    done = start(["make", "guest_code", f"PYTHON={python}"], clone)
    assert done.returncode != 0
    assert message in done.stderr


def test_an_environment_that_works_stays(maker: Maker) -> None:
    """It gets its packages once more, and keeps all else that is in it; so it does when its own Python is named."""
    assert maker() == "make_venv.sh: installing the packages of requirements.txt into .venv\n"
    (maker.venv / "mine").touch()
    assert maker() == "make_venv.sh: installing the packages of requirements.txt into .venv\n"
    assert (maker.venv / "mine").exists()
    assert "made again" not in maker(python=sys.executable)


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        ("incomplete", "it was not complete"),
        ("dangling", "its Python is gone, or is another one by now"),
        ("upgraded", "its Python is gone, or is another one by now"),
        ("other", "it was made with another Python"),
    ],
)
def test_a_broken_environment_is_made_again(maker: Maker, damage: str, why: str) -> None:
    """A run that broke off, a Python that was removed, that has another version since, or that another one was named."""
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
        other = maker.folder / "other"  # says another thing than our Python where it is asked who it is
        other.write_text(
            f'#!/bin/sh\n[ "${{2#*version_info, }}" = "$2" ] || exec echo another\nexec {sys.executable} "$@"\n'
        )
        other.chmod(0o755)
        python = str(other)
    assert maker(python).splitlines()[0] == f"make_venv.sh: .venv is made again: {why}"
    assert not (maker.venv / "mine").exists()
    assert (maker.venv / "bin" / "python").exists()


def test_packages_that_cannot_be_had(maker: Maker) -> None:
    """One line with pip's reason and what to do; nothing half made stays, and an environment that was there does."""
    maker.pip("fail")
    said = maker(status=1).splitlines()
    assert said[1:] == [
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


def test_two_make_an_environment_at_once(maker: Maker) -> None:
    """The second says that it waits; and when the first is killed while pip installs, it makes the environment again."""
    maker.pip("wait")
    words = ["./make_venv.sh", ".venv", "requirements.txt"]
    environment = os.environ | maker.environment
    first = subprocess.Popen(
        words, cwd=maker.folder, env=environment, stderr=subprocess.DEVNULL, start_new_session=True
    )
    wait_for(maker.folder / "waits")
    assert (maker.venv / ".incomplete").exists()
    maker.pip("install")
    with (maker.folder / "said").open("wb") as said:
        second = subprocess.Popen(words, cwd=maker.folder, env=environment, stderr=said)
    deadline = time.monotonic() + 20
    while not (text := (maker.folder / "said").read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert text == "make_venv.sh: another run makes .venv: waiting for it\n"
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    assert second.wait(timeout=20) == 0
    assert "make_venv.sh: .venv is made again: it was not complete" in (maker.folder / "said").read_text()
    assert not (maker.venv / ".incomplete").exists()


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 20
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
