# SPDX-License-Identifier: GPL-2.0-only
"""Plugin: skips tests that cannot run here: what the host lacks is no verdict on KVM."""

from collections.abc import Generator, Iterator
from contextlib import contextmanager

import pytest

from harness.limited_errors import explain_error, was_interrupted
from runner.guest_session import guest_session


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Generator[None, object, object]:
    if item.get_closest_marker("disposable_kernel") and guest_session(item.config) is None:
        pytest.skip(
            "could corrupt the memory of a kernel with this bug: only in one that is booted for it (make check-kernel)"
        )
    with _host_limits_excused(item):
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    with _host_limits_excused(item):
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Generator[None, object, object]:
    with _host_limits_excused(item):
        return (yield)


@contextmanager
def _host_limits_excused(item: pytest.Item) -> Iterator[None]:
    """Skip a test on KVM that hits a limit of the host.

    An error because a signal interrupted the test is no failure of the test either.
    """
    try:
        yield
    except Exception as error:
        if was_interrupted(error):
            raise KeyboardInterrupt from error
        if item.get_closest_marker("kvm") and (limit := explain_error(error)):
            pytest.skip(limit)
        raise
