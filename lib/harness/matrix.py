# SPDX-License-Identifier: GPL-2.0-only
"""The test matrix: all combinations of the dimensions' values, or a pairwise selection."""

from collections.abc import Mapping, Sequence
from itertools import combinations, product
from typing import Any

from dirty_tracking.cell import Cell

Dimensions = Mapping[str, Sequence[Any]]


def full_matrix(dimensions: Dimensions) -> list[Cell]:
    """Every combination of the dimensions' values."""
    return [Cell(**dict(zip(dimensions, values, strict=True))) for values in product(*dimensions.values())]


def pairwise_matrix(dimensions: Dimensions) -> list[Cell]:
    """A small set of cells that covers every pair of values of two dimensions.

    Greedy and deterministic: a cell starts with the first uncovered pair; each further dimension takes the value that covers
    most new pairs.
    """
    names = list(dimensions)
    missing = {
        ((first, one), (second, two)): None
        for first, second in combinations(names, 2)
        for one in dimensions[first]
        for two in dimensions[second]
    }
    cells = []
    while missing:
        chosen: dict[str, Any] = dict(next(iter(missing)))
        for name in names:
            if name not in chosen:
                chosen[name] = max(dimensions[name], key=lambda value: _new_pairs(missing, names, chosen, name, value))
        for first, second in combinations(names, 2):
            missing.pop(((first, chosen[first]), (second, chosen[second])), None)
        cells.append(Cell(**chosen))
    return cells


def _new_pairs(missing: Mapping[Any, None], names: list[str], chosen: Mapping[str, Any], name: str, value: Any) -> int:
    """How many uncovered pairs *value* forms with the values in *chosen*."""
    ahead = names.index(name)
    return sum(
        (
            ((other, chosen[other]), (name, value))
            if names.index(other) < ahead
            else ((name, value), (other, chosen[other]))
        )
        in missing
        for other in chosen
    )
