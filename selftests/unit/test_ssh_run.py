# SPDX-License-Identifier: GPL-2.0-only
"""Runs on other hosts by ssh, against an sshd of the test's own; the host is this one, and the file a small program."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from runner import ROOT, ssh_run
from runner.errors import CANNOT_TEST

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.geteuid() != 0, reason="an sshd of its own accepts logins only if it runs as root"),
    pytest.mark.skipif(not Path("/usr/sbin/sshd").exists(), reason="no sshd (apt install openssh-server)"),
]

# What stands for the one file: it writes results, and then does as the test says.
FILE = """
import pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[-1].partition("=")[2])
folder.mkdir()
(folder / "sub").mkdir()
(folder / "sub/console.log").write_text("text")
(folder / "journal.jsonl").write_text({journal!r})
def end(number, frame):
    (folder / "ended").write_text("in order")
    sys.exit(2)
signal.signal(signal.SIGTERM, end)
print("words:", *sys.argv[1:-1], flush=True)
time.sleep({seconds})
sys.exit({status})
"""
JOURNAL = [
    {
        "run": {
            "label": "6.12", "suite": "1", "host": {"parameters": {}}, "folder": ".", "arguments": [], "addopts": "",
            "seed": "1", "plan": [],
        }
    },
    {"boot": "x", "taint": 0},
    {"start": "selftests/interface/test_slots.py::test_x", "taint": 0},
]  # fmt: skip


class Sshd:
    """An sshd on a port of its own, and a client that logs in there whatever the host's name is."""

    def __init__(self, folder: Path) -> None:
        for name in ("host", "user"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        server, client = folder / "sshd_config", folder / "ssh_config"
        server.write_text(
            f"Port {port}\nListenAddress 127.0.0.1\nHostKey {folder}/host\nAuthorizedKeysFile {folder}/user.pub\n"
            "StrictModes no\nPidFile none\nUsePAM no\nPermitRootLogin yes\n"
        )
        client.write_text(
            f"Host *\nHostName 127.0.0.1\nPort {port}\nIdentityFile {folder}/user\nUserKnownHostsFile /dev/null\n"
            "StrictHostKeyChecking no\nLogLevel ERROR\n"
        )
        self.bin = folder / "bin"
        self.bin.mkdir()
        (self.bin / "ssh").write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {client} "$@"\n')
        (self.bin / "ssh").chmod(0o755)
        Path("/run/sshd").mkdir(exist_ok=True)  # sshd's own, which a package's service makes
        self._process = subprocess.Popen(["/usr/sbin/sshd", "-D", "-e", "-f", str(server)], stderr=subprocess.PIPE)
        self._errors = self._process.stderr
        assert self._errors is not None
        assert b"listening" in self._errors.readline()

    def sessions(self) -> list[int]:
        """The processes that serve connections."""
        parent = str(self._process.pid)
        done = subprocess.run(["pgrep", "-P", parent], capture_output=True, text=True, check=False)
        return [int(pid) for pid in done.stdout.split()]

    def close(self) -> None:
        for pid in self.sessions():
            os.kill(pid, signal.SIGCONT)
        self._process.kill()
        self._process.wait()
        assert self._errors is not None
        self._errors.close()


@pytest.fixture
def sshd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Sshd]:
    (tmp_path / "sshd").mkdir()
    server = Sshd(tmp_path / "sshd")
    monkeypatch.setenv("PATH", f"{server.bin}:{os.environ['PATH']}")
    yield server
    server.close()


class Remote:
    """A run of ssh_run.py in a process of its own.

    :param prepare: Python that changes the module ``ssh_run`` before
    :ivar there: where its folder on the host is
    """

    def __init__(self, folder: Path, seconds: float = 0, status: int = 0, prepare: str = "") -> None:
        file = folder / "file"
        journal = "".join(json.dumps(record) + "\n" for record in JOURNAL)
        file.write_text(FILE.format(seconds=seconds, status=status, journal=journal))
        self.results, self.there = folder / "results", folder / "there"
        self.there.mkdir()
        code = f"import sys\nfrom runner import ssh_run\nssh_run.PLACE = {str(self.there)!r}\n{prepare}\n"
        code += "sys.exit(ssh_run.main(sys.argv[1:]))"
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, "somehost", str(file), str(self.results), "test", "-k", "a b"],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT,
            env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'lib'}"},
        )  # fmt: skip

    def wait_for_begin(self) -> None:
        """Wait until the file runs."""
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "words: test -k a b\n"

    def end(self) -> tuple[int, str]:
        """The exit status, and the last line of the output."""
        output = self.process.communicate(timeout=60)[0]
        return self.process.returncode, output.strip().splitlines()[-1] if output.strip() else ""


@pytest.mark.parametrize(("there", "here"), [(0, 0), (4, 128), (5, CANNOT_TEST)], ids=["good", "usage", "no-kvm"])
def test_results_of_another_host(tmp_path: Path, sshd: Sshd, there: int, here: int) -> None:
    """The results come here with all files, nothing is left there, and the exit status is as of a kernel that was checked."""
    run = Remote(tmp_path, status=there)
    run.wait_for_begin()
    assert run.end()[0] == here
    assert (run.results / "sub/console.log").read_text() == "text"
    assert [*run.there.iterdir()] == []


def test_host_that_does_not_answer(tmp_path: Path, sshd: Sshd) -> None:
    """A host that ssh does not reach cannot be tested, for ssh's reason."""
    sshd.close()
    status, line = Remote(tmp_path).end()
    assert status == CANNOT_TEST
    assert line.startswith("cannot be tested: ssh: connect to host 127.0.0.1 port ")
    assert line.endswith(": Connection refused")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_ends_the_run_there(tmp_path: Path, sshd: Sshd, number: int) -> None:
    """A signal ends the run on the host in order, and what it has done is fetched."""
    run = Remote(tmp_path, seconds=60)
    run.wait_for_begin()
    run.process.send_signal(number)
    assert run.end()[0] == 130
    assert (run.results / "ended").read_text() == "in order"
    assert [*run.there.iterdir()] == []


@pytest.mark.parametrize(
    ("how", "prepare", "what"),
    [
        (signal.SIGKILL, "", "the connection was lost"),
        (
            signal.SIGSTOP,
            "ssh_run.OPTIONS = ('ServerAliveInterval=1', 'ServerAliveCountMax=1')",
            "the connection was lost",
        ),
        (signal.SIGKILL, "ssh_run.RemoteHost.has_rebooted = lambda host: True", "the host rebooted"),
    ],
    ids=["dead", "hung", "rebooted"],
)
def test_host_lost_during_its_run(tmp_path: Path, sshd: Sshd, how: int, prepare: str, what: str) -> None:
    """If the connection is lost, the run says so, and in which test, and what the host has kept is fetched."""
    run = Remote(tmp_path, seconds=60, prepare=prepare)
    run.wait_for_begin()
    for pid in sshd.sessions():
        os.kill(pid, how)
    status, line = run.end()
    assert status == CANNOT_TEST
    assert line == f"cannot be tested: {what} while selftests/interface/test_slots.py::test_x ran"
    assert (run.results / "journal.jsonl").exists()
    assert [*run.there.iterdir()] == []


def test_host_that_stays_away(tmp_path: Path, sshd: Sshd) -> None:
    """A host that does not come back in time is reported, with ssh's reason."""
    run = Remote(tmp_path, seconds=60, prepare="ssh_run.RECONNECT = ssh_run._PAUSE = 0.5")
    run.wait_for_begin()
    sessions = sshd.sessions()
    sshd.close()
    for pid in sessions:
        os.kill(pid, signal.SIGKILL)
    status, line = run.end()
    assert status == CANNOT_TEST
    assert line.startswith(
        "cannot be tested: the connection was lost, and the host does not answer any more: ssh: connect"
    )


def test_file_that_cannot_be_read(tmp_path: Path) -> None:
    """A file that is not there is one line."""
    assert ssh_run.main(["host", str(tmp_path / "none"), str(tmp_path), "run"]) == CANNOT_TEST
