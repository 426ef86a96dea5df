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
    if any(isinstance(one, _VERDICTS) for one in _context_chain(error)):
        return None
    for one in _origins(error):
        if isinstance(one, KvmError):
            return None  # ioctl() has already checked the limits: it would have raised HostLimit
        if limit := _explain_one(one):
            return limit
    return None


def was_interrupted(error: BaseException) -> bool:
    """Whether *error* was raised while a KeyboardInterrupt was being handled, or is one."""
    return any(isinstance(one, KeyboardInterrupt) for one in _context_chain(error))


def _context_chain(error: BaseException) -> Iterator[BaseException]:
    """*error* with all its causes and contexts, suppressed ones included."""
    seen: list[BaseException] = []
    waiting = [error]
    while waiting:
        one = waiting.pop()
        if not any(one is other for other in seen):
            seen.append(one)
            waiting += [other for other in (one.__cause__, one.__context__) if other is not None]
            yield one


def _origins(error: BaseException) -> Iterator[BaseException]:
    """*error*, then its cause or a HostLimit or OSError that is its context, and so on."""
    one: BaseException | None = error
    seen: list[BaseException] = []
    while one is not None and not any(one is other for other in seen):
        seen.append(one)
        yield one
        handled = None if one.__suppress_context__ else one.__context__
        one = one.__cause__ or (handled if isinstance(handled, HostLimit | OSError) else None)


def _explain_one(error: BaseException) -> str | None:
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
