# SPDX-License-Identifier: GPL-2.0-only
"""What all tests of the suite itself begin with."""

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session", autouse=True)
def _runs_speak_as_to_a_person() -> Iterator[None]:
    """Have the runs that a test starts print the same everywhere: with these set, pytest repeats whole failures at the end."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("CI", raising=False)
        patch.delenv("BUILD_NUMBER", raising=False)
        yield
