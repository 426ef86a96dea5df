# SPDX-License-Identifier: GPL-2.0-only
"""Histories that are made up by Hypothesis, and the shortest that fails.

Hypothesis is imported when it is used: emulated, that takes seconds that no other test should pay for.
"""

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from unittest import mock

from dirty_tracking.sequences import (
    MOST_PAGES,
    MOST_WRITES,
    PLACES,
    SIZES,
    VCPUS,
    Clear,
    Collect,
    Create,
    Delete,
    Get,
    Harvest,
    HistoryFailed,
    HostWrite,
    Load,
    Move,
    Reset,
    SetTracking,
    Step,
    Write,
)

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

# What a history begins with; the first is the simplest. Two slots side by side are the usual case.
_ONE = (Create(1, 0, SIZES[0]),)
_TWO = (*_ONE, Create(2, 1, MOST_PAGES))
_BEGINNINGS = (_ONE, _TWO, _TWO, _TWO)
# A ring in which little is left, which no list of steps comes to by chance
_NEARLY_FULL = (
    *_TWO,
    *(Write(1, range(first, first + 35)) for first in (0, 35)),
    *(Write(2, range(first, first + MOST_WRITES)) for first in (0, MOST_WRITES, 2 * MOST_WRITES)),
)
# At its end nothing may be left untold, nor told again.
_END = (Collect(), Collect())
_SLOTS = (1, 1, 2, 3)  # the first is always there at the beginning
# Histories of a round: as many as Hypothesis makes up freely. From the next on it makes most by repeating parts of one that it
# had, which finds less here than new ones do.
_EXAMPLES = 10
_PARTS = 6
_EDGES = (0, 1, 62, 63, 64, 65, 69, 127, 128, 129)  # around 64-page words, and the ends of slots


def search(
    run: Callable[[Sequence[Step]], object], rings: bool, seeds: Iterable[int]
) -> tuple[int, HistoryFailed] | None:
    """Run a round of histories for each seed, until one fails.

    :param run: makes a history
    :param rings: the histories are for a mode with rings, not with bitmaps
    :returns: the round's seed, and the shortest history that fails; None when none does
    """
    for seed in seeds:
        if (failure := _round(run, rings, seed)) is not None:
            return seed, failure
    return None


def _round(run: Callable[[Sequence[Step]], object], rings: bool, seed: int) -> HistoryFailed | None:
    from hypothesis import Phase, find, settings
    from hypothesis.errors import Flaky, NoSuchExample

    failures: list[HistoryFailed] = []

    def fails(steps: Sequence[Step]) -> bool:
        try:
            run(steps)
        except HistoryFailed as failure:
            failures.append(failure)
            return True
        return False

    how = settings(max_examples=_EXAMPLES, database=None, deadline=None, phases=(Phase.generate, Phase.shrink))
    with _seed_alone_decides():
        try:
            find(histories(rings), fails, settings=how, random=random.Random(seed))
        except NoSuchExample:
            return None
        except Flaky:
            failures[0].add_note("The same history did not fail each time.")
            return failures[0]
    return _without_needless_steps(run, failures[-1])


def _without_needless_steps(run: Callable[[Sequence[Step]], object], failure: HistoryFailed) -> HistoryFailed:
    """Leave out each step without which the history fails as well: Hypothesis now and then leaves one."""
    index = 0
    while index < len(failure.history.steps):
        try:
            run(failure.history.steps[:index] + failure.history.steps[index + 1 :])
        except HistoryFailed as shorter:
            failure, index = shorter, 0
        else:
            index += 1
    return failure


@contextmanager
def _seed_alone_decides() -> Iterator[None]:
    """Keep Hypothesis from what it does with all modules of the program that happen to be loaded.

    It takes numbers from their sources to try them too, so that other histories would come of a seed where other tests ran
    before, or where there are no sources; and it keeps what it found there in a folder ``.hypothesis``.
    """
    from hypothesis.internal.conjecture import providers
    from hypothesis.internal.constants_ast import Constants

    with mock.patch.object(providers, "_get_local_constants", Constants):
        yield


def histories(rings: bool) -> "SearchStrategy[tuple[Step, ...]]":
    """Histories for modes with rings, or with bitmaps."""
    from hypothesis import strategies as st

    def weighted(*strategies: "tuple[SearchStrategy[Any], int]") -> "SearchStrategy[Any]":
        # one_of() looks at each of its strategies once, however often it is given.
        return st.sampled_from([strategy for strategy, weight in strategies for _ in range(weight)]).flatmap(
            lambda strategy: strategy
        )

    vcpus, slots, places = st.sampled_from(range(VCPUS)), st.sampled_from(_SLOTS), st.sampled_from(range(PLACES))
    one = st.sampled_from(_EDGES) | st.integers(0, MOST_PAGES - 1)
    some = st.lists(one, min_size=1, max_size=8, unique=True).map(tuple)
    runs = st.builds(lambda first, count: range(first, first + count), one, st.integers(1, MOST_WRITES))
    pages = some | runs
    writes = st.builds(Write, slots, pages, vcpus)
    creates = st.builds(Create, slots, places, st.sampled_from(SIZES), st.sampled_from((True, True, True, False)))
    life = st.builds(SetTracking, slots, st.booleans()) | creates | st.builds(Move, slots, places)
    taking: SearchStrategy[Step]
    if rings:
        taking = st.builds(Harvest, vcpus, st.integers(0, 20)) | st.builds(Reset) | st.builds(Collect)
    else:
        words = st.sampled_from((64, 128, 192))
        masks = some | st.just(range(MOST_PAGES)) | st.just(range(0, MOST_PAGES, 2))
        clears = st.builds(Clear, slots, st.sampled_from((0, 64, 128)), words, masks)
        taking = weighted((clears, 2), (st.builds(Get, slots), 1), (st.builds(Collect), 1))
    quiet = st.builds(Load, slots, pages, vcpus) | st.builds(HostWrite, slots, pages)
    steps = st.lists(weighted((writes, 4), (taking, 3), (life, 2), (quiet, 1)), max_size=8)
    # What hardly comes about by chance, and is worth more than its share
    off_and_on = st.builds(lambda write: [SetTracking(write.slot, False), write, SetTracking(write.slot, True)], writes)
    deleted = st.builds(lambda create: [Delete(create.slot), create], creates)
    # So many parts, each of which may become empty: a list of any length would most often be short.
    part = weighted((steps, 5), (off_and_on, 1), (deleted, 1))
    body = st.tuples(*(part for _ in range(_PARTS)))
    return st.builds(
        lambda beginning, parts: (*beginning, *(step for part in parts for step in part), *_END),
        st.sampled_from((*_BEGINNINGS, _NEARLY_FULL) if rings else _BEGINNINGS),
        body,
    )
