# SPDX-License-Identifier: GPL-2.0-only
"""The suite's version: in the header, in the results, and in the change log."""

import json
import re
import subprocess
import sys
from pathlib import Path

from harness.version import suite_version
from runner import ROOT


def test_version_of_a_run(tmp_path: Path) -> None:
    """The header and results.json name the version that pyproject.toml has."""
    command = [sys.executable, "-m", "pytest", "selftests/matrix/test_dirty_log.py", f"--results={tmp_path}"]
    done = subprocess.run(
        [*command, "--kvm-device=/nonexistent"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert f"\nsuite    {suite_version()}\nkernel   " in done.stdout, done.stdout + done.stderr
    assert json.loads((tmp_path / "results.json").read_text())["suite"] == suite_version()


def test_change_log_has_the_version() -> None:
    """The newest section of CHANGELOG.md is the version's; between two releases it is "Unreleased"."""
    newest = re.search(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest is not None
    assert newest[1] == ("Unreleased" if ".dev" in suite_version() else suite_version())
