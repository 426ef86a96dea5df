# SPDX-License-Identifier: GPL-2.0-only
"""Histories that are made up by Hypothesis, and the shortest that fails.

Hypothesis is imported when it is used: emulated, that takes seconds that no other test should pay for.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING
from unittest import mock

from lib.history import (
    MOST_PAGES,
    MOST_WRITES,
    PLACES,
    SIZES,
    SLOTS,
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
_EDGES = (0, 1, 62, 63, 64, 65, 69, 127, 128, 129)  # around 64-page words, and the ends of slots


def shortest_failure(
    run: Callable[[Sequence[Step]], object], rings: bool, seed: int, examples: int
) -> HistoryFailed | None:
    """Run *examples* histories, and return the shortest that fails; None when none does.

    :param run: makes a history
    :param rings: the histories are for a mode with rings, not with bitmaps
    :param seed: decides the histories
    """
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

    how = settings(max_examples=examples, database=None, deadline=None, phases=(Phase.generate, Phase.shrink))
    with _seed_alone_decides():
        try:
            find(histories(rings), fails, settings=how, random=random.Random(seed))
        except NoSuchExample:
            return None
        except Flaky:
            failures[0].add_note("The same history did not fail each time.")
            return failures[0]
    return failures[-1]


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

    vcpus, slots, places = st.sampled_from(range(VCPUS)), st.sampled_from(SLOTS), st.sampled_from(range(PLACES))
    one = st.sampled_from(_EDGES) | st.integers(0, MOST_PAGES - 1)
    some = st.lists(one, min_size=1, max_size=8, unique=True).map(tuple)
    runs = st.builds(lambda first, count: range(first, first + count), one, st.integers(1, MOST_WRITES))
    pages = some | runs
    writes = st.builds(Write, slots, pages, vcpus)
    life = st.one_of(
        st.builds(SetTracking, slots, st.booleans()),
        st.builds(Create, slots, places, st.sampled_from(SIZES), st.sampled_from((True, True, True, False))),
        st.builds(Move, slots, places),
        st.builds(Delete, slots),
    )
    taking: SearchStrategy[Step]
    if rings:
        taking = st.builds(Harvest, vcpus, st.integers(0, 20)) | st.builds(Reset) | st.builds(Collect)
    else:
        words = st.sampled_from((64, 128, 192))
        masks = some | st.just(range(MOST_PAGES)) | st.just(range(0, MOST_PAGES, 2))
        clears = st.builds(Clear, slots, st.sampled_from((0, 64, 128)), words, masks)
        taking = clears | st.builds(Get, slots) | st.builds(Collect)
    step = st.one_of(
        writes, writes, taking, taking, life, st.builds(Load, slots, pages, vcpus), st.builds(HostWrite, slots, pages)
    )
    # Lists of lists become longer than lists do, and shrink as well.
    body = st.lists(st.lists(step, max_size=10), max_size=10).map(
        lambda parts: tuple(s for part in parts for s in part)
    )
    return st.builds(tuple.__add__, st.sampled_from(_BEGINNINGS), body)
