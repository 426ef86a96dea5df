# SPDX-License-Identifier: GPL-2.0-only
"""Reads GCOV's counters of a kernel: how often each line of each function was executed."""

import base64
import gzip
import json
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from runner.errors import CannotTest

# In a results folder: a folder for each machine that ran
FOLDER = "gcov"


@dataclass
class Function:
    """A function of the kernel.

    :ivar file: relative to the kernel's source
    :ivar start: its first line
    :ivar lines: how often each line with code was executed
    """

    name: str
    file: str
    start: int
    end: int
    lines: Counter[int] = field(default_factory=Counter)

    @property
    def executed(self) -> set[int]:
        """The lines that were executed."""
        return {line for line, count in self.lines.items() if count}


Functions = dict[tuple[str, int], Function]


def save(results: Path, machine: str, path: str, text: str) -> None:
    """Keep the counters of an object file that *machine* sent (gcov_counters.py), in the results folder of its run."""
    target = results / FOLDER / machine / path.lstrip("/")
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(base64.b64decode(text))


def read(tree: Path, results: Iterable[Path]) -> Functions:
    """The functions of KVM in *tree*, by file and first line, with all counters in the folders *results* added up.

    A function that several object files have, an inline one or one of paging_tmpl.h, is one function here.

    :raises CannotTest: there are no counters, or they are not of *tree*
    """
    functions: Functions = {}
    with tempfile.TemporaryDirectory() as folder:
        # Below the results of a machine: the path that GCC gave the file, without its first slash
        files = [
            (file, Path("/", *file.relative_to(one / FOLDER).parts[1:]))
            for one in results
            for file in (one / FOLDER).rglob("*.gcda")
        ]
        if not files:
            raise CannotTest("the kernel has sent no counters: it died, or its KVM was built without them")
        for number, (file, built) in enumerate(files):
            notes = built.with_suffix(".gcno")
            if not notes.is_file() or not notes.is_relative_to(tree.resolve()):
                raise CannotTest(f"{notes} is missing: the kernel was built in another folder, or is not of this build")
            scratch = Path(folder, str(number))
            scratch.mkdir()
            shutil.copy(file, scratch)
            shutil.copy(notes, scratch)
            _add(functions, _run_gcov(scratch, file.name), tree)
    return functions


def check(notes: Path) -> None:
    """Check that gcov can read *notes*, which GCC wrote for an object file.

    :raises CannotTest: it cannot
    """
    with tempfile.TemporaryDirectory() as folder:
        _run_gcov(Path(folder), str(notes.absolute()))


def _run_gcov(folder: Path, name: str) -> dict[str, Any]:
    if shutil.which("gcov") is None:
        raise CannotTest("no gcov (apt install gcc)")
    done = subprocess.run(["gcov", "--json-format", name], cwd=folder, capture_output=True, text=True, check=False)
    outputs = list(folder.glob("*.gcov.json.gz"))
    if done.returncode or not outputs or "version" in done.stderr:
        problem = (done.stderr.strip().splitlines() or ["no output"])[0]
        raise CannotTest(f"gcov cannot read {name}: {problem} (it has to be of the GCC that built the kernel)")
    data: dict[str, Any] = json.loads(gzip.decompress(outputs[0].read_bytes()))
    return data


def _add(functions: Functions, data: Mapping[str, Any], tree: Path) -> None:
    for file in data["files"]:
        path = _relative(Path(data["current_working_directory"], file["file"]), tree)
        by_name = {}
        for one in file["functions"]:
            key = path, one["start_line"]
            by_name[one["name"]] = functions.setdefault(key, Function(one["name"], *key, one["end_line"]))
        for line in file["lines"]:
            if function := by_name.get(line.get("function_name")):
                function.lines[line["line_number"]] += line["count"]


def _relative(path: Path, tree: Path) -> str:
    path, tree = path.resolve(), tree.resolve()
    return str(path.relative_to(tree)) if path.is_relative_to(tree) else str(path)
