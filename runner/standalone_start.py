# SPDX-License-Identifier: GPL-2.0-only
"""What the one file of `make standalone` does when it is started: it unpacks itself, and runs pytest there.

It runs from within the archive, with the standard library only, and on older Pythons too, up to the message.
"""

from __future__ import annotations

import fcntl
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import zipfile
from contextlib import suppress
from types import FrameType

NAME = "dirty-tracking"
USAGE = """\
usage: dirty-tracking run [options]           the mode matrix, as `make run`: one to two minutes
       dirty-tracking test [options] [tests]  any tests, as pytest: selftests/interface, -k huge, -n 2, ...

Tests this host's KVM dirty-page tracking. It needs Python 3.11 or newer and /dev/kvm, no other package and no network.
Results go to `results` in the current folder (--results=DIR puts them elsewhere). `dirty-tracking test --help` has all
options; those for other kernels need a checkout of the suite."""
_OLDEST_PYTHON = (3, 11)
USAGE_ERROR = 4  # as pytest's
MATRIX = ["-o", "testpaths=selftests/matrix/test_dirty_log.py", "-n", "auto"]
# Modules that only some Pythons can load are here, by the Python's tag.
NATIVE = "native"


def main(arguments: list[str]) -> int:
    """Run the suite as *arguments* say; returns the exit status."""
    # Without PATH in its environment, a Python that env(1) has started does not know its own name.
    sys.executable = sys.executable or os.path.realpath("/proc/self/exe")
    if sys.version_info < _OLDEST_PYTHON:
        return _refuse("needs Python 3.11 or newer, this is {}.{}: {}".format(*sys.version_info[:2], sys.executable))
    command, *words = arguments or [""]
    if command in ("-h", "--help"):
        print(USAGE)
        return 0
    if command not in ("run", "test"):
        return _refuse(f"{command or 'nothing'}: no such command (there are run and test; --help says more)")
    if any(word.partition("=")[0] == "--kernel" for word in words):
        return _refuse("--kernel: other kernels need a checkout of the suite; this file tests the kernel of this host")
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _leave)
    try:
        with zipfile.ZipFile(_file()) as archive:
            return _run(archive, [*(MATRIX if command == "run" else []), *words])
    except KeyboardInterrupt:
        return _refuse("interrupted: nothing was tested", 128 + signal.SIGINT)
    except (OSError, zipfile.BadZipFile) as error:
        return _refuse(f"cannot unpack into {tempfile.gettempdir()}: {error} (TMPDIR=FOLDER takes another folder)")


def _run(archive: zipfile.ZipFile, words: list[str]) -> int:
    tag = sys.implementation.cache_tag
    tags = sorted({name.split("/")[1] for name in archive.namelist() if name.startswith(f"{NATIVE}/")})
    if tag not in tags:
        return _refuse(f"was built for {', '.join(tags)}, this Python is {tag}: {sys.executable}")
    _remove_strays()
    # Renamed when it is locked: what has the final name and no lock is of a run that was killed.
    folder = tempfile.mkdtemp(prefix=f"new-{NAME}-")
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        final = os.path.join(os.path.dirname(folder), os.path.basename(folder)[len("new-") :])
        os.rename(folder, final)
        folder = final
        # The assembled guest programs come last in the archive: they have to be newer than their sources.
        archive.extractall(folder, [name for name in archive.namelist() if not name.startswith(f"{NATIVE}/")])
        native = f"{NATIVE}/{tag}/"
        for name in archive.namelist():
            if name.startswith(native):
                with open(os.path.join(folder, "site", name[len(native) :]), "wb") as file:
                    file.write(archive.read(name))
        return _run_pytest(folder, words)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _run_pytest(folder: str, words: list[str]) -> int:
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PYTEST_PLUGINS"))
    }
    environment["PYTHONPATH"] = os.path.join(folder, "site")
    environment["PYTHONNOUSERSITE"] = "1"
    environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # this host's plugins may not fit this pytest
    environment["TMPDIR"] = os.path.join(folder, "tmp")
    os.mkdir(environment["TMPDIR"])
    environment["DIRTY_TRACKING_COMMAND"] = _own_command()
    environment["DIRTY_TRACKING_RESULTS"] = os.path.join(os.getcwd(), "results")
    command = [sys.executable, "-m", "runner.standalone_session", os.getcwd(), "-p", "xdist", *words]
    process = subprocess.Popen(command, cwd=folder, env=environment)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            # It ends by itself; a terminal has sent its signal to both.
            signal.signal(number, lambda number, _: process.send_signal(number))
    status = process.wait()
    return status if status >= 0 else 128 - status  # of a signal


def _own_command() -> str:
    """The command that runs tests with this file again, for the lines to paste."""
    file = os.path.join(".", sys.argv[0]) if os.sep not in sys.argv[0] else sys.argv[0]
    python = shutil.which("python3")
    runs = (
        python is not None and os.path.realpath(python) == os.path.realpath(sys.executable) and os.access(file, os.X_OK)
    )
    return " ".join([*([] if runs else [shlex.quote(sys.executable)]), shlex.quote(file), "test"])


def _remove_strays() -> None:
    """Remove the folders of this user's runs that were killed."""
    parent = tempfile.gettempdir()
    for entry in os.scandir(parent):
        if entry.name.startswith(f"{NAME}-") and entry.is_dir(follow_symlinks=False) and _is_own(entry):
            with suppress(OSError):  # another run removes it
                lock = os.open(entry.path, os.O_RDONLY | os.O_NOFOLLOW)
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails for a run that lives
                    shutil.rmtree(entry.path, ignore_errors=True)
                finally:
                    os.close(lock)


def _is_own(entry: os.DirEntry[str]) -> bool:
    with suppress(FileNotFoundError):
        return entry.stat(follow_symlinks=False).st_uid == os.getuid()
    return False


def _file() -> str:
    """This file: the archive."""
    return os.path.dirname(os.path.abspath(__file__))


def _leave(number: int, _frame: FrameType | None) -> None:
    sys.exit(128 + number)


def _refuse(text: str, status: int = USAGE_ERROR) -> int:
    sys.stderr.write(f"{NAME}: {text}\n")
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
