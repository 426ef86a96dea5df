# SPDX-License-Identifier: GPL-2.0-only
"""Decides whether a test's error is due to a limit of the host rather than to KVM."""

import errno
from collections.abc import Iterator

from dirty_tracking.vcpu_thread import VcpuHang
from kvm_util import host_limits
from kvm_util.guest import GuestError
from kvm_util.host_limits import HostLimit
from kvm_util.ioctl import KvmError

# Errors that are findings about KVM; a limit never excuses them
_VERDICTS = (AssertionError, GuestError, VcpuHang)


def explain_error(error: BaseException) -> str | None:
    """The limit that explains a test's error, in one line; None if none does.

    A limit may also explain the error's cause, or an OSError or HostLimit that was being handled when it was raised.
    """
    if any(isinstance(seen, _VERDICTS) for seen in _context_chain(error)):
        return None
    for origin in _origins(error):
        if isinstance(origin, KvmError):
            return None  # ioctl() has already checked the limits: it would have raised HostLimit
        if limit := _explain_alone(origin):
            return limit
    return None


def was_interrupted(error: BaseException) -> bool:
    """Whether *error* was raised while a KeyboardInterrupt was being handled, or is one."""
    return any(isinstance(seen, KeyboardInterrupt) for seen in _context_chain(error))


def _context_chain(error: BaseException) -> list[BaseException]:
    """*error* with all its causes and contexts, suppressed ones included."""
    seen: list[BaseException] = []
    waiting: list[BaseException | None] = [error]
    while waiting:
        current = waiting.pop()
        if current is not None and not any(current is other for other in seen):
            seen.append(current)
            waiting += [current.__cause__, current.__context__]
    return seen


def _origins(error: BaseException) -> Iterator[BaseException]:
    """*error*, then its cause or a HostLimit or OSError that is its context, and so on."""
    seen: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and not any(current is other for other in seen):
        seen.append(current)
        yield current
        handled = None if current.__suppress_context__ else current.__context__
        current = current.__cause__ or (handled if isinstance(handled, HostLimit | OSError) else None)


def _explain_alone(error: BaseException) -> str | None:
    if isinstance(error, HostLimit):
        return str(error)
    if isinstance(error, RuntimeError) and str(error) == "can't start new thread":
        # Raised by the interpreter, not because of KVM. By now other threads have ended and freed their stacks.
        return host_limits.why_no_thread() or (
            f"no more threads can be started: {host_limits.tightest_mapping_limit() or host_limits.OTHER_THREAD_LIMITS}"
        )
    if isinstance(error, MemoryError) and not error.args:
        # Raised by the interpreter too.
        return host_limits.tightest_mapping_limit() or host_limits.explain(errno.ENOMEM)
    if isinstance(error, OSError):
        return host_limits.explain(error.errno or 0)
    return None
