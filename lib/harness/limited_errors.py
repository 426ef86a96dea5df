# SPDX-License-Identifier: GPL-2.0-only
"""Which errors of a test are the host's: those that a limit of it explains, and that are no answer of KVM's."""

import errno
from collections.abc import Iterator

from dirty_tracking.vcpu_thread import VcpuHang
from kvm_util import host_limits
from kvm_util.guest import GuestError
from kvm_util.host_limits import HostLimit
from kvm_util.ioctl import KvmError

# What a test has found out about KVM; no limit excuses it, whatever came before or after
_VERDICTS = (AssertionError, GuestError, VcpuHang)


def explain_error(error: BaseException) -> str | None:
    """The limit that explains an error of a test, in one line; None when none does.

    :param error: looked at with what it came from: its causes, and the limits and system calls that failed before it
    """
    if any(isinstance(one, _VERDICTS) for one in _all_before(error)):
        return None
    for one in _origins(error):
        if isinstance(one, KvmError):
            return None  # it was looked at when it came
        if limit := _explain_one(one):
            return limit
    return None


def was_interrupted(error: BaseException) -> bool:
    """Whether *error* came as Ctrl-C, or a signal like it, was ending what was done."""
    return any(isinstance(one, KeyboardInterrupt) for one in _all_before(error))


def _all_before(error: BaseException) -> Iterator[BaseException]:
    """*error* and all errors that were being handled when it came, shown or not."""
    seen: list[BaseException] = []
    waiting = [error]
    while waiting:
        one = waiting.pop()
        if not any(one is other for other in seen):
            seen.append(one)
            waiting += [other for other in (one.__cause__, one.__context__) if other is not None]
            yield one


def _origins(error: BaseException) -> Iterator[BaseException]:
    """*error* and what it came from."""
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
        # The interpreter's own; KVM has no part in it. By now the others have ended, and given back their stacks.
        return host_limits.why_no_thread() or (
            "no more threads can be started: "
            f"{host_limits.any_limit_of_mapped_memory() or host_limits.OTHER_THREAD_LIMITS}"
        )
    if isinstance(error, MemoryError) and not error.args:
        # The interpreter's own too.
        return host_limits.any_limit_of_mapped_memory() or host_limits.explain(errno.ENOMEM)
    if isinstance(error, OSError):
        return host_limits.explain(error.errno or 0)
    return None
