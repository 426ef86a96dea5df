# SPDX-License-Identifier: GPL-2.0-only
"""The packages of lib/ import in one direction (docs/architecture.md)."""

import ast
from pathlib import Path

import pytest

from runner import ROOT

# The packages below pytest's side, and what none of their modules may import
BELOW_PYTEST = ("kvm_util", "dirty_tracking")
FORBIDDEN = {"harness", "runner", "selftests", "pytest", "_pytest"}


def imports(path: Path) -> set[str]:
    """The top-level packages that a module imports, wherever in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {name.name.partition(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.partition(".")[0])
    return found


@pytest.mark.parametrize("package", BELOW_PYTEST)
def test_no_import_from_above(package: str) -> None:
    """A package below pytest's side imports neither pytest nor anything of the packages above."""
    modules = sorted((ROOT / "lib" / package).rglob("*.py"))
    assert modules
    wrong = {str(path.relative_to(ROOT)): names for path in modules if (names := imports(path) & FORBIDDEN)}
    assert not wrong
