# SPDX-License-Identifier: GPL-2.0-only
"""DAMON looks at which pages this process uses (admin-guide/mm/damon/usage.rst)."""

import os
import time
from collections.abc import Iterable
from pathlib import Path

import pytest

from dirty_tracking.vm import PAGE

_ADMIN = Path("/sys/kernel/mm/damon/admin")
# A user of DAMON that has it for itself, in Linux 6.17 and later
_STAT = Path("/sys/module/damon_stat/parameters/enabled")
_DEADLINE = 30.0
_ANY = (1 << 31) - 1


def why_no_damon() -> str | None:
    """Why there is no DAMON; None if there is."""
    return None if _ADMIN.exists() else "this kernel has no DAMON in sysfs (CONFIG_DAMON_SYSFS, CONFIG_DAMON_VADDR)"


def age_pages(addresses: Iterable[int]) -> None:
    """Have DAMON sample the pages at these addresses some twenty times, and clear their accessed bits each time."""
    stat = _STAT.read_text().strip() if _STAT.exists() else "N"
    if stat == "Y":
        _write(_STAT, "N")
    try:
        _write(_ADMIN / "kdamonds/nr_kdamonds", 1)
        _sample(_ADMIN / "kdamonds/0", list(addresses))
    finally:
        _write(_ADMIN / "kdamonds/nr_kdamonds", 0)
        if stat == "Y":
            _write(_STAT, "Y")


def _sample(kdamond: Path, addresses: list[int]) -> None:
    context = kdamond / "contexts/0"
    attributes, target, scheme = context / "monitoring_attrs", context / "targets/0", context / "schemes/0"
    _write(kdamond / "contexts/nr_contexts", 1)
    _write(context / "operations", "fvaddr")
    _write(attributes / "intervals/sample_us", 1000)
    _write(attributes / "intervals/aggr_us", 20_000)
    # Each page is a region of its own, of which each sampling clears the bit: none are joined or split.
    _write(attributes / "nr_regions/max", len(addresses))
    _write(attributes / "nr_regions/min", len(addresses))
    _write(context / "targets/nr_targets", 1)
    _write(target / "pid_target", os.getpid())
    _write(target / "regions/nr_regions", len(addresses))
    for index, address in enumerate(addresses):
        _write(target / f"regions/{index}/start", address)
        _write(target / f"regions/{index}/end", address + PAGE)
    # A scheme that does nothing but count the regions that were sampled
    _write(context / "schemes/nr_schemes", 1)
    _write(scheme / "action", "stat")
    for name in ("sz", "nr_accesses", "age"):
        _write(scheme / f"access_pattern/{name}/max", _ANY)
    _write(kdamond / "state", "on")
    try:
        until = time.monotonic() + _DEADLINE
        while int((scheme / "stats/nr_tried").read_text()) < len(addresses):
            if time.monotonic() > until:
                pytest.skip(f"DAMON did not sample all pages within {_DEADLINE:g} s")
            time.sleep(0.01)
            _write(kdamond / "state", "update_schemes_stats")
    finally:
        _write(kdamond / "state", "off")


def _write(path: Path, value: object) -> None:
    try:
        path.write_text(str(value))
    except OSError as error:
        pytest.skip(f"DAMON (CONFIG_DAMON_VADDR) does not take {value!r} in {path}: {error.strerror}")
