# SPDX-License-Identifier: GPL-2.0-only
"""ssh_run.py HOST FILE FOLDER LIMIT run|test [options]: runs FILE (`make standalone`) on HOST; its results go to FOLDER.

HOST is what ssh takes: a name of ~/.ssh/config, user@name, or ssh://user@name:port. The run counts as hung if no test ends in
LIMIT seconds. The exit status is as of check_kernel.py.
"""

import io
import os
import re
import select
import shlex
import signal
import subprocess
import sys
import tarfile
import time
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import IO, BinaryIO, NoReturn

if __name__ == "__main__":
    # Python puts the program's own folder there.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    from runner.unmet import leave, unmet

    if reason := unmet():
        leave(reason, 128)

import pytest

from harness.journal import JournalError, read
from runner.check_kernel import STATUSES
from runner.errors import CANNOT_TEST, CannotTest
from runner.kernel_runs import PERCENTAGE

# What pytest prints at the end of a test, and with --ktap
_END_OF_TEST = re.compile(rf"{PERCENTAGE.pattern}|^(?:not )?ok \d", re.MULTILINE)
# No question is asked, and a host that does not answer for half a minute is lost.
OPTIONS = ("BatchMode=yes", "ConnectTimeout=15", "ServerAliveInterval=10", "ServerAliveCountMax=3")
RECONNECT = 120.0  # seconds within which a host that was lost may come back, with what it has on disk
_PAUSE = 2.0  # seconds between two tries
_SSH_FAILED = 255  # ssh's exit status for its own errors; FILE has no such status
_BOOT_ID = "cat /proc/sys/kernel/random/boot_id"
_MARK = "dirty-tracking-is-in"  # before what is read: a login may print text of its own
PLACE = "/var/tmp"  # of the folder there: it outlives a reboot
_UPLOAD = (
    f'umask 077 && cd "$(mktemp -d {{}}/dirty-tracking.XXXXXX)" && cat >file && echo {_MARK} "$(pwd)" && {_BOOT_ID}'
)
# The run ends when the connection does: then there is no more to read.
_RUN = """\
cd {folder} || exit
exec 3<&0
python3 ./file {words} </dev/null 3<&- &
run=$!
echo $run >running
{{ cat <&3; kill -TERM $run; }} >/dev/null 2>&1 &
wait $run
status=$?
rm running
kill $!
exit $status
"""
# A connection that is lost without a word ends nothing there. What is stuck in the kernel does not end at all.
_END = """\
cd {folder} && if [ -e running ]; then
    kill -TERM "$(cat running)"
    for _ in 1 2 3 4 5 6 7 8 9 10; do [ ! -e running ] || sleep 1; done
fi
"""
_FETCH = """\
cd {folder} && mkdir -p results && echo {mark} && python3 -c 'import sys, tarfile
with tarfile.open(fileobj=sys.stdout.buffer, mode="w|gz") as archive:
    archive.add("results")'
"""


class Lost(Exception):
    """The connection was lost, or a command of this program failed on the host; the text says how."""


class RemoteHost:
    """A host that ssh reaches as *name*."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._folder = self._boot = ""

    def upload(self, file: Path) -> None:
        """Copy *file* into a new folder there.

        :raises Lost: that failed
        """
        with file.open("rb") as source:
            answer = self._call(_UPLOAD.format(PLACE), source).partition(f"{_MARK} ".encode())[2]
        self._folder, self._boot = answer.decode().split()

    def run(self, words: list[str], limit: float, started: Callable[["subprocess.Popen[bytes]"], None]) -> int:
        """Run the file with *words*, with its output on standard output; returns its exit status.

        :param limit: the most seconds without the end of a test
        :param started: is given the process, which ends early when its standard input is closed
        :raises Lost: the connection was lost, or the run has hung
        """
        command, pipe = self._command(_RUN.format(folder=self._folder, words=shlex.join(words))), subprocess.PIPE
        # A terminal's Ctrl-C is for this process, which closes the standard input.
        with subprocess.Popen(command, stdin=pipe, stdout=pipe, start_new_session=True) as process:
            started(process)
            assert process.stdout is not None
            hung = not _show(process.stdout, limit)
            if hung:
                process.kill()
            status = process.wait()
        if hung or status == _SSH_FAILED:
            print(flush=True)  # what it printed last may be a part of a line
            raise Lost(f"no test ended within {limit:g} s" if hung else "the connection was lost")
        return status

    def end_run(self) -> None:
        """End what still runs there.

        :raises Lost: the connection was lost
        """
        self._call(_END.format(folder=self._folder))

    def fetch(self, folder: Path) -> None:
        """Copy the results into *folder*: all regular files.

        :raises Lost: that failed
        """
        data = self._call(_FETCH.format(folder=self._folder, mark=_MARK)).partition(f"{_MARK}\n".encode())[2]
        try:
            with tarfile.open(fileobj=io.BytesIO(data), mode="r:gz") as archive:
                for member in archive:
                    path = PurePosixPath(member.name)
                    content = archive.extractfile(member) if member.isfile() else None
                    if content is not None and path.parts[0] == "results" and ".." not in path.parts:
                        target = folder.joinpath(*path.parts[1:])
                        target.parent.mkdir(parents=True, exist_ok=True)
                        target.write_bytes(content.read())
        except (tarfile.TarError, EOFError, zlib.error) as error:
            raise Lost(f"its results did not arrive: {error}") from None

    def remove(self) -> None:
        """Remove the folder there, if the host answers."""
        if self._folder:
            with suppress(Lost):
                self._call(f"rm -rf {self._folder}")

    def has_rebooted(self, given_up: Callable[[], bool]) -> bool:
        """Whether it has booted since the upload; waits until it answers, RECONNECT seconds at most.

        :param given_up: whether to wait no longer
        :raises Lost: it does not answer
        """
        end = time.monotonic() + RECONNECT
        while True:
            try:
                return self._boot not in self._call(_BOOT_ID).decode().split()
            except Lost:
                if time.monotonic() > end or given_up():
                    raise
                time.sleep(_PAUSE)

    def _call(self, script: str, source: BinaryIO | None = None) -> bytes:
        done = subprocess.run(
            self._command(script),
            stdin=source or subprocess.DEVNULL,
            capture_output=True,
            start_new_session=True,
            check=False,
        )
        if done.returncode:
            lines = done.stderr.decode(errors="replace").strip().splitlines()
            raise Lost(lines[-1] if lines else f"ssh ended with status {done.returncode}")
        return done.stdout

    def _command(self, script: str) -> list[str]:
        return ["ssh", "-T", *(f"-o{option}" for option in OPTIONS), "--", self._name, script]


def _show(output: IO[bytes], limit: float) -> bool:
    """Copy *output* to standard output; returns whether it has ended, rather than no test within *limit* seconds."""
    until = time.monotonic() + limit
    while select.select([output], [], [], max(until - time.monotonic(), 0))[0]:
        data = os.read(output.fileno(), 1 << 16)
        if not data:
            return True
        sys.stdout.buffer.write(data)
        sys.stdout.flush()
        if _END_OF_TEST.search(data.decode(errors="replace")):
            until = time.monotonic() + limit
    return False


class _Signals:
    """Ends the run on the host when this process gets a signal that ends programs; what it has done is still fetched."""

    def __init__(self) -> None:
        self.came = False
        self._process: subprocess.Popen[bytes] | None = None
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._note)

    def started(self, process: "subprocess.Popen[bytes]") -> None:
        """The run has begun."""
        self._process = process
        self._end()

    def _note(self, _number: int, _frame: object) -> None:
        self.came = True
        self._end()

    def _end(self) -> None:
        if self.came and self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()


def main(arguments: list[str]) -> int:
    """Run the file on the host; returns the exit status."""
    name, file, folder, limit, *words = arguments
    host, signals, results = RemoteHost(name), _Signals(), Path(folder)
    try:
        host.upload(Path(file))
        try:
            status = host.run([*words, "--results=results"], float(limit), signals.started)
            host.fetch(results)
        except Lost as error:
            _explain_loss(host, results, str(error), signals)
        finally:
            host.remove()
    except (Lost, CannotTest, OSError, ValueError) as error:
        print(f"cannot be tested: {error}", flush=True)
        return CANNOT_TEST
    if signals.came:
        return STATUSES[pytest.ExitCode.INTERRUPTED]
    if status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, *STATUSES):
        print(f"cannot be tested: it ended there with status {status}", flush=True)
        return CANNOT_TEST
    return CANNOT_TEST if status == pytest.ExitCode.NO_TESTS_COLLECTED else STATUSES.get(status, status)


def _explain_loss(host: RemoteHost, results: Path, error: str, signals: _Signals) -> NoReturn:
    """Fetch what a host that was lost has kept.

    :raises CannotTest: always; it says what is known
    """
    try:
        rebooted = host.has_rebooted(lambda: signals.came)
    except Lost as why:
        raise CannotTest(f"{error}, and the host no longer answers: {why}") from None
    what = "the host rebooted" if rebooted else error
    running = ""
    with suppress(Lost, JournalError, OSError):
        host.fetch(results)
        running = ", ".join(read(results).running)
    if not rebooted:
        with suppress(Lost):
            host.end_run()
            host.fetch(results)  # with what it has written at its end
    raise CannotTest(f"{what}{f' while {running} ran' if running else ''}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
