# SPDX-License-Identifier: GPL-2.0-only
"""The recipes of docs/ci.md do what they say."""

import os
import re
import subprocess
from pathlib import Path
from xml.etree import ElementTree

import pytest

from runner import ROOT
from runner.kernel import Kernel

pytestmark = [pytest.mark.boots, pytest.mark.slow]

RECIPES = dict(re.findall(r"^## (.+?)\n.*?^```yaml\n(.*?)^```$", (ROOT / "docs/ci.md").read_text(), re.M | re.S))
TESTS = "selftests/interface/test_slots.py -k test_logging_disabled_and_enabled"


def commands(recipe: str) -> list[str]:
    """The shell commands with which a recipe runs the suite."""
    block = re.search(r"^ *(?:- run: \||script:)\n((?: +.*\n)*?)(?= *(?:- if|after_script):)", RECIPES[recipe], re.M)
    assert block is not None
    (report,) = re.findall(r"make report .*", RECIPES[recipe])
    return [*(line.strip().removeprefix("- ") for line in block[1].splitlines()), report]


def test_recipes_have_the_same_commands() -> None:
    """Each recipe runs the same commands, so that a test of one is a test of all."""
    assert commands("GitHub Actions") == commands("GitLab")
    assert len(commands("GitLab")) == 3


def test_commands_of_a_recipe(kernel: Kernel, tmp_path: Path) -> None:
    """The commands test the kernel; results, JUnit with the kernel's name, a complete KTAP stream and a report are there."""
    debian = "debian:" + ".".join(kernel.release.split(".")[:2])
    environment = {"KERNEL": debian, "RESULTS": str(tmp_path / "ci"), "TESTS": TESTS}
    script = "set -e\n" + "\n".join(commands("GitHub Actions"))
    done = subprocess.run(
        ["sh", "-c", script], cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (suite,) = ElementTree.parse(tmp_path / "ci/junit.xml").getroot()
    assert kernel.release in [one.attrib["value"] for one in suite.findall("properties/property")]
    ktap = (tmp_path / "ci.ktap").read_text().splitlines()
    results = [line for line in ktap if re.match(r"(not )?ok \d", line)]
    assert ktap[1] == f"1..{len(results)}"
    assert results[-1] == f"ok {len(results)} the run"
    assert (tmp_path / "ci/results.json").exists()
    assert kernel.release in (tmp_path / "ci/report.html").read_text()
