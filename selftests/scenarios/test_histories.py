# SPDX-License-Identifier: GPL-2.0-only
"""Histories that nobody thought of: what guest and VMM do in any order, on KVM and on a model of the contract alike."""

import itertools
import time
from collections.abc import Callable, Iterator, Sequence

import pytest

from dirty_tracking.cell import Settings
from dirty_tracking.modes import LOG_MODES
from dirty_tracking.platform import uses_pml
from dirty_tracking.sequence_search import search
from dirty_tracking.sequences import Collect, Create, Step, Write, run_history, shrinks_slot_in_rings
from harness import known_bugs
from kvm_util.host import Host
from kvm_util.kvm import Kvm

# The known bug that shrinks_slot_in_rings() keeps off
RING_RESET_BUG = "ring-reset-drops-mask"
# Each round of ten histories has a seed of its own, which given as --seed makes it the first one
ROUNDS, EMULATED_ROUNDS, THOROUGH_FACTOR = 6, 1, 20


def seeds_of(settings: Settings, rounds: int, soak: int | None) -> Iterator[int]:
    """The seeds of so many rounds, or of those that can begin within *soak* seconds."""
    end = time.monotonic() + (soak or 0)
    for number in itertools.count():
        if number and (time.monotonic() >= end if soak else number >= rounds):
            return
        yield settings.seed + number


def test_any_history(
    kvm: Kvm, host: Host, settings: Settings, thorough: bool, soak: int | None, pytestconfig: pytest.Config,
    request: pytest.FixtureRequest, emulated_cpu: bool, record_property: Callable[[str, object], None], log_mode: str,
) -> None:  # fmt: skip
    """Writes, loads, GET, CLEAR, harvests, resets, tracking on and off, slots made, moved, deleted: KVM does as the model."""
    if LOG_MODES[log_mode].uses_ring:
        request.getfixturevalue("entries_in_order")

    # What a known bug breaks on this kernel is left out, so that others can be found.
    known = [] if pytestconfig.option.no_known_bugs else [bug.id for bug in known_bugs.on_host(host)]
    leave_out = shrinks_slot_in_rings if RING_RESET_BUG in known else None

    def run(steps: Sequence[Step]) -> None:
        run_history(kvm, host, log_mode, steps, leave_out)

    rounds = EMULATED_ROUNDS if emulated_cpu else ROUNDS
    seeds = seeds_of(settings, rounds * (THOROUGH_FACTOR if thorough else 1), soak)
    found = search(run, LOG_MODES[log_mode].uses_ring, seeds)
    if found is not None:
        seed, failure = found
        record_property("seed", str(seed))  # of the round: as --seed it makes that the first
        raise failure


# 190 entries for a ring that takes 192 before it stops its vCPU; the next step brings ten more.
FILLED_IN_THE_MIDST = [
    Create(slot=1, place=0, npages=70),
    Create(slot=2, place=1, npages=130),
    *(Write(slot=1, pages=range(first, first + 35)) for first in (0, 35)),
    *(Write(slot=2, pages=range(first, first + 30)) for first in (0, 30, 60, 90)),
    Write(slot=2, pages=range(110, 130)),
    Write(slot=1, pages=range(35)),
    Collect(),
    Collect(),
]


@pytest.mark.log_modes("dirty-ring")
def test_a_ring_that_gets_full_in_the_midst_of_writes(kvm: Kvm, host: Host) -> None:
    """What was done before it was full, and what is done after it was emptied, is all reported."""
    if uses_pml(host):
        pytest.skip("with PML the smallest ring has more entries than this history makes")
    run_history(kvm, host, "dirty-ring", FILLED_IN_THE_MIDST)
