# SPDX-License-Identifier: GPL-2.0-only
"""kernel_matrix.py FILE [options of pytest]: test each kernel of FILE with each set of parameters, and make one table.

Exit status: 0 when all are good, 1 when one is bad, 125 when one cannot be tested, 128 when FILE or an option is wrong,
130 when interrupted.
"""

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

from harness.kernel_options import MACHINE_OPTIONS, VM_MEMORY
from harness.output_paths import chosen_folder
from harness.toml_file import TomlError, TomlFile
from kvm_util.host_limits import available_memory
from kvm_util.memory import MIB
from runner.errors import CannotTest
from runner.kernel_runs import HOST, Planned, Runs, split_options
from runner.modules import parse_parameters
from runner.qemu import nested_vendor
from runner.run_verdicts import USAGE_ERROR
from runner.runs_summary import conclude
from runner.target import MOST_MACHINES

_USAGE = "usage: kernel_matrix.py FILE [options of pytest]"
_FIELDS = {"kernels": list, "parameters": list, "arguments": str}
_OWN_FILES = "each run has files of its own, below the matrix's folder (--results)"
# Options that the matrix sets itself for each run, and where their values come from
_RESERVED = {
    "--kernel": "the file names the kernels",
    "--kvm-params": "the file names the parameters",
    "--junitxml": _OWN_FILES,
    "--junit-xml": _OWN_FILES,
}


class _UsageError(Exception):
    """The matrix cannot start; the text is one line that says why."""


def load(path: Path) -> tuple[list[str], list[str], list[str]]:
    """Read the kernels, the sets of parameters and the arguments of a matrix file.

    :raises TomlError: it cannot be read, or has a mistake
    """
    file = TomlFile(path)
    for name, value in file.data.items():
        if name not in _FIELDS:
            raise file.error(f"no such field: {name} (there are {', '.join(_FIELDS)})", name)
        words = value if isinstance(value, list) else []
        if not isinstance(value, _FIELDS[name]) or not all(isinstance(word, str) for word in words):
            kind = "a list of strings" if _FIELDS[name] is list else "a string"
            raise file.error(f"{name} must be {kind}, not {value!r}", name)
    kernels, sets = file.data.get("kernels", []), file.data.get("parameters") or [""]
    if not all(kernels):
        raise file.error("kernels: a name is empty", "kernels")
    if not kernels:
        raise file.error("it names no kernels", "kernels")
    for text in sets:
        try:
            parse_parameters(text)
        except CannotTest as error:
            raise file.error(f"parameters: {error}", "parameters") from None
    try:
        arguments = shlex.split(file.data.get("arguments", ""))
    except ValueError as error:
        raise file.error(f"arguments: {error}", "arguments") from None
    return kernels, sets, arguments


def main(arguments: list[str]) -> int:
    """Run the matrix."""
    if arguments[:1] in (["-h"], ["--help"]):
        print(__doc__.strip())
        return 0
    try:
        pairs, options, folder = _prepare(arguments)
    except (TomlError, _UsageError) as error:
        print(f"matrix: {error}", file=sys.stderr)
        return USAGE_ERROR
    planned = [Planned(*pair, folder / f"{number + 1:02}", options) for number, pair in enumerate(pairs)]
    return conclude(planned, Runs(_at_once(options)).run(planned), folder)


def _prepare(arguments: list[str]) -> tuple[list[tuple[str, str]], list[str], Path]:
    """The kernels with their parameters, the options of each run, and the folder of the matrix.

    :raises _UsageError, TomlError: *arguments* or the matrix file have a mistake
    """
    if not arguments or not arguments[0] or arguments[0].startswith("-"):
        raise _UsageError(f"no file is named ({_USAGE})")
    kernels, sets, options = load(Path(arguments[0]))
    # The same seed for all, so that they can be compared; the last --seed counts.
    options = [f"--seed={random.SystemRandom().randrange(1 << 32)}", *options, *arguments[1:]]
    set_here, options = split_options(options, ["--results", *_RESERVED])
    for name, value in set_here.items():
        if name in _RESERVED or not value:
            raise _UsageError(f"{name}: {_RESERVED.get(name, 'no folder is named')}")
    pairs = [(kernel, parameters) for kernel in kernels for parameters in (sets if kernel != HOST else [""])]
    try:
        return pairs, options, _make_folder(set_here.get("--results"))
    except OSError as error:
        raise _UsageError(f"{error.filename}: {error.strerror} (--results DIR puts the files elsewhere)") from None


def _at_once(options: Sequence[str]) -> int:
    """How many kernels are tested at once: more than one if its machines leave CPUs and memory of this host idle.

    With options of the machine, and where machines are virtualized, a kernel has the host to itself.
    """
    if split_options(options, MACHINE_OPTIONS)[0] or nested_vendor():
        return 1
    machines = min(len(os.sched_getaffinity(0)), available_memory() // (VM_MEMORY * MIB))
    return max(1, machines // MOST_MACHINES)


def _make_folder(given: str | None) -> Path:
    """Make the folder of the matrix.

    :raises OSError: it cannot be written
    """
    folder = chosen_folder(given, "matrix")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "table.txt").write_text("")
    return folder


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
