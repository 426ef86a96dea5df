# SPDX-License-Identifier: GPL-2.0-only
"""Run the suite on several hosts at once, by ssh; see _USAGE."""

import random
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":
    # Python puts the program's own folder there; and the user may have taken any Python.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    from runner.unmet import leave, unmet

    if reason := unmet():
        leave(reason, 128)

from harness.output_paths import chosen_folder
from kvm_util.wording import counted
from runner import standalone
from runner.errors import CANNOT_TEST
from runner.kernel_runs import Planned, Runs, split_options
from runner.run_verdicts import USAGE_ERROR
from runner.runs_summary import conclude
from runner.store import BUILD, shown

_USAGE = """\
usage: hosts.py 'HOST ...' [run|test] [options of pytest, and tests to run]

Copies the one file of `make standalone` to each host, runs it there, all hosts at once, and fetches the results. HOST is what
ssh takes: a name of ~/.ssh/config, user@name, or ssh://user@name:port. `run` is the mode matrix, and what runs by default.
A host needs Python 3.11 and /dev/kvm, and lets this user in without a question.

  --time-limit S  the most seconds without the end of a test, after which a run counts as hung; default 600

exit status
  0    good on all hosts
  1    bad on one
  125  one cannot be tested: it does not answer, it was lost, its run has hung, it has no KVM
  128  nothing can be tested like this: a wrong option, no host
  130  interrupted; what was done is kept"""
_COMMANDS = ("run", "test")
_TIME_LIMIT = "600"
_OWN_FILES = "each host's files are below the folder --results"
# Options that have a value of their own on each host
_RESERVED = {"--kernel": "hosts run their own", "--junitxml": _OWN_FILES, "--junit-xml": _OWN_FILES}


class _UsageError(Exception):
    """It cannot start; the text is one line that says why."""


def main(arguments: list[str]) -> int:
    """Run the suite on the hosts that *arguments* name first."""
    if {"-h", "--help"} & {*arguments}:
        print(_USAGE)
        return 0
    file = BUILD / "dirty-tracking"
    try:
        planned, folder = _plan(arguments, file)
        standalone.main(file)
    except _UsageError as error:
        print(f"hosts.py: {error}", file=sys.stderr)
        return USAGE_ERROR
    except OSError as error:
        print(f"cannot be tested: {error.filename}: {error.strerror}", file=sys.stderr)
        return CANNOT_TEST
    print(f"{counted(len(planned), 'host')}; files: {shown(folder)}", flush=True)
    return conclude(planned, Runs(len(planned)).run(planned), folder)


def _plan(arguments: Sequence[str], file: Path) -> tuple[list[Planned], Path]:
    """The run on each host, and the folder for all of them.

    :raises _UsageError: *arguments* are wrong
    """
    hosts = arguments[0].split() if arguments else []
    if not hosts or any(host.startswith("-") for host in hosts):
        raise _UsageError("no hosts are named: hosts.py 'HOST ...' [run|test] [options of pytest]; see --help")
    if twice := {host for host in hosts if hosts.count(host) > 1}:
        raise _UsageError(f"{', '.join(sorted(twice))}: named twice")
    own, words = split_options(arguments[1:], ["--results", "--time-limit", *_RESERVED])
    for name, value in own.items():
        if name in _RESERVED or not value:
            raise _UsageError(f"{name}: {_RESERVED.get(name, 'its value is missing')}")
    limit = own.get("--time-limit", _TIME_LIMIT)
    if not limit.isdecimal() or int(limit) < 1:
        raise _UsageError(f"--time-limit: {limit} is no number of seconds from 1 on")
    command = words.pop(0) if words[:1] and words[0] in _COMMANDS else _COMMANDS[0]
    # The same seed for all, so that they can be compared; the last --seed counts.
    options = [limit, command, f"--seed={random.SystemRandom().randrange(1 << 32)}", "-v", *words]
    folder = chosen_folder(own.get("--results"), "hosts")
    if any(folder.glob("*/*")):
        raise _UsageError(f"--results: {folder} has the results of other runs")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _UsageError(f"--results: {folder}: {error.strerror}") from None
    return [Planned(host, "", folder / f"{number:02}", options, file) for number, host in enumerate(hosts, 1)], folder


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
