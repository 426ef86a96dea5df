# SPDX-License-Identifier: GPL-2.0-only
"""Where a run's files go when nobody says where."""

import time
from pathlib import Path

from runner import ROOT

RESULTS = ROOT / "results"


def new_folder(label: str) -> Path:
    """A path below results/ for a run that begins now; another one may have begun in the same second."""
    name = f"{label}-{time.strftime('%Y%m%d-%H%M%S')}"
    names = (name, *(f"{name}-{number}" for number in range(2, 100)))
    return next(path for path in (RESULTS / name for name in names) if not path.exists())
