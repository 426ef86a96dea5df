# SPDX-License-Identifier: GPL-2.0-only
"""Which figures differ between two sets of runs by more than noise: a permutation test over all figures at once.

The unit is the run: what one run measures is one value for each figure, however often it was repeated within it. If there is
no difference, a run could as well be one of the other set. So all ways to share the runs between the sets are tried, and for
each the greatest |t| of any figure is noted, of the logarithms. A figure has moved if only few of these are as great as its
own |t|. Because each is the greatest of all figures, the level holds for all of them together, also where they depend on
each other (the single-step maxT method of Westfall and Young, "Resampling-Based Multiple Testing", 1993).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import comb
from statistics import median

LEVEL = 0.01  # the probability that any figure is said to have moved where none has
LEAST_CHANGE = 0.1  # as a share of the smaller median
# Of 5 and 5 runs there are 252 splits; at best a figure's and its mirror image are as great, and 2/252 < LEVEL.
FEWEST_RUNS = 5
_MOST_SPLITS = 20_000  # all are tried if there are no more (8 and 8 runs have 12,870), else so many at random
_ROUNDING = 1 - 1e-9  # the same split gives the same |t|, but for the order of additions

Figures = Mapping[str, float]


@dataclass(frozen=True)
class Moved:
    """A figure that differs.

    :ivar before: its median in the base runs
    :ivar now: its median in the new runs
    :ivar p: the probability of such a difference of any figure by chance
    """

    name: str
    before: float
    now: float
    p: float

    @property
    def rose(self) -> bool:
        """Whether it is greater now: where figures are times, slower."""
        return self.now > self.before

    def __str__(self) -> str:
        change = f"{self.before:.4g} -> {self.now:.4g}"
        return f"{self.name}: {change} ({self.now / self.before:.2f} times as much, p = {self.p:.4f})"


def common_figures(base: Sequence[Figures], new: Sequence[Figures]) -> list[str]:
    """The names of the figures that all runs have and that can be compared: those above 0, in the order of the first run."""
    runs = [*base, *new]
    return [name for name in runs[0] if all(run.get(name, 0) > 0 for run in runs)] if runs else []


def moved_figures(base: Sequence[Figures], new: Sequence[Figures]) -> list[Moved]:
    """The figures that all runs have and that moved by LEAST_CHANGE at least, at LEVEL; the least probable first.

    :param base: the figures of each run, by name; as *new*, at least :data:`FEWEST_RUNS`
    :raises ImportError: there is no scipy
    """
    # Packages of requirements-analysis.txt, without which all but this works
    import numpy
    from scipy.stats import permutation_test, ttest_ind

    assert min(len(base), len(new)) >= FEWEST_RUNS
    # One that never varies has no t.
    names = [name for name in common_figures(base, new) if len({run[name] for run in [*base, *new]}) > 1]
    if not names:
        return []
    before, now = (numpy.array([[run[name] for run in runs] for name in names]) for runs in (base, new))
    result = permutation_test(
        (numpy.log(before), numpy.log(now)),
        lambda one, other, axis: abs(ttest_ind(one, other, axis=axis).statistic),
        permutation_type="independent",
        vectorized=True,
        axis=-1,
        n_resamples=_MOST_SPLITS,
        rng=numpy.random.default_rng(1),
    )
    greatest = result.null_distribution.max(axis=-1)
    # Of all splits one is the runs' own; of some at random it counts besides.
    own = int(comb(len(base) + len(new), len(base)) > _MOST_SPLITS)
    found = []
    for name, size, *values in zip(names, result.statistic, before.tolist(), now.tolist(), strict=True):
        p = (int((greatest >= size * _ROUNDING).sum()) + own) / (len(greatest) + own)
        first, second = map(median, values)
        if p <= LEVEL and max(first, second) >= (1 + LEAST_CHANGE) * min(first, second):
            found.append(Moved(name, first, second, p))
    return sorted(found, key=lambda figure: figure.p)
