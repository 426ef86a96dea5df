# SPDX-License-Identifier: GPL-2.0-only
"""Test two kernels, measure what dirty logging costs in both, and compare them; see _USAGE."""

import os
import random
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":
    # Python puts the program's own folder there; and the user may have taken any Python.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    from runner.unmet import leave, unmet

    if reason := unmet():
        leave(reason, 128)

from harness.compare import main as compare
from harness.figure_changes import FEWEST_RUNS
from harness.kernel_options import AUTO, MACHINE_OPTIONS
from harness.output_paths import chosen_folder
from runner.errors import CANNOT_TEST, CannotTest
from runner.kernel_runs import HOST, Planned, Runs, split_options
from runner.modules import parse_parameters
from runner.run_verdicts import INTERRUPTED, NOT_RUN, USAGE_ERROR, print_line
from runner.store import shown
from runner.suite_pytest import is_path, make_absolute

_USAGE = """\
usage: check_regression.py BASE NEW [options of pytest, and tests to run]

Runs the tests in both kernels, then boots them in turn to measure what dirty logging costs, and compares verdicts and times.
BASE and NEW are what check_kernel.py takes, or that and parameters of KVM's modules: debian:6.12 'debian:6.12 kvm_amd.npt=0'

  --rounds N  how often each is booted for the times, at least 5; default 6

exit status
  0    no regression
  1    a test newly fails, the kernel newly dies or reports a bug, or something takes longer
  125  a kernel cannot be tested, or the two cannot be compared
  128  nothing can be tested like this: a wrong option, no test that matches
  130  interrupted; what was done is compared, and kept"""
_COSTS = "selftests/scenarios/test_costs.py"
# In one machine, so that nothing else runs meanwhile
_MEASURING = ["--machines=1", "--seed=1", "--thorough", _COSTS]
_ROUNDS = 6
_SIDES = ("base", "new")
# Options whose values come from elsewhere
_RESERVED = {"--kernel": "BASE and NEW name the kernels", "--kvm-params": "they stand behind BASE and NEW"}


class _UsageError(Exception):
    """It cannot start; the text is one line that says why."""


def main(arguments: list[str]) -> int:
    """Test and compare the two kernels that *arguments* name first."""
    if {"-h", "--help"} & {*arguments}:
        print(_USAGE)
        return 0
    try:
        planned, folder = _plan(arguments)
    except _UsageError as error:
        print(f"check_regression.py: {error}", file=sys.stderr)
        return USAGE_ERROR
    except CannotTest as error:
        print(f"cannot be tested: {error}", file=sys.stderr)
        return CANNOT_TEST
    boots = len(planned) // 2 - 1
    print_line(f"the tests in each kernel, then {boots} boots of each for the times; files: {shown(folder)}")
    status = max(statuses := {result.status for result in Runs(1, last_status=CANNOT_TEST).run(planned)})
    if status in (CANNOT_TEST, USAGE_ERROR):
        return status  # the line of the run says why
    compared = CANNOT_TEST
    if all(any((folder / side).glob("*/results.json")) for side in _SIDES):
        print_line("")
        compared = compare([str(shown(folder / side)) for side in _SIDES])
    if statuses & {INTERRUPTED, NOT_RUN}:
        return INTERRUPTED
    return compared if compared < 2 else CANNOT_TEST


def _plan(arguments: Sequence[str]) -> tuple[list[Planned], Path]:
    """The runs in their order, and the folder for all of them.

    :raises _UsageError: *arguments* are wrong
    """
    if len(arguments) < 2 or any(not word.strip() or word.startswith("-") for word in arguments[:2]):
        raise _UsageError("two kernels are to be named: check_regression.py BASE NEW [options of pytest]; see --help")
    kernels = [_kernel(text) for text in arguments[:2]]
    own, options = split_options(arguments[2:], ["--rounds", "--results", *_RESERVED])
    for name, value in own.items():
        if name in _RESERVED or not value:
            raise _UsageError(f"{name}: {_RESERVED.get(name, 'its value is missing')}")
    rounds = own.get("--rounds", str(_ROUNDS))
    if not rounds.isdecimal() or int(rounds) < FEWEST_RUNS:
        raise _UsageError(f"--rounds: {rounds} is not a number from {FEWEST_RUNS} on; fewer could show no difference")
    folder = chosen_folder(own.get("--results"), "regression")
    if any(folder.glob("*/*/results.json")):
        raise _UsageError(f"--results: {folder} has the results of other runs")
    options = [f"--seed={random.SystemRandom().randrange(1 << 32)}", *make_absolute(options)]  # the last --seed counts
    machine = [f"{name}={value}" for name, value in split_options(options, MACHINE_OPTIONS)[0].items()]

    def planned(side: int, name: str, words: list[str]) -> Planned:
        return Planned(*kernels[side], folder / _SIDES[side] / name, words)

    # What changes steadily on this host concerns both alike: A B B A A B.
    measuring = [
        planned(side, f"{number:02}", [*machine, *_MEASURING])
        for number in range(1, int(rounds) + 1)
        for side in ((0, 1) if number % 2 else (1, 0))
    ]
    # First, for a mistake in the options shows there.
    testing = [planned(side, "tests", [f"--deselect={_COSTS}", *options]) for side in (0, 1)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _UsageError(f"--results: {folder}: {error.strerror}") from None
    return [*testing, *measuring], folder


def _kernel(text: str) -> tuple[str, str]:
    """A kernel and its parameters.

    :raises _UsageError: it is none to boot, or a parameter is malformed
    :raises CannotTest: there is no such file
    """
    try:
        name, *parameters = shlex.split(text)
        parse_parameters(" ".join(parameters))
    except (ValueError, CannotTest) as error:
        raise _UsageError(f"{text}: {error}") from None
    if name in (AUTO, HOST):
        raise _UsageError(f"{name} is no kernel to boot: name two (debian:6.12, a build tree, ...)")
    if not name:
        raise _UsageError(f"{text}: the name of a kernel is empty")
    if is_path(name):  # relative to the user's folder
        name = os.path.abspath(os.path.expanduser(name))
        if not os.path.exists(name):
            raise CannotTest(f"{name}: there is no such kernel")
    return name, " ".join(parameters)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
