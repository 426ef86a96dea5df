# SPDX-License-Identifier: GPL-2.0-only
"""Runs commands as a user would: in a folder, in a terminal or a pipe, and pytest with a plugin that plants a fault."""

import fcntl
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from runner import ROOT

Done = subprocess.CompletedProcess[str]

# Options of a small run, of cells that differ in log mode and number of vCPUs, and of one cell
QUICK = ["--test-mem=4M", "--iterations=2", "--interval=1", "--ring-count=1024"]
CELLS = [
    "selftests/matrix/test_dirty_log.py",
    "--guest-mode=48bit-4k",
    "--backing=anonymous",
    "--stop=forced",
    "--density=sparse",
]
ONE_CELL = [*CELLS, "--log-mode=dirty-log", "--vcpus=1"]


def start(command: list[str], folder: Path, **environment: str) -> Done:
    """Run *command* in *folder*, without the variables of the environment that configure make or the suite."""
    ours = (
        "KERNEL",
        "KVM_PARAMS",
        "MAKEFLAGS",
        "MAKELEVEL",
        "PYTHON",
        "WORKERS",
        "ARGS",
        "MATRIX",
        "C_TEST",
        "RUNS",
        "OUTPUT",
        "BUG",
        "RESULTS",
        "HOSTS",
    )
    clean = {name: value for name, value in os.environ.items() if name not in ours}
    return subprocess.run(
        command, cwd=folder, env=clean | environment, capture_output=True, text=True, check=False, timeout=60
    )


def pytest_command(folder: Path, plugin: str = "") -> tuple[list[str], dict[str, str]]:
    """The start of a command line of pytest that loads *plugin*, the text of a module, and its environment.

    Its results go to ``results`` in *folder*.
    """
    folder.mkdir(exist_ok=True)
    (folder / "under_test.py").write_text(plugin)
    command = [sys.executable, "-m", "pytest", "-p", "under_test", f"--results={folder}/results"]
    return command, os.environ | {"PYTHONPATH": f"{folder}:{ROOT / 'lib'}", "TERM": "xterm"}


@contextmanager
def running(
    command: list[str], environment: dict[str, str], output: int, own_terminal: bool = True
) -> Iterator["subprocess.Popen[bytes]"]:
    """Start *command* in a process group of its own, which is killed at the end.

    :param output: a terminal, a pipe or a file; it is closed here
    :param own_terminal: if *output* is a terminal, make it the command's controlling one, which sends signals
    """

    def prepare() -> None:
        for number in (signal.SIGINT, signal.SIGHUP):  # a shell may ignore them for background jobs
            signal.signal(number, signal.SIG_DFL)
        if own_terminal and os.isatty(output):
            fcntl.ioctl(output, termios.TIOCSCTTY, 0)

    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdin=output, stdout=output, stderr=output, start_new_session=True,
        preexec_fn=prepare,
    )  # fmt: skip
    os.close(output)
    with process:
        try:
            yield process
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def open_terminal(rows: int = 24, columns: int = 80) -> tuple[int, int]:
    """A pseudo terminal: our side, and the side that programs use."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    return ours, theirs


def read(source: int, seconds: float = 60) -> Generator[str, None, None]:
    """Read a terminal or a pipe to its end and close it; fails the test after *seconds*."""
    deadline = time.monotonic() + seconds
    try:
        while select.select([source], [], [], max(deadline - time.monotonic(), 0))[0]:
            try:
                data = os.read(source, 1 << 16)
            except OSError:  # EIO: the terminal has no user any more
                return
            if not data:
                return
            yield data.decode(errors="replace")
        pytest.fail(f"it did not end within {seconds} s")
    finally:
        os.close(source)
