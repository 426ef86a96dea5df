# SPDX-License-Identifier: GPL-2.0-only
"""Which errors of a test are the host's: those that a limit of it explains, and that are no answer of KVM's."""

import errno

from lib import host_limits
from lib.host_limits import HostLimit
from lib.ioctl import KvmError


def explain_error(error: BaseException) -> str | None:
    """The limit that explains an error of a test, in one line; None when none does.

    :param error: looked at with all that it came from, unless there is a verdict among that
    """
    chain: list[BaseException] = []
    while error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__ or error
    if any(isinstance(one, AssertionError) for one in chain):
        return None
    return next(filter(None, map(_explain_one, chain)), None)


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
    if isinstance(error, OSError) and not isinstance(error, KvmError):  # those were looked at when they came
        return host_limits.explain(error.errno or 0)
    return None
