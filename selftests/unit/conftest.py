# SPDX-License-Identifier: GPL-2.0-only
"""Fixtures for all tests of the suite itself."""

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session", autouse=True)
def _no_ci_output() -> Iterator[None]:
    """Unset the variables by which pytest recognizes CI, where it prints whole failures in its short summary."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("CI", raising=False)
        patch.delenv("BUILD_NUMBER", raising=False)
        yield


@pytest.fixture
def scipy() -> None:
    """For tests of statistics."""
    pytest.importorskip("scipy", reason="no scipy here (make .venv/analysis)")
