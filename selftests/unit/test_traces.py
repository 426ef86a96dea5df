# SPDX-License-Identifier: GPL-2.0-only
"""Ledgers of real runs, sound and falsified, judged again: no change of the rules may miss what was found in them once.

traces.jsonl.xz has them: of each trace a line with its test, its kernel, and the violations that were found when it was
recorded, by kind, vCPU and page; then the ledger as ``Ledger.dump()`` writes it. A stream ends where the run ended.
"""

import io
import json
import lzma
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dirty_tracking.judge import Judge
from dirty_tracking.ledger import Ledger, SlotPages, Toggle

TRACES = Path(__file__).with_name("traces.jsonl.xz")

# Kind, vCPU and page; of the last two None where a violation has none
Found = set[tuple[str, int | None, int | None]]


def traces() -> Iterator[tuple[dict[str, Any], Ledger]]:
    """Each trace's first line, and its ledger."""
    with lzma.open(TRACES, "rt") as file:
        text = file.read()
    for part in text.split('{"trace":')[1:]:
        first, _, ledger = ('{"trace":' + part).partition("\n")
        yield json.loads(first), Ledger.load(io.StringIO(ledger))


def judged(ledger: Ledger) -> Found:
    """What the judge finds, with the pages as the streams have them."""
    first = {slot.slot: slot.first for slot in ledger.slots}
    found: Found = set()
    for violation in Judge(ledger).verify():
        own = violation.slot if violation.rule not in ("R6", "R7") else None
        base = 0 if own is None else first[own]
        pages: list[int | None] = [base + page for page in violation.pages]
        found.update((violation.kind.name, violation.vcpu, page) for page in pages or [None])
    return found


def test_recorded_traces() -> None:
    """Traces of sound runs have no violation, and those of falsified runs each violation of a page that they once had."""
    sound = falsified = 0
    wrong: list[tuple[str, Found]] = []
    for header, ledger in traces():
        then = {(kind, vcpu, page) for kind, vcpu, pages in header["violations"] for page in pages or [None]}
        now = judged(ledger)
        sound, falsified = sound + (not then), falsified + bool(then)
        wrong.append((f"{header['kernel']}: {header['trace']}", then - now if then else now))
    assert sound >= 50
    assert falsified >= 40
    assert not [(name, found) for name, found in wrong if found]


def test_ledger_dump_round_trip() -> None:
    """A ledger that is dumped while events are recorded is loaded again with all of them."""
    (_, ledger), *_ = traces()
    file = io.StringIO()
    ledger.dump(file)
    ledger.record(Toggle(1000, 1001, [0], [0], [True], slot=1, on=False))
    file.seek(0)
    again = Ledger.load(file)
    assert again.slots == ledger.slots
    assert all(isinstance(slot, SlotPages) for slot in again.slots)
    assert [stream.pages for stream in again.streams] == [stream.pages for stream in ledger.streams]
    assert [vars(event) for event in again.take()] == [vars(event) for event in ledger.take()]
