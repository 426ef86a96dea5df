# SPDX-License-Identifier: GPL-2.0-only
"""Signals that end a run: it stops where it is, and shows and keeps what was done."""

import errno
import os
import signal
import subprocess
import termios
import time
from collections.abc import Generator
from contextlib import suppress
from types import FrameType
from typing import Any

import pytest

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_PATIENCE = 5  # seconds for the end, in which Ctrl-C gives up nothing
_ENDS_ALREADY = f"\nthe run ends already, and writes its results; Ctrl-C after {_PATIENCE} s gives them up\n"


class Interruption:
    """The first of SIGINT, SIGTERM and SIGHUP ends the run as Ctrl-C does; those that follow do not break into its end.

    A closed terminal sends several, and so do ``timeout`` and make. Only who presses Ctrl-C for long wants no results.

    :ivar name: of the first signal; None when there was none
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self._began = 0.0
        self._ending = False
        self._workers: dict[str, subprocess.Popen[bytes]] = {}

    def heed(self) -> None:
        """Have the signals handled, but for those that whoever started the run has ignored (``nohup``, ``&``)."""
        for number in _SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGHUP:
            _leave_closed_terminal()
        if self.name is None:
            self.name, self._began = signal.Signals(number).name, time.monotonic()
            if not self._ending:
                raise KeyboardInterrupt(self.name)
        elif number == signal.SIGINT:
            if time.monotonic() > self._began + _PATIENCE:
                os._exit(128 + number)
            with suppress(OSError):  # of a terminal that has closed
                os.write(2, _ENDS_ALREADY.encode())

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionstart(self) -> None:
        """Have Ctrl-C wait until xdist's workers are started: it would end them in tracebacks of their imports."""
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # which they inherit, see heed_once_in_worker()

    @pytest.hookimpl(wrapper=True)
    def pytest_collection(self) -> Generator[None, object, object]:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        return (yield)

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodeready(self, node: Any) -> None:
        if process := process_of(node):
            self._workers[node.gateway.id] = process

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        self._workers.pop(node.gateway.id, None)

    @pytest.hookimpl(trylast=True)
    def pytest_unconfigure(self) -> None:
        """Ignore what still comes: as Python ends it sets signals back to what they do by default, and that kills."""
        if self.name is not None:
            for number in _SIGNALS:
                signal.signal(number, signal.SIG_IGN)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_sessionfinish(self) -> Generator[None, object, object]:
        """From here on a signal would break into what writes the files, and ends nothing sooner."""
        self._ending = True
        return (yield)

    @pytest.hookimpl(tryfirst=True)
    def pytest_keyboard_interrupt(self, excinfo: pytest.ExceptionInfo[BaseException]) -> None:
        """Interrupt the workers too: a signal to this process alone would leave them in their tests for ten seconds."""
        excinfo.value.__dict__.pop("__notes__", None)  # where a vCPU was is of no interest then
        for process in self._workers.values():
            process.send_signal(signal.SIGINT)


def _leave_closed_terminal() -> None:
    """Let what is still written to a terminal that is closed go nowhere: its errors would end the run before its files."""
    nowhere = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    for name in os.listdir("/proc/self/fd"):
        try:
            termios.tcgetattr(int(name))
        except termios.error as error:
            if error.args[0] == errno.EIO:
                os.dup2(nowhere, int(name))
    os.close(nowhere)


def process_of(worker: Any) -> "subprocess.Popen[bytes] | None":
    """The process of a worker; None for one on another machine."""
    # execnet keeps its child to itself (Popen2IOMaster, execnet/gateway_io.py).
    process: subprocess.Popen[bytes] | None = getattr(worker.gateway._io, "popen", None)
    return process


def heed_once_in_worker() -> None:
    """Have a worker heed SIGINT from now on; one that came before ends it at once: it has nothing to report yet."""
    if signal.SIGINT in signal.sigpending():
        os._exit(128 + signal.SIGINT)
    signal.signal(signal.SIGINT, _heed_once)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def _heed_once(number: int, frame: FrameType | None) -> None:
    """A worker's handler of SIGINT, which comes from the terminal and from its controller."""
    signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt
