# SPDX-License-Identifier: GPL-2.0-only
"""The default folder for a run's files."""

import time
from pathlib import Path

from runner import ROOT

RESULTS = ROOT / "results"


def new_folder(label: str) -> Path:
    """An unused path below results/, named after *label* and the time; nothing is created."""
    name = f"{label}-{time.strftime('%Y%m%d-%H%M%S')}"
    names = (name, *(f"{name}-{number}" for number in range(2, 100)))
    return next(path for path in (RESULTS / name for name in names) if not path.exists())
