# SPDX-License-Identifier: GPL-2.0-only
"""Stand-in for an architecture without guest code: modules can be imported, VMs and guests cannot be created."""

import platform
from typing import NoReturn

NAME = platform.machine()
GUEST_MODES: dict[str, NoReturn] = {}


def __getattr__(name: str) -> NoReturn:
    if name.startswith("__"):  # looked up by the import system and by inspect
        raise AttributeError(name)
    raise NotImplementedError(f"{name}: the suite has no guest code for {NAME} yet")
