# SPDX-License-Identifier: GPL-2.0-only
"""Measures what dirty logging costs, phase by phase as the kernel's dirty_log_perf_test does, also with dirty rings.

``make perf`` prints the median of several rounds for each scenario of bench/scenarios.toml and each of its log modes, in
milliseconds. With ``--c-test`` the C test runs in turn with it where it can do the same, and the ratios are shown.
"""

import argparse
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pytest

from dirty_tracking.modes import LOG_MODES
from dirty_tracking.perf_run import Cost, Scenario, measure
from dirty_tracking.vcpu_thread import VcpuHang
from harness.selection import parse_size
from harness.version import suite_version
from kvm_util import guest_program
from kvm_util.host import this_host
from kvm_util.host_limits import HostLimit
from kvm_util.ioctl import KvmError
from kvm_util.kvm import Kvm, KvmUnavailable
from kvm_util.memory import BACKINGS, GuestMemoryError
from kvm_util.wording import counted
from runner import ROOT

_PHASES = ("populate", "enable", "dirty", "get", "clear", "harvest", "reset", "disable")
# The lines of the C test that have a time
_C_LINES = {
    "populate": r"Populate memory time: ([\d.]+)s",
    "enable": r"Enabling dirty logging time: ([\d.]+)s",
    "dirty": r"Iteration \d+ dirty memory time: ([\d.]+)s",
    "get": r"Iteration \d+ get dirty log time: ([\d.]+)s",
    "clear": r"Iteration \d+ clear dirty log time: ([\d.]+)s",
    "disable": r"Disabling dirty logging time: ([\d.]+)s",
}
# The types of a scenario's values, and those of the items of its lists
_TYPES = {field.name: type(field.default) for field in fields(Scenario) if field.name not in ("log_mode", "pin")}
_WORDS: dict[type, str] = {int: "a whole number", bool: "true or false", str: "a string"}
_LISTS: dict[str, tuple[type, str]] = {"log_modes": (str, "a list of strings"), "pin": (int, "a list of whole numbers")}
_FIELDS = {*_TYPES, *_LISTS}


class ScenarioError(Exception):
    """The file of scenarios or an option is wrong; the message says where and how."""


class CTestError(Exception):
    """The C test does not run to its end."""


def main() -> None:
    """Measure the scenarios of the file that the command line names."""
    parser = argparse.ArgumentParser(prog="perf", description=__doc__)
    parser.add_argument("--scenarios", type=Path, default=ROOT / "bench/scenarios.toml", metavar="FILE")
    parser.add_argument("--only", metavar="NAME,...", help="the scenarios to measure; default: all of the file")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="decides the order of random accesses")
    parser.add_argument("--c-test", metavar="PATH", help="a built dirty_log_perf_test")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write all times to it, as JSON")
    arguments = parser.parse_args()
    try:
        scenarios = load(arguments.scenarios, arguments.only)
        if arguments.rounds < 1:
            raise ScenarioError("--rounds must be at least 1")
        c_test = _program(arguments.c_test) if arguments.c_test is not None else None
        guest_program.assemble_all()
        with Kvm() as kvm, _output(arguments.output, arguments.seed) as found:
            failed = run_all(kvm, scenarios, arguments.rounds, arguments.seed, c_test, found)
    except (ScenarioError, KvmUnavailable, guest_program.GuestProgramError) as error:
        sys.exit(f"perf: {error}")
    except KeyboardInterrupt:
        print("perf: interrupted", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    if failed:
        sys.exit(f"perf: {counted(failed, 'scenario')} failed")


def _program(name: str) -> str:
    """The absolute path of the program *name*, which may be on PATH.

    :raises ScenarioError: there is none
    """
    found = shutil.which(name)
    if found is None:
        raise ScenarioError(f"--c-test: {name} is no program that can be run")
    return os.path.abspath(found)


@contextmanager
def _output(path: Path | None, seed: int) -> Iterator[list[dict[str, Any]]]:
    """A list for what is measured, which is written to *path* however the run ends.

    :raises ScenarioError: *path* cannot be written; this is found before anything is measured
    """
    found: list[dict[str, Any]] = []
    if path:
        _write(path, "a", "")
    try:
        yield found
    finally:
        if path:
            data = {"suite": suite_version(), "host": asdict(this_host()), "seed": seed, "scenarios": found}
            _write(path, "w", json.dumps(data, indent=1) + "\n")


def _write(path: Path, mode: str, text: str) -> None:
    try:
        with path.open(mode) as file:
            file.write(text)
    except OSError as error:
        raise ScenarioError(f"--output: {path}: {error.strerror}") from None


def load(path: Path, only: str | None) -> dict[str, list[Scenario]]:
    """The scenarios of a file by name, one of each log mode.

    :raises ScenarioError: the file is wrong, or has no scenario of the names in *only*
    """
    try:
        tables = tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ScenarioError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    names = list(tables) if only is None else only.split(",")
    for name in names:
        if name not in tables:
            raise ScenarioError(f"{path}: there is no scenario {name!r} (choose from {', '.join(tables)})")
    return {name: [*_scenarios(f"{path}: {name}", tables[name])] for name in names}


def _scenarios(where: str, table: object) -> Iterator[Scenario]:
    if not isinstance(table, dict):
        raise ScenarioError(f"{where}: is no table")
    values: dict[str, Any] = dict(table)
    if unknown := values.keys() - _FIELDS:
        raise ScenarioError(
            f"{where}: no such value: {', '.join(sorted(unknown))} (there are {', '.join(sorted(_FIELDS))})"
        )
    if isinstance(values.get("memory"), str):
        try:
            values["memory"] = parse_size("memory", values["memory"])
        except pytest.UsageError as error:
            raise ScenarioError(f"{where}: {error}") from None
    for name, value in values.items():
        if wanted := _other_type(name, value):
            raise ScenarioError(f"{where}: {name}: {value!r} is not {wanted}")
    modes = values.pop("log_modes", list(LOG_MODES))
    if "pin" in values:
        values["pin"] = tuple(values["pin"])
    for mode in modes:
        scenario = Scenario(mode, **values)
        if wrong := scenario.wrong():
            raise ScenarioError(f"{where}: {wrong}")
        yield scenario


def _other_type(name: str, value: object) -> str:
    """What the value *name* has to be, if *value* is not of exactly that type: a bool is no whole number."""
    if name in _TYPES:
        return "" if type(value) is _TYPES[name] else _WORDS[_TYPES[name]]
    item, words = _LISTS[name]
    return "" if isinstance(value, list) and all(type(one) is item for one in value) else words


def run_all(
    kvm: Kvm,
    scenarios: Mapping[str, Sequence[Scenario]],
    rounds: int,
    seed: int,
    c_test: str | None,
    found: list[dict[str, Any]],
) -> int:
    """Measure all *scenarios*, print a line or more of each, and add its times to *found*; returns how many failed.

    :raises ScenarioError: this host can measure none of them
    """
    host = this_host()
    print(f"kernel {host.kernel}, {host.backend}, {host.cpu}; milliseconds, median of {rounds} rounds")
    print(_line(["scenario", "log mode", *_PHASES, "pages", "full", "stalled"]))
    failed = 0
    for name, those in scenarios.items():
        for scenario in those:
            reason = LOG_MODES[scenario.log_mode].supported(kvm) or BACKINGS[scenario.backing].missing(
                scenario.vcpus * scenario.memory
            )
            if reason:
                print(f"{name}, {scenario.log_mode}: skipped: {reason}")
                continue
            try:
                found.append(_measure_one(kvm, name, scenario, rounds, seed, c_test))
            except (VcpuHang, GuestMemoryError, HostLimit, KvmError, CTestError) as error:
                print(f"{name}, {scenario.log_mode}: failed: {error}", flush=True)
                failed += 1
    if not found and not failed:
        raise ScenarioError("nothing was measured")
    return failed


def _measure_one(kvm: Kvm, name: str, scenario: Scenario, rounds: int, seed: int, c_test: str | None) -> dict[str, Any]:
    beside = c_test if c_test and c_arguments(scenario) is not None else None
    costs: list[Cost] = []
    theirs: list[dict[str, float]] = []
    for number in range(rounds):
        # In turn, so that neither always comes first.
        if beside and number % 2:
            theirs.append(c_times(beside, scenario))
        costs.append(measure(kvm, scenario, seed + number))
        if beside and not number % 2:
            theirs.append(c_times(beside, scenario))
    ours = [{phase: times["total"] / _parts(phase, scenario) for phase, times in cost.phases.items()} for cost in costs]
    counts = [
        f"{statistics.median(cost.dirty_pages for cost in costs):g}",
        f"{statistics.median(cost.ring_full_exits for cost in costs):g}",
        f"{1000 * statistics.median(cost.stalled_seconds for cost in costs):.4g}",
    ]
    print(_line([name, scenario.log_mode, *(_shown(_median(ours, phase)) for phase in _PHASES), *counts]), flush=True)
    if theirs:
        c_medians = {phase: _median(theirs, phase) for phase in _PHASES}
        ratios = {
            phase: statistics.median(own[phase] / c[phase] for own, c in zip(ours, theirs, strict=True) if c[phase])
            for phase, value in c_medians.items() if value
        }  # fmt: skip
        print(_line(["", "C test", *(_shown(c_medians[phase]) for phase in _PHASES)]))
        print(
            _line(["", "ratio", *(f"{ratios[phase]:.2f}" if phase in ratios else "" for phase in _PHASES)]), flush=True
        )
    return {
        "name": name,
        "scenario": asdict(scenario),
        "costs": [asdict(cost) for cost in costs],
        **({"c_test": theirs} if theirs else {}),
    }


def c_arguments(scenario: Scenario) -> list[str] | None:
    """The C test's arguments for *scenario*; None if it cannot do the same on every kernel since 5.15."""
    if LOG_MODES[scenario.log_mode].uses_ring or scenario.log_mode == "clear-log-unset":
        return None
    if scenario.random or scenario.write_percent != 100 or scenario.pin:
        return None
    values = {"v": scenario.vcpus, "b": scenario.memory, "i": scenario.iterations, "x": scenario.slots}
    arguments = [word for letter, value in values.items() for word in (f"-{letter}", str(value))]
    flags = [*["-g"] * (scenario.log_mode == "dirty-log"), *["-o"] * scenario.overlap]
    return [*arguments, "-s", scenario.backing, *flags]


def c_times(c_test: str, scenario: Scenario) -> dict[str, float]:
    """What each phase took in a run of the C test, in milliseconds: for an iteration, where it has several.

    :raises CTestError: it fails
    """
    command = [c_test, *(c_arguments(scenario) or [])]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    except OSError as error:  # a file of another architecture, say
        raise CTestError(f"{c_test}: {error.strerror}") from None
    if done.returncode:
        last = (done.stderr or done.stdout).strip().splitlines() or ["it said nothing"]
        raise CTestError(f"{' '.join(command)} ended with status {done.returncode}: {last[-1].strip()}")
    return c_phases(done.stdout)


def c_phases(output: str) -> dict[str, float]:
    """The times in the C test's *output*, as :func:`c_times` returns them."""
    times = {phase: [float(text) for text in re.findall(line, output)] for phase, line in _C_LINES.items()}
    return {phase: 1000 * statistics.mean(found) for phase, found in times.items() if found}


def _parts(phase: str, scenario: Scenario) -> int:
    """How many iterations the sum of a phase's times is of."""
    return 1 if phase in ("populate", "enable", "disable") else scenario.iterations


def _median(rounds: Sequence[Mapping[str, float]], phase: str) -> float | None:
    values = [times[phase] for times in rounds if phase in times]
    return statistics.median(values) if values else None


def _shown(milliseconds: float | None) -> str:
    return "" if milliseconds is None else f"{milliseconds:.4g}"


def _line(words: Sequence[str]) -> str:
    first, second, *others = words
    return f"{first:14} {second:16}" + "".join(f"{word:>9}" for word in others)


if __name__ == "__main__":
    main()
