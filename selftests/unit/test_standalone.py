# SPDX-License-Identifier: GPL-2.0-only
"""The one file of `make standalone`, on a host that has nothing but Python."""

import fcntl
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from runner import ROOT, standalone
from selftests.unit.commands import CELLS, Done

pytestmark = pytest.mark.slow

PYTHON = os.path.realpath(sys.executable)  # not that of the virtual environment, which has the packages
NO_KVM = ["--kvm-device=/dev/null", "--require-kvm"]
ENABLING = ["selftests/interface/test_slots.py", "-k", "enabling_logging_twice"]


@dataclass
class Bare:
    """A file to run, from another folder that is the current one, with a temporary folder of its own."""

    file: Path
    folder: Path
    temporary: Path

    def command(self, *words: str) -> list[str]:
        return [PYTHON, "-I", str(self.file), *words]

    def run(self, *words: str) -> Done:
        return self.run_command(self.command(*words))

    def run_command(self, command: list[str]) -> Done:
        return subprocess.run(
            command, cwd=self.folder, env=self.environment, capture_output=True, text=True, check=False, timeout=120
        )

    @property
    def environment(self) -> dict[str, str]:
        """No PATH and no HOME."""
        return {"TMPDIR": str(self.temporary)}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("file") / "dirty-tracking"
    standalone.main(path, pythons=())
    path.parent.chmod(0o555)
    return path


@pytest.fixture
def bare(file: Path, tmp_path: Path) -> Bare:
    folder, temporary = tmp_path / "folder", tmp_path / "temporary"
    folder.mkdir()
    temporary.mkdir()
    return Bare(file, folder, temporary)


def test_file_needs_only_python(kvm: object, bare: Bare) -> None:
    """Tests run on KVM in several processes without PATH, HOME or packages; results go to the current folder, and nothing is
    left in the temporary one.
    """
    done = bare.run("test", *ENABLING, "-n2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "on this host: good: 5 passed; files: " in done.stdout
    assert [path.name for path in bare.folder.glob("results/*/results.json")] == ["results.json"]
    assert [*bare.temporary.iterdir()] == []


def test_file_without_path(bare: Bare) -> None:
    """The file runs by its first line, too, where the environment has no PATH and Python does not know its own name."""
    if os.path.realpath("/usr/bin/python3") != os.path.realpath(PYTHON):
        pytest.skip("the file is made for another Python than the system's")
    done = bare.run_command(["/usr/bin/env", "python3", str(bare.file), "test", "--version"])
    assert done.returncode == 0, done.stdout + done.stderr


def test_reproduce_line_names_the_file(bare: Bare) -> None:
    """The printed command, pasted in the same folder, shows the same failure."""
    options = ["--log-mode=dirty-log", "--guest-mode=48bit-4k", "--backing=shmem", "--stop=forced", "--vcpus=1"]
    done = bare.run("run", *options, "--density=sparse", *NO_KVM, "--seed=7", "-n0")
    assert done.returncode == 1, done.stdout + done.stderr
    (line,) = re.findall("^reproduce (.*)", done.stdout, re.MULTILINE)
    # The file itself is enough where its first line finds this Python.
    command = f"{bare.file} test --require-kvm selftests/matrix/test_dirty_log.py --log-mode dirty-log"
    assert line.startswith((command, f"{PYTHON} {command}"))
    assert "--seed 7" in line
    again = bare.run_command(["/bin/sh", "-c", line])
    assert again.returncode == 1, again.stdout + again.stderr
    assert f"reproduce {line}\n" in again.stdout


def test_signal_leaves_no_folder(kvm: object, bare: Bare) -> None:
    """A signal ends the run in order: its results are there, and the temporary folder is empty."""
    one = [*CELLS, "--log-mode=dirty-log", "--vcpus=1", "--test-mem=4M", "--iterations=1000000"]
    command = bare.command("test", *one, "--results=here")
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=bare.folder, env=bare.environment, stdout=pipe, stderr=subprocess.STDOUT) as run:
        journal, deadline = bare.folder / "here/journal.jsonl", time.monotonic() + 60
        while not (journal.exists() and '"start"' in journal.read_text()):
            assert time.monotonic() < deadline and run.poll() is None
            time.sleep(0.1)
        run.send_signal(signal.SIGTERM)
        output, _ = run.communicate(timeout=60)
    assert run.returncode == 2, output.decode()
    assert "the run was interrupted (SIGTERM)" in (bare.folder / "here/results.json").read_text()
    assert [*bare.temporary.iterdir()] == []


def test_folders_of_killed_runs(bare: Bare) -> None:
    """The folder of a run that was killed is removed by the next one; that of a run that lives stays, and so do others'."""
    dead, lives, other = (bare.temporary / name for name in ("dirty-tracking-dead", "dirty-tracking-lives", "other"))
    for path in (dead, lives, other):
        path.mkdir()
        (path / "conftest.py").touch()
    lock = os.open(lives, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    try:
        assert bare.run("test", "--version").returncode == 0
    finally:
        os.close(lock)
    assert sorted(bare.temporary.iterdir()) == [lives, other]


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ([], "dirty-tracking: nothing: no such command (there are run and test; --help says more)"),
        (["check"], "dirty-tracking: check: no such command (there are run and test; --help says more)"),
        (["test", "--kernel=debian:6.12"], "dirty-tracking: --kernel: other kernels need a checkout of the suite; "),
        (["run", "--log-mode=x"], "ERROR: --log-mode: no such value: 'x' (choose from "),
        (["test", "nothing"], "ERROR: file or directory not found: nothing"),
    ],
    ids=["nothing", "command", "kernel", "value", "test"],
)
def test_bad_input_is_one_line(bare: Bare, words: list[str], error: str) -> None:
    """Bad input is one line and pytest's status for it."""
    done = bare.run(*words)
    assert done.returncode == 4
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith(error)
    assert [*bare.temporary.iterdir()] == []


def test_steps_of_the_lava_recipe(kvm: object, bare: Bare, tmp_path: Path) -> None:
    """The steps in docs/ci.md make a test case with its result of each test, and one of the run."""
    (steps,) = re.findall(r"^ +steps:\n((?: {14}.*\n)+)", (ROOT / "docs/ci.md").read_text(), re.MULTILINE)
    script = re.sub(r"^ *(- \|\n|- )?", "", steps, flags=re.MULTILINE)
    programs = tmp_path / "programs"
    programs.mkdir()
    for name, text in (("wget", f"cp {bare.file} dirty-tracking"), ("lava-test-case", 'echo "$@" >>cases')):
        (programs / name).write_text(f"#!/bin/sh\n{text}\n")
        (programs / name).chmod(0o755)
    environment = bare.environment | {"PATH": f"{programs}:{os.environ['PATH']}", "TESTS": " ".join(ENABLING)}
    done = subprocess.run(
        ["sh", "-ec", script], cwd=bare.folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    cases = (bare.folder / "cases").read_text().splitlines()
    name = "selftests/interface/test_slots.py__test_enabling_logging_twice_"
    assert len([case for case in cases if case.startswith(name) and case.endswith(" --result pass")]) == 5
    assert cases[-1] == "the_run --result pass"


def test_help_of_the_file(bare: Bare) -> None:
    """--help says what the file does."""
    done = bare.run("--help")
    assert done.returncode == 0
    assert done.stdout.startswith("usage: dirty-tracking run [options]")


def test_same_tree_makes_the_same_file(file: Path, tmp_path: Path) -> None:
    """A second build has the same bytes."""
    standalone.main(tmp_path / "again", pythons=())
    assert (tmp_path / "again").read_bytes() == file.read_bytes()
