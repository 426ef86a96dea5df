# SPDX-License-Identifier: GPL-2.0-only
"""Runs the tests that the host assigns to this booted kernel, in place of all that were collected (remote.py)."""

import termios

import pytest

# What the host writes in place of a test's number: no more tests are to come; do not even run the test that is waiting
NO_MORE, STOP = "no more", "stop"


class AssignedTests:
    """A pytest plugin that reads a test's number from *path* after each test, and two before the first.

    One test is always waiting: pytest has to know it when it tears down the fixtures of the one before.

    :param path: the device file of the serial port to the host
    """

    def __init__(self, path: str) -> None:
        self._orders = open(path)  # noqa: SIM115 (closed at the end of the session)
        if self._orders.isatty():
            settings = termios.tcgetattr(self._orders)
            settings[3] &= ~termios.ECHO  # echoed orders would be part of the reports
            termios.tcsetattr(self._orders, termios.TCSANOW, settings)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool | None:
        """Run the assigned tests; pytest's own loop reports errors of the collection."""
        if session.testsfailed:
            return None
        item: pytest.Item | None = None
        while True:
            order = self._orders.readline().strip()
            following = session.items[int(order)] if order.isdecimal() else None
            if item is not None and order != STOP:
                item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
                if session.shouldfail:
                    raise session.Failed(session.shouldfail)
                if session.shouldstop:
                    raise session.Interrupted(session.shouldstop)
            if following is None:
                return True
            item = following

    def pytest_unconfigure(self) -> None:
        self._orders.close()
