# SPDX-License-Identifier: GPL-2.0-only
"""Runs as their ``results.json`` has them: the verdicts of the tests, the kernel's end and log, what dirty logging cost."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from harness.kernel_verdict import describe_system
from harness.rejudge import judged_anew
from harness.run_report import FILES_OF_A_RUN
from harness.table import DIMENSIONS, UNTESTED, VERDICTS
from harness.toml_file import TomlError
from kvm_util.wording import counted
from runner.boot_outcome import BootOutcome

_RESULTS = FILES_OF_A_RUN[0]
_NUMBER = re.compile(r"0x[0-9a-f]+|\d+")
# Of a test's verdicts in several runs of a kernel, the first of these counts.
_WORST_FIRST = ("FAIL", "known bug", "known bug, not seen", "pass", "not run", "skipped")
_MATRIX = "selftests/matrix/test_dirty_log.py::test_dirty_log"


class CompareError(Exception):
    """Runs cannot be compared; the message says which and why."""


class Result(NamedTuple):
    """A test's verdict, as in ``table.VERDICTS``, and its reason."""

    verdict: str
    reason: str

    @property
    def ran(self) -> bool:
        """Whether the test ran."""
        return self.verdict not in UNTESTED


@dataclass(frozen=True)
class SavedRun:
    """A run as its results have it, or several of the same kernel as one.

    :ivar name: the folder, as the user wrote it
    :ivar system: kernel, backend and where it ran
    :ivar parameters: the parameters of KVM's modules
    :ivar tests: the result of each test on KVM, by its id; of several runs, the worst
    :ivar log_reports: reports in the kernel's log that no known bug explains, without the numbers in them
    :ivar death: how the booted kernel ended, if that is its fault; else empty
    :ivar figures: of each run that measured the costs of dirty logging: milliseconds, by phase and scenario
    :ivar machines: on what they were measured, in words
    """

    name: str
    system: str
    parameters: dict[str, str]
    tests: dict[str, Result]
    log_reports: set[str]
    death: str
    figures: list[dict[str, float]]
    machines: set[str]

    @classmethod
    def load(cls, folder: Path, rejudge: bool = False) -> "SavedRun":
        """Load the run in *folder*, or the runs in the folders that are in it.

        :param rejudge: with the verdicts that they have by today's list of known bugs
        :raises CompareError: there is none, or they are not of one kernel
        """
        several = [] if (folder / _RESULTS).exists() else sorted(folder.glob(f"*/{_RESULTS}"))
        folders = [path.parent for path in several] or [folder]
        first, *others = [cls._load_one(one, rejudge) for one in folders]
        for run in others:
            if (run.system, run.parameters) != (first.system, first.parameters):
                raise CompareError(
                    f"{folder}: {first.name} and {run.name} are not runs of the same kernel and parameters"
                )
            for test, result in run.tests.items():
                results = (first.tests.get(test, result), result)
                first.tests[test] = min(results, key=lambda one: _WORST_FIRST.index(one.verdict))
            first.log_reports.update(run.log_reports)
            first.figures.extend(run.figures)
            first.machines.update(run.machines)
        death = next((run.death for run in [first, *others] if run.death), "")
        if not any(result.ran for result in first.tests.values()):
            raise CompareError(f"{folder}: no test ran on KVM")
        return replace(first, name=str(folder), death=death)

    @classmethod
    def _load_one(cls, folder: Path, rejudge: bool) -> "SavedRun":
        path = folder / _RESULTS
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            if rejudge:
                data = judged_anew(folder, data)
            host, machine = data["host"], data["machine"]
            cells = {f"{_MATRIX}[{_cell_id(cell)}]": cell for cell in data["cells"]}
            rows = {**cells, **{test["test"]: test for test in data["tests"]}}
            tests = {test: Result(row["verdict"], row["reason"] or "") for test, row in rows.items()}
            if others := {result.verdict for result in tests.values()}.difference(VERDICTS):
                raise ValueError(f"no such verdicts: {others}")
            reports = data["kernel_log"] if isinstance(data["kernel_log"], list) else []
            # CPU, PID, line and address differ between two runs.
            titles = {_NUMBER.sub("N", report["title"]) for report in reports if report["known_bug"] is None}
            end = BootOutcome[data["end"]["ending"]] if data["end"] else BootOutcome.FINISHED
            death = end.value if end.exit_status == 1 else ""
            costs = data.get("costs", {})  # results of older versions have none
            figures = [_figures(costs)] if costs else []
            machines = {_machine(host, machine)} if costs else set()
            system = describe_system(host, machine)
            return cls(str(folder), system, dict(host["parameters"]), tests, titles, death, figures, machines)
        except OSError as error:
            raise CompareError(f"{error.filename}: {error.strerror}") from None
        except TomlError as error:
            raise CompareError(str(error)) from None
        except (ValueError, LookupError, TypeError, AttributeError):
            what = f"{path} is no {_RESULTS} of a run" + (
                ", or a file of a failure beside it is damaged" if rejudge else ""
            )
            raise CompareError(what) from None

    @property
    def is_bad(self) -> bool:
        """Whether a test failed, the kernel died, or its log has a report."""
        return bool(any(one.verdict == "FAIL" for one in self.tests.values()) or self.log_reports or self.death)

    @property
    def cut_short(self) -> int:
        """How many of its tests did not run because it ended before them."""
        return sum(result.verdict == "not run" for result in self.tests.values())


def _cell_id(cell: Mapping[str, Any]) -> str:
    *names, vcpus = (str(cell[name]) for name in DIMENSIONS)
    return "-".join([*names, f"{vcpus}vcpu{'' if vcpus == '1' else 's'}"])


def _figures(costs: Mapping[str, Sequence[Mapping[str, float]]]) -> dict[str, float]:
    """Of each phase of each scenario the least time of its rounds, in milliseconds: other load only makes one longer."""
    return {
        f"{phase}, {scenario}": min(float(times[phase]) for times in rounds)
        for scenario, rounds in costs.items()
        for phase in rounds[0]
    }


def _machine(host: Mapping[str, Any], machine: Mapping[str, Any]) -> str:
    """What decides how fast everything is, but for the kernel."""
    emulator = [f"QEMU {machine['qemu']} {machine['accel']}", f"{machine['machines']} at once"] if machine else []
    return ", ".join([*emulator, str(host["cpu"]), counted(host["cpus"], "CPU")])
