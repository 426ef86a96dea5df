# SPDX-License-Identifier: GPL-2.0-only
"""The suite's version, which ``pyproject.toml`` alone states."""

import tomllib

from runner import ROOT


def suite_version() -> str:
    """The version, such as ``0.2.0`` or, between two releases, ``0.3.0.dev0`` (PEP 440)."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return str(project["version"])
