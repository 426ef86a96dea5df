# SPDX-License-Identifier: GPL-2.0-only
"""From this test on KVM's answers are falsified in the bodies of all others of the session.

test_check_kernel.py names it before tests that only a kernel of its own can run. Nothing collects it unless it is named.
"""

from collections.abc import Iterator

import pytest

from selftests.unit.mutants.planted_faults import PATCH, add_reports


class Falsified:
    """A pytest plugin: each report has a page too many."""

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_call(self) -> Iterator[None]:
        add_reports()
        try:
            yield
        finally:
            PATCH.undo()


def test_all_that_follow_are_lied_to(pytestconfig: pytest.Config) -> None:
    pytestconfig.pluginmanager.register(Falsified())
