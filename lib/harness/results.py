# SPDX-License-Identifier: GPL-2.0-only
"""The folder for the files of a run that has no --results."""

import time
from pathlib import Path

from runner import ROOT

RESULTS = ROOT / "results"


def new_folder(label: str) -> Path:
    """A path in results/ for a run that begins now, apart from another one of the same second; it is not made."""
    name = f"{label}-{time.strftime('%Y%m%d-%H%M%S')}"
    names = (name, *(f"{name}-{number}" for number in range(2, 100)))
    return next(path for path in (RESULTS / name for name in names) if not path.exists())
