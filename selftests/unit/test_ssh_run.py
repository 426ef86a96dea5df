# SPDX-License-Identifier: GPL-2.0-only
"""Runs on other hosts by ssh, against an sshd of the test's own; the host is this one, and the file a small program."""

import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from runner import ROOT, ssh_run
from runner.errors import CANNOT_TEST

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.geteuid() != 0, reason="an sshd of its own accepts logins only if it runs as root"),
    pytest.mark.skipif(
        not (Path("/usr/sbin/sshd").exists() and shutil.which("ssh")),
        reason="no sshd or no ssh (apt install openssh-client openssh-server)",
    ),
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


_PRIVILEGE_SEPARATION = Path("/run/sshd")  # sshd's own empty folder, which its service makes


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
        _PRIVILEGE_SEPARATION.mkdir(exist_ok=True)
        self._process = subprocess.Popen(["/usr/sbin/sshd", "-D", "-e", "-f", str(server)], stderr=subprocess.PIPE)
        self._errors = self._process.stderr
        assert self._errors is not None
        assert b"listening" in self._errors.readline()

    def sessions(self) -> list[int]:
        """The processes that serve connections."""
        pid = self._process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children")
        return [int(child) for child in children.read_text().split()] if children.exists() else []

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
    :param limit: in seconds, after which it counts as hung
    :ivar there: where its folder on the host is
    """

    def __init__(self, folder: Path, seconds: float = 0, status: int = 0, prepare: str = "", limit: str = "60") -> None:
        file = folder / "file"
        journal = "".join(json.dumps(record) + "\n" for record in JOURNAL)
        file.write_text(FILE.format(seconds=seconds, status=status, journal=journal))
        self.results, self.there = folder / "results", folder / "there"
        self.there.mkdir()
        code = f"import sys\nfrom runner import ssh_run\nssh_run.PLACE = {str(self.there)!r}\n{prepare}\n"
        code += "sys.exit(ssh_run.main(sys.argv[1:]))"
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, "somehost", str(file), str(self.results), limit, "test", "-k", "a b"],
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


def test_status_that_is_not_pytests(tmp_path: Path, sshd: Sshd) -> None:
    """A run that ended on the host with a status that pytest does not have, as one that was killed, is no verdict."""
    run = Remote(tmp_path, status=137)
    run.wait_for_begin()
    assert run.end() == (CANNOT_TEST, "cannot be tested: it ended there with status 137")


def answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, results: bytes) -> int:
    """Run against an ssh that answers a login with a greeting, the run with status 1, and the fetch with *results*."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "data").write_bytes(results)
    script = f"""#!/bin/sh
for last; do :; done
echo "Welcome to a b"
case $last in
*mktemp*) cat >/dev/null; echo dirty-tracking-is-in /there; echo some-boot-id ;;
*tarfile*) echo dirty-tracking-is-in; cat {tmp_path}/data ;;
*boot_id*) echo some-boot-id ;;
*./file*) exit 1 ;;
esac
"""
    (tmp_path / "bin/ssh").write_text(script)
    (tmp_path / "bin/ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    return ssh_run.main(["host", str(tmp_path / "data"), str(tmp_path / "results"), "60", "run"])


def tar(members: Mapping[str, str]) -> bytes:
    """A tar file of regular files, and of symbolic links where the content begins with ``->``."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, text in members.items():
            member = tarfile.TarInfo(name)
            if text.startswith("->"):
                member.type, member.linkname = tarfile.SYMTYPE, text[2:]
            else:
                member.size = len(text)
            archive.addfile(member, io.BytesIO(text.encode()))
    return buffer.getvalue()


def test_odd_results_of_a_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only regular files below the results come here, whatever the host sends, and a greeting at its login does no harm."""
    members = {
        "results/a": "text",
        "results/link": "->/nowhere",
        "/results/b": "x",
        "results/../c": "x",
        "other/d": "x",
    }
    assert answer(tmp_path, monkeypatch, tar(members)) == 1
    assert [(path.name, path.read_text()) for path in (tmp_path / "results").rglob("*")] == [("a", "text")]


def test_results_that_are_cut_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Results that arrive in part make no verdict."""
    assert answer(tmp_path, monkeypatch, tar({"results/a": "text" * 1000})[:50]) == CANNOT_TEST
    assert capsys.readouterr().out.splitlines()[-1].startswith("cannot be tested: its results did not arrive: ")


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
        (signal.SIGKILL, "ssh_run.RemoteHost.has_rebooted = lambda host, given_up: True", "the host rebooted"),
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
    assert what == "the host rebooted" or (run.results / "ended").exists()
    assert [*run.there.iterdir()] == []


@pytest.mark.slow
@pytest.mark.parametrize("stuck", [False, True])
def test_run_that_hangs_on_its_host(tmp_path: Path, sshd: Sshd, stuck: bool) -> None:
    """A run of which no test ends in time is ended, and reported with its test; so is one that is stuck and cannot end."""
    run = Remote(tmp_path, seconds=60, limit="10")  # the run may take seconds to begin
    run.wait_for_begin()
    (running,) = run.there.glob("*/running")
    there = int(running.read_text())
    if stuck:
        os.kill(there, signal.SIGSTOP)
    try:
        status, line = run.end()
    finally:
        if stuck:
            os.kill(there, signal.SIGCONT)
    assert status == CANNOT_TEST
    what = "no test ended within 10 s while selftests/interface/test_slots.py::test_x ran"
    assert line == f"cannot be tested: {what}"
    assert (run.results / "ended").exists() == (not stuck)


@pytest.mark.parametrize(
    ("printed", "ends"),
    [(b"[ 5%]", True), (b"# x\nok 3 x\n", True), (b"not ok 3 x", True), (b"it is ok 3 times", False)],
    ids=["percentage", "ktap", "failure-in-ktap", "other-output"],
)
def test_ends_of_tests_keep_a_run_going(monkeypatch: pytest.MonkeyPatch, printed: bytes, ends: bool) -> None:
    """A run that lasts longer than the limit is not hung while its tests end; other output does not count."""
    reader, writer = os.pipe()
    now, left = 0.0, [printed] * 3

    def select(outputs: list[Any], _writing: object, _failed: object, timeout: float) -> tuple[list[Any], ...]:
        nonlocal now
        now += 6
        if left:
            os.write(writer, left.pop())
        else:
            os.close(writer)
        return (outputs if timeout >= 6 else [], [], [])

    monkeypatch.setattr("select.select", select)
    monkeypatch.setattr("time.monotonic", lambda: now)
    with open(reader, "rb") as output:
        assert ssh_run._show(output, 10) == ends
    if not ends:
        os.close(writer)


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
    assert line.startswith("cannot be tested: the connection was lost, and the host no longer answers: ssh: connect")


def test_file_that_cannot_be_read(tmp_path: Path) -> None:
    """A file that is not there is one line."""
    assert ssh_run.main(["host", str(tmp_path / "none"), str(tmp_path), "60", "run"]) == CANNOT_TEST
