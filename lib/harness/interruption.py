# SPDX-License-Identifier: GPL-2.0-only
"""Signals that end a run. The run stops where it is, and still prints its summary and writes its files."""

import os
import signal
import subprocess
import time
from collections.abc import Generator
from contextlib import suppress
from types import FrameType
from typing import Any

import pytest

from runner.live_lines import detach_closed_terminals

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_PATIENCE = 5  # seconds after the first signal in which another Ctrl-C does not discard the results
_ENDS_ALREADY = f"\nthe run is ending and writing its results; Ctrl-C after {_PATIENCE} s discards them\n"


class Interruption:
    """A pytest plugin by which the first SIGINT, SIGTERM or SIGHUP ends the run as Ctrl-C does.

    Later signals do not disturb the end of the run: a closing terminal, ``timeout`` and make all send several. Only a Ctrl-C
    that comes more than ``_PATIENCE`` seconds after the first signal exits at once.

    :ivar name: of the first signal; None if there was none
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self._began = 0.0
        self._ending = False
        self._workers: dict[str, subprocess.Popen[bytes]] = {}

    def install_handlers(self) -> None:
        """Install the signal handlers, except for signals that are ignored from the start (``nohup``, ``&``)."""
        for number in _SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGHUP:
            detach_closed_terminals()
        if self.name is None:
            self.name, self._began = signal.Signals(number).name, time.monotonic()
            if not self._ending:
                raise KeyboardInterrupt(self.name)
        elif number == signal.SIGINT:
            if time.monotonic() > self._began + _PATIENCE:
                os._exit(128 + number)
            with suppress(OSError):  # the terminal is closed
                os.write(2, _ENDS_ALREADY.encode())

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionstart(self) -> None:
        """Block SIGINT until xdist's workers are started: it would make them print tracebacks of their imports."""
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # workers inherit this: handle_sigint_in_worker()

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
        """Ignore further signals: Python restores the default actions when it exits, and those would kill it."""
        if self.name is not None:
            for number in _SIGNALS:
                signal.signal(number, signal.SIG_IGN)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_sessionfinish(self) -> Generator[None, object, object]:
        """From now on a first signal is only recorded: an exception would interrupt the writing of the files."""
        self._ending = True
        return (yield)

    @pytest.hookimpl(tryfirst=True)
    def pytest_keyboard_interrupt(self, excinfo: pytest.ExceptionInfo[BaseException]) -> None:
        """Interrupt the workers too: after a signal to this process alone they would continue for ten seconds."""
        excinfo.value.__dict__.pop("__notes__", None)  # the state of the vCPUs does not matter here
        for process in self._workers.values():
            process.send_signal(signal.SIGINT)


def process_of(worker: Any) -> "subprocess.Popen[bytes] | None":
    """The process of an xdist worker; None for a worker on another machine."""
    # execnet has no public access to it (Popen2IOMaster, execnet/gateway_io.py).
    process: subprocess.Popen[bytes] | None = getattr(worker.gateway._io, "popen", None)
    return process


def handle_sigint_in_worker() -> None:
    """Handle SIGINT in an xdist worker from now on. If one is pending, exit: the worker has nothing to report yet."""
    if signal.SIGINT in signal.sigpending():
        os._exit(128 + signal.SIGINT)
    signal.signal(signal.SIGINT, _interrupt_once)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def _interrupt_once(number: int, frame: FrameType | None) -> None:
    """A worker's SIGINT handler; ignores further ones, since the terminal and the controller each send one."""
    signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt
