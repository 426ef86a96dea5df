# SPDX-License-Identifier: GPL-2.0-only
"""The options of the kernel's own dirty_log_test, as options of the suite."""

import getopt
from collections.abc import Sequence
from types import SimpleNamespace

import pytest

from harness.command_line import SETTING_PARSERS, settings_of
from harness.kernel_options import option_name
from harness.selection import DIMENSIONS, check_memory, check_values
from kvm_util.host_limits import HostLimit, address_space_limits, memory_limits, overcommit_limits

_MATRIX = "selftests/matrix/test_dirty_log.py"
_VCPUS = 2  # of the largest VM
# Its log modes: each with all the ways in which the suite enables it, of which a kernel may have only some
_LOG_MODES: dict[str, tuple[str, ...]] = {
    "all": (),
    "dirty-log": ("dirty-log",),
    "clear-log": ("clear-log", "clear-log-unset"),
    "dirty-ring": ("dirty-ring", "dirty-ring-plain"),
}
# Its only guest mode on x86 (VM_MODE_PXXV48_4K, VM_MODE_PXXVYY_4K) has the first number up to Linux 6.6, and then the second.
_GUEST_MODES: dict[str, tuple[str, ...]] = dict.fromkeys(("8", "9"), ("48bit-4k", "57bit-4k"))
_SETTINGS = {"c": "ring_count", "i": "iterations", "I": "interval", "p": "phys_offset"}
USAGE = f"""\
usage: dirty_log_test [-h] [-M log mode] [-m guest mode] [-i iterations] [-I interval] [-p offset] [-c ring size]

Runs the mode matrix on this host's KVM, and prints KTAP.

 -M: log mode: {", ".join(_LOG_MODES)} (default: all)
 -m: guest mode, may be used several times: {", ".join(_GUEST_MODES)} (the number of the C test's only mode on x86), or
     {", ".join(DIMENSIONS["guest_mode"])} (default: all)
 -i: iterations (default: 32)
 -I: interval in ms (default: 10)
 -p: guest-physical address of the test memory (default: the top of the address space)
 -c: entries of a dirty ring, a power of two (default: 65536)

exit status: 0 pass, 1 fail, 4 skip"""


def suite_options(words: Sequence[str]) -> list[str]:
    """The suite's options for those of the C test; empty if they ask for help.

    :raises pytest.UsageError: they are wrong
    :raises HostLimit: this host has too little memory
    """
    try:
        given, others = getopt.getopt([*words], "c:hi:I:p:m:M:")
    except getopt.GetoptError as error:
        raise pytest.UsageError(f"{error.msg} (-h lists all options)") from None
    if others:
        raise pytest.UsageError(f"{others[0]!r} is no option (-h lists all options)")
    log_modes: tuple[str, ...] = ()
    guest_modes: set[str] = set()
    settings: dict[str, str | None] = dict.fromkeys(SETTING_PARSERS)
    for option, text in given:
        letter = option[1:]
        if letter == "h":
            return []
        if letter == "M":
            log_modes = _known(option, text, _LOG_MODES)
        elif letter == "m":
            guest_modes.update(
                _known(option, text, _GUEST_MODES | {name: (name,) for name in DIMENSIONS["guest_mode"]})
            )
        else:
            name = _SETTINGS[letter]
            SETTING_PARSERS[name](option, text)
            settings[name] = text
    _check(settings)
    options = [f"{option_name(name)}={text}" for name, text in settings.items() if text is not None]
    options += [f"--log-mode={','.join(log_modes)}"] if log_modes else []
    options += [f"--guest-mode={','.join(sorted(guest_modes))}"] if guest_modes else []
    return [_MATRIX, *options]


def _known(option: str, text: str, values: dict[str, tuple[str, ...]]) -> tuple[str, ...]:
    if text not in values:
        raise pytest.UsageError(f"{option}: no such mode: {text!r} (there are {', '.join(values)})")
    return values[text]


def _check(texts: dict[str, str | None]) -> None:
    settings = settings_of(SimpleNamespace(**texts, kvm_device=None))
    check_values(settings, _VCPUS)
    try:
        check_memory(settings, _VCPUS, 1, [*memory_limits(), *overcommit_limits(), *address_space_limits()])
    except pytest.UsageError as error:  # what the C test takes too is no mistake of the user
        raise HostLimit(str(error)) from None
