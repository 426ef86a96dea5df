# SPDX-License-Identifier: GPL-2.0-only
"""A strict reader of KTAP: what Documentation/dev-tools/ktap.rst does not describe is an error."""

import re
from collections import Counter
from dataclasses import dataclass, field

_RESULT = re.compile(r"(not ok|ok) (\d+) ([^#]+?)(?: # ((?:SKIP|XFAIL|ERROR)(?= |$))? ?([^#]*))?")
_KINDS = {"SKIP": "skip", "XFAIL": "xfail", "ERROR": "error"}


@dataclass
class Result:
    """One result line, and the comments and nested results before it."""

    ok: bool
    name: str
    directive: str
    text: str
    comments: list[str]
    nested: list["Result"] = field(default_factory=list)


def read_ktap(text: str) -> list[Result]:
    """The results of *text*, which has to be KTAP and nothing else, complete and with right totals."""
    assert text.endswith("\n")
    lines = text.splitlines()
    results = _read_level(lines)
    kinds = Counter(_KINDS.get(result.directive, "pass" if result.ok else "fail") for result in results)
    kinds["xpass"] = sum(result.text == "a known bug did not show" for result in results)
    kinds["pass"] -= kinds["xpass"]
    totals = " ".join(f"{kind}:{kinds[kind]}" for kind in ("pass", "fail", "xfail", "xpass", "skip", "error"))
    assert f"# Totals: {totals}" in lines, totals
    return results


def _read_level(lines: list[str]) -> list[Result]:
    assert lines[0] == "KTAP version 1"
    plan = re.fullmatch(r"1\.\.([1-9]\d*)", lines[1])
    assert plan, lines[1]
    results: list[Result] = []
    comments: list[str] = []
    nested: list[str] = []
    for line in lines[2:]:
        if line.startswith("  "):
            nested.append(line[2:])
        elif line == "#" or line.startswith("# "):
            comments.append(line[2:])
        else:
            match = _RESULT.fullmatch(line)
            assert match, f"neither a result nor a comment: {line!r}"
            status, number, name, directive, text = match.groups(default="")
            assert int(number) == len(results) + 1, line
            assert (status == "not ok") == (directive == "ERROR") or not directive, line
            results.append(
                Result(status == "ok", name, directive, text, comments, _read_level(nested) if nested else [])
            )
            comments, nested = [], []
    assert not nested
    assert len(results) == int(plan[1])
    return results
