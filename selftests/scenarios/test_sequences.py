# SPDX-License-Identifier: GPL-2.0-only
"""Random operation sequences of a guest and its VMM, executed on KVM and checked against a model of the contract."""

import itertools
import time
from collections.abc import Iterator, Sequence

import pytest

from dirty_tracking.cell import Settings
from dirty_tracking.modes import LOG_MODES, smallest_ring
from dirty_tracking.platform import ring_order_is_write_order
from dirty_tracking.sequence_in_c import InBothLanguages
from dirty_tracking.sequence_search import search
from dirty_tracking.sequences import Collect, Create, Step, Write, run_sequence
from harness import known_bugs
from kvm_util.host import Host
from kvm_util.kvm import Kvm

# The known bug with which a reset may leave some pages writable, so that other bugs can be found
RING_RESET_BUG = "ring-reset-drops-mask"
# Each round of ten sequences has its own seed; with --seed it is the first round
ROUNDS, EMULATED_ROUNDS, THOROUGH_FACTOR = 6, 1, 20


def seeds_of(settings: Settings, rounds: int, soak: int | None) -> Iterator[int]:
    """The seeds of *rounds* rounds, or of those that begin within *soak* seconds."""
    end = time.monotonic() + (soak or 0)
    for number in itertools.count():
        if number and (time.monotonic() >= end if soak else number >= rounds):
            return
        yield settings.seed + number


@pytest.mark.slow
def test_random_operation_sequences(
    kvm: Kvm, host: Host, settings: Settings, thorough: bool, soak: int | None, pytestconfig: pytest.Config,
    request: pytest.FixtureRequest, emulated_cpu: bool, log_mode: str,
) -> None:  # fmt: skip
    """KVM reports what the model predicts for random writes, loads, collections, logging toggles and memslot changes."""
    if LOG_MODES[log_mode].uses_ring and not ring_order_is_write_order(host):
        pytest.skip("with kvm_intel.pml=Y rings are not in the order of the writes before Linux 6.14")

    known = [] if pytestconfig.option.no_known_bugs else [bug.id for bug in known_bugs.on_host(host)]

    def run(steps: Sequence[Step]) -> None:
        run_sequence(kvm, host, log_mode, steps, drops_masks=RING_RESET_BUG in known)

    rounds = EMULATED_ROUNDS if emulated_cpu else ROUNDS
    seeds = seeds_of(settings, rounds * (THOROUGH_FACTOR if thorough else 1), soak)
    found = search(run, LOG_MODES[log_mode].uses_ring, seeds)
    if found is not None:
        seed, failure = found
        if pytestconfig.option.emit_c:
            failure.evidence = InBothLanguages(failure.sequence)
        # The round's seed: with --seed it is the first round.
        request.node.user_properties.append(("seed", str(seed)))
        raise failure


# 190 entries in a ring with a soft limit of 192; the next step pushes ten more.
FILLED_DURING_WRITES = [
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
def test_ring_fills_during_writes(kvm: Kvm, host: Host) -> None:
    """When a ring fills during a list of writes, those before and those after its reset are all reported."""
    if smallest_ring(kvm) > 256:
        pytest.skip("the smallest ring has more entries than this sequence pushes")
    run_sequence(kvm, host, "dirty-ring", FILLED_DURING_WRITES)
