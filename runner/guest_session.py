# SPDX-License-Identifier: GPL-2.0-only
"""The settings that the host gives the pytest session in a booted kernel; no options, as no user should set them."""

import os
from dataclasses import dataclass

import pytest


@dataclass(frozen=True)
class GuestSession:
    """A plugin without hooks; only a session in a kernel that was booted for it has one.

    :ivar report_path: the device file that takes all reports, as JSON
    :ivar host_command: the host's command that runs pytest in this kernel again, in a machine of any number of CPUs
    :ivar emulated: whether TCG emulates the CPUs
    :ivar gcov: whether it sends GCOV's counters of KVM at its end
    """

    report_path: str
    host_command: str
    emulated: bool
    gcov: bool

    @property
    def reproduce_command(self) -> str:
        """The host's command that runs pytest in this kernel again, in a machine like this one."""
        return f"{self.host_command} --vm-cpus={len(os.sched_getaffinity(0))}"


def guest_session(config: pytest.Config) -> GuestSession | None:
    """The settings of a session in a booted kernel; None on the host."""
    return next((one for one in config.pluginmanager.get_plugins() if isinstance(one, GuestSession)), None)
