# SPDX-License-Identifier: GPL-2.0-only
"""Makes one HTML file about runs, from their results folders; it needs no other file and no network.

``make report RUNS='results/a results/b'`` calls it.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

try:
    from harness.report.page import render
except ModuleNotFoundError as missing:
    if missing.name not in ("jinja2", "markupsafe", "pygal"):
        raise
    print(f"report: there is no Python package {missing.name}; `make report` installs it", file=sys.stderr)
    sys.exit(2)
from harness.report.saved import ReportedRun, ReportError


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the report that the command line asks for; returns 2 if it cannot be made."""
    parser = argparse.ArgumentParser(prog="report", description=__doc__)
    parser.add_argument(
        "runs", type=Path, metavar="RUN", nargs="+", help="the results folder of a run; the first is the base"
    )
    parser.add_argument("--output", type=Path, default=Path("report.html"), metavar="FILE", help="the file to write")
    options = parser.parse_args(arguments)
    try:
        page = render([ReportedRun.load(folder) for folder in options.runs])
        options.output.write_text(page, encoding="utf-8", errors="replace")
    except ReportError as error:
        print(f"report: {error}", file=sys.stderr)
        return 2
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:
        print(f"report: a run has figures that cannot be shown: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"report: {options.output}: {error.strerror}", file=sys.stderr)
        return 2
    print(f"{options.output}: {options.output.stat().st_size / 1e6:.2f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
