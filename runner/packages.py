# SPDX-License-Identifier: GPL-2.0-only
"""The Python packages that the suite needs to run, as they are installed here."""

from importlib.metadata import Distribution, distribution

from packaging.requirements import Requirement

from runner import ROOT


def needed_packages() -> list[Distribution]:
    """The distributions of the packages in requirements.txt and of their dependencies."""
    found: dict[str, Distribution] = {}
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    left = [line for line in lines if line.strip() and not line.startswith("#")]
    while left:
        requirement = Requirement(left.pop())
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        name = requirement.name.lower()
        if name not in found:
            found[name] = distribution(name)
            left += found[name].requires or []
    return list(found.values())
