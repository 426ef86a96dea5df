# SPDX-License-Identifier: GPL-2.0-only
"""Plant a mutant for the bodies of all later tests of the session.

test_check_kernel.py and record.py name it before the tests that are to fail. Nothing collects it unless it is named. It is a
test, and not an option, so that it works in a booted kernel too.
"""

from collections.abc import Iterator

import pytest

from selftests.unit.mutants.catalogue import MUTANTS, Mutant


class Planted:
    """A pytest plugin: KVM is *mutant* while a test's own body runs; a fixture that fails proves nothing about the test."""

    def __init__(self, mutant: Mutant) -> None:
        self._mutant = mutant

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            self._mutant.plant(patch)
            try:
                yield
            except (AttributeError, NameError, TypeError) as error:
                # KVM cannot cause that: the mutant does not fit the library any more, and its kills prove nothing.
                pytest.exit(f"mutant {self._mutant.name}: {item.nodeid}: {error!r}", pytest.ExitCode.INTERNAL_ERROR)


@pytest.mark.parametrize("name", MUTANTS)
def test_planted(pytestconfig: pytest.Config, name: str) -> None:
    """The named mutant is planted for all tests that run after this one."""
    pytestconfig.pluginmanager.register(Planted(MUTANTS[name]))
