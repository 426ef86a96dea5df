# SPDX-License-Identifier: GPL-2.0-only
"""Reports of pytest as plain data for JSON, and back."""

from typing import Any

import pytest

Report = pytest.CollectReport | pytest.TestReport

# What most reports have; a serial port takes some microseconds for each byte that QEMU emulates.
_USUAL: dict[str, Any] = {"$report_type": "TestReport", "outcome": "passed", "longrepr": None, "sections": []}


def to_data(config: pytest.Config, report: Report) -> dict[str, Any]:
    """*report* as data, without what is usual, and what no plugin here needs: keywords are long, and a worker is no data."""
    data: dict[str, Any] = config.hook.pytest_report_to_serializable(config=config, report=report)
    return {
        name: value
        for name, value in data.items()
        if name not in ("keywords", "node") and (name not in _USUAL or value != _USUAL[name])
    }


def from_data(config: pytest.Config, data: dict[str, Any]) -> Report:
    """The report that *data* was made of."""
    whole = {"keywords": {}, **_USUAL, "sections": []} | data
    report: Report = config.hook.pytest_report_from_serializable(config=config, data=whole)
    if isinstance(report.longrepr, list):
        # pytest recognizes a skip by the tuple, which JSON turns into a list
        report.longrepr = tuple(report.longrepr)
    return report
