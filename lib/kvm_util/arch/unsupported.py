# SPDX-License-Identifier: GPL-2.0-only
"""An architecture that the suite has no guest code for: modules can be imported, guests cannot be made."""

import mmap
import platform
from typing import NoReturn

NAME = platform.machine()
PAGE_SIZE = mmap.PAGESIZE
GUEST_MODES: dict[str, NoReturn] = {}


def __getattr__(name: str) -> NoReturn:
    if name.startswith("__"):  # the import system and inspection ask for some
        raise AttributeError(name)
    raise NotImplementedError(f"{name}: the suite has no guest code for {NAME} yet")
