# SPDX-License-Identifier: GPL-2.0-only
"""What the host hands to the pytest in a booted kernel. They are no options: by hand they would only do harm."""

from dataclasses import dataclass

import pytest


@dataclass(frozen=True)
class GuestSession:
    """A plugin without hooks; that a session has it says that its kernel was booted for it.

    :ivar report_to: the file that all reports go to, as JSON
    :ivar repeat_with: the command that runs pytest in this kernel again, on the host
    :ivar emulated: whether QEMU's TCG emulates this kernel's CPU
    """

    report_to: str
    repeat_with: str
    emulated: bool


def guest_session(config: pytest.Config) -> GuestSession | None:
    """What the host handed to this session; None on the host."""
    return next((one for one in config.pluginmanager.get_plugins() if isinstance(one, GuestSession)), None)
