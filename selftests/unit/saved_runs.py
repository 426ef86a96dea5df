# SPDX-License-Identifier: GPL-2.0-only
"""Makes results folders of runs that never were, for tests of what reads them."""

import json
from pathlib import Path
from typing import Any

from harness.failure_report import file_name

MATRIX = "selftests/matrix/test_dirty_log.py::test_dirty_log"
HOST = {"kernel": "6.12.1", "backend": "kvm_amd", "parameters": {"kvm.tdp_mmu": "Y"}, "cpu": "a CPU"}
SETTINGS = {"iterations": 4, "interval": 10.0, "ring_count": 1000, "test_mem": 1021 * 4096, "seed": 7}


def cell(
    log_mode: str = "dirty-log", vcpus: int = 1, verdict: str = "pass", reason: str = "", **more: Any
) -> dict[str, Any]:
    """A row of ``cells``."""
    names = [log_mode, "48bit-4k", "anonymous", "forced", "sparse"]
    row = dict(zip(("log_mode", "guest_mode", "backing", "stop", "density"), names, strict=True))
    test = f"{MATRIX}[{'-'.join([*names, f'{vcpus}vcpus'])}]"
    return {**row, "vcpus": vcpus, "test": test, "verdict": verdict, "reason": reason, **more}


def figures(iterations: int = 4, scale: int = 1) -> dict[str, Any]:
    """The figures of a cell that ran, with a ring."""
    times = {
        "count": iterations,
        "total": 9.5,
        "p50": 0.25 * scale,
        "p90": 0.5 * scale,
        "p99": 0.75 * scale,
        "max": 2.5,
    }
    dirty = [scale * (100 + number) for number in range(iterations)]
    return {
        "iterations": iterations, "writes": 12345 * scale, "dirty": sum(dirty), "clean": 17, "collections": 2 * iterations,
        "exits": 9, "ring_full_exits": 1, "seconds": 1.25, "stalled_seconds": 0.125, "writes_per_second": 4321.5,
        "phases": dict.fromkeys(("populate", "harvest", "harvest_running", "reset", "reset_running"), times),
        "dirty_by_iteration": dirty, "ring_fill_by_iteration": [500 + number for number in range(iterations)],
    }  # fmt: skip


def row(test: str, verdict: str = "pass", reason: str = "") -> dict[str, str]:
    """A row of ``tests``."""
    return {"test": f"selftests/{test}", "verdict": verdict, "reason": reason}


def kernel_report(title: str, test: str) -> dict[str, Any]:
    """A row of ``kernel_log``: what the kernel reported while *test* ran."""
    return {
        "kind": "WARN",
        "title": title,
        "lines": [f"line of {title}"],
        "known_bug": None,
        "tests": [test],
        "log": "",
    }


def save_run(folder: Path, **results: Any) -> Path:
    """Make the results folder of a run; *results* replace parts of ``results.json``."""
    folder.mkdir()
    data = {
        "suite": "1", "host": HOST, "place": "this host's own", "machine": {}, "settings": SETTINGS, "end": {},
        "kernel_log": [], "taint": [], "cells": [], "tests": [], "migrations": {},
    }  # fmt: skip
    (folder / "results.json").write_text(json.dumps(data | results))
    return folder


def save_failure(folder: Path, test: str, findings: list[dict[str, Any]], **more: Any) -> None:
    """Add the report of a violation to a run's folder."""
    data = {"settings": SETTINGS, "test": test, "reproduce": "pytest it", "cell": None, "message": "LOST", **more}
    whole = [
        {"detail": "", "slot": 1, "pages": [], "vcpu": None, "iteration": 1, "collection": 1} | one for one in findings
    ]
    (folder / f"{file_name(test)}.json").write_text(json.dumps(data | {"findings": whole}))


def save_journal(folder: Path, test: str, text: str, reproduce: str) -> None:
    """Add the journal of a run in which *test* failed with *text*, and a line that its host did not finish."""
    sections = [["where, and how to reproduce it", f"kernel   6.12.1\nreproduce {reproduce}"]]
    report = {
        "nodeid": test, "location": ["", 1, ""], "outcome": "failed", "longrepr": text, "when": "call",
        "sections": sections, "user_properties": [], "duration": 0.5,
    }  # fmt: skip
    lines = [json.dumps({"end": test, "reports": [report]}), '{"end": "half", "reports": [{"outcome": "failed"']
    (folder / "journal.jsonl").write_text("\n".join(lines))
