# SPDX-License-Identifier: GPL-2.0-only
"""The cells of a run from the values of each dimension: all combinations, or a pairwise selection."""

from collections.abc import Mapping, Sequence
from itertools import combinations, product
from typing import Any

from dirty_tracking.cell import Cell

Dimensions = Mapping[str, Sequence[Any]]


def all_cells(dimensions: Dimensions) -> list[Cell]:
    """Every combination of the dimensions' values."""
    return [Cell(**dict(zip(dimensions, values, strict=True))) for values in product(*dimensions.values())]


def pairwise_cells(dimensions: Dimensions) -> list[Cell]:
    """A small set of cells that covers every pair of values of two dimensions.

    Greedy and deterministic: a cell starts with the first uncovered pair; each further dimension takes the value that covers
    most new pairs.
    """
    # A pair is ((dimension, value), (dimension, value)), in the order of the dimensions.
    uncovered = dict.fromkeys(
        pair
        for first, second in combinations(dimensions, 2)
        for pair in product(product([first], dimensions[first]), product([second], dimensions[second]))
    )

    def pairs_of(values: Mapping[str, Any]) -> set[Any]:
        in_order = [(name, values[name]) for name in dimensions if name in values]
        return uncovered.keys() & set(combinations(in_order, 2))

    cells = []
    while uncovered:
        chosen: dict[str, Any] = dict(next(iter(uncovered)))
        for name in dimensions:
            if name not in chosen:
                chosen[name] = max(dimensions[name], key=lambda value: len(pairs_of(chosen | {name: value})))
        for pair in pairs_of(chosen):
            del uncovered[pair]
        cells.append(Cell(**chosen))
    return cells
