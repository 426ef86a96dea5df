# SPDX-License-Identifier: GPL-2.0-only
"""Runs commands as a user would."""

import os
import subprocess
from pathlib import Path

Done = subprocess.CompletedProcess[str]


def start(command: list[str], folder: Path, **environment: str) -> Done:
    """Run *command* in *folder*, without the variables of the environment that configure make or the suite."""
    ours = ("KERNEL", "KVM_PARAMS", "MAKEFLAGS", "MAKELEVEL", "PYTHON", "WORKERS", "ARGS", "MATRIX", "C_TEST")
    clean = {name: value for name, value in os.environ.items() if name not in ours}
    return subprocess.run(
        command, cwd=folder, env=clean | environment, capture_output=True, text=True, check=False, timeout=60
    )
