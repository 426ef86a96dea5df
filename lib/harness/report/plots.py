# SPDX-License-Identifier: GPL-2.0-only
"""The report's plots: SVG without style, which the page's style sheet colours, and the same figures as a table."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from statistics import median
from typing import Any
from xml.etree import ElementTree

import pygal

from kvm_util.wording import counted

# More lines than these cannot be told apart: their range is shown instead.
_MOST_SERIES = 6
# More points than these are thinned out.
_MOST_POINTS = 60
_MOST_LABELS = 8
_WIDTH, _HEIGHT, _FONT = 360, 210, 11
_LONG_NUMBER = re.compile(r"\d+\.\d+")

Series = Mapping[str, Sequence[float | None]]


@dataclass(frozen=True)
class Plot:
    """A plot, and its figures for those who cannot see it.

    :ivar svg: an element ``<svg>``; all names in it are escaped
    :ivar x_labels: what the points are of
    :ivar series: the values of each line or group of bars, which are None where there is none
    """

    title: str
    svg: str
    x_title: str
    x_labels: Sequence[str]
    series: Series

    @property
    def rows(self) -> list[tuple[str, Sequence[float | None]]]:
        """The figures by point: what it is of, and the value of each series."""
        return list(zip(self.x_labels, zip_longest(*self.series.values()), strict=True))


def line_plot(title: str, x_title: str, series: Series, first: int = 1) -> Plot:
    """A plot of values by number, the first of which is *first*."""
    plot = _numbered(title, x_title, series, first)
    return _drawn(plot, pygal.Line(**_options(plot), **_few_labels(plot), include_x_axis=True))


def logarithmic_line_plot(title: str, x_title: str, series: Series, first: int = 1) -> Plot:
    """The same on a logarithmic scale, on which zeros are left out."""
    plot = _numbered(title, x_title, series, first)
    return _drawn(plot, pygal.Line(**_options(plot), **_few_labels(plot), **_logarithmic(plot, lowest=None)))


def bar_plot(title: str, x_title: str, names: Sequence[str], series: Series) -> Plot:
    """A plot of positive values by name, on a logarithmic scale."""
    plot = Plot(title, "", x_title, names, _folded(series))
    # The shortest bar has to be seen, too.
    shortest = min(_positive(plot))
    return _drawn(plot, pygal.Bar(**_options(plot), **_logarithmic(plot, lowest=shortest / 2)))


def _numbered(title: str, x_title: str, series: Series, first: int) -> Plot:
    step = -(-max(map(len, series.values())) // _MOST_POINTS)
    shown = _folded({name: values[::step] for name, values in series.items()})
    numbers = [str(first + step * index) for index in range(max(map(len, shown.values())))]
    return Plot(title, "", x_title, numbers, shown)


def _folded(series: Series) -> Series:
    """*series*, or if they are too many, the lowest, the middle and the highest of their values at each point."""
    if len(series) <= _MOST_SERIES:
        return series
    points = [[value for value in values if value is not None] for values in zip_longest(*series.values())]
    runs = counted(len(series), "run")
    return {
        f"{name} of {runs}": [function(values) if values else None for values in points]
        for name, function in (("lowest", min), ("median", median), ("highest", max))
    }


def _positive(plot: Plot) -> list[float]:
    return [value for values in plot.series.values() for value in values if value]


def _options(plot: Plot) -> dict[str, Any]:
    style = pygal.style.Style(label_font_size=_FONT, major_label_font_size=_FONT, legend_font_size=_FONT)
    return {
        "js": (), "css": (), "no_prefix": True, "style": style, "width": _WIDTH, "height": _HEIGHT, "margin": 4,
        "legend_at_bottom": True, "legend_at_bottom_columns": 2, "legend_box_size": 9, "truncate_legend": 24,
        "x_labels": plot.x_labels, "truncate_label": 24, "y_labels_major_count": 3, "max_scale": 6,
    }  # fmt: skip


def _few_labels(plot: Plot) -> dict[str, Any]:
    return {"x_labels_major_every": -(-len(plot.x_labels) // _MOST_LABELS), "show_minor_x_labels": False}


def _logarithmic(plot: Plot, lowest: float | None) -> dict[str, Any]:
    """A logarithmic scale that begins at *lowest*, or at the smallest value; with a label or three for each power of ten."""
    known = _positive(plot) or [1]
    low, high = lowest or min(known), max(known)
    powers = [10.0**power for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)]
    digits = (1, 2, 5) if high < 100 * low else (1,)
    labels = [digit * power for power in powers for digit in digits if low <= digit * power <= high]
    return {"logarithmic": True, "zero": low, "range": (low, high), "y_labels": labels}


def _drawn(plot: Plot, chart: Any) -> Plot:
    """*plot* with its drawing."""
    for name, values in plot.series.items():
        drawn = [value or None for value in values] if chart.config.logarithmic else values
        chart.add(name, drawn, show_dots=len(drawn) - drawn.count(None) == 1)  # of one point there is no line
    return replace(plot, svg=_svg(chart.render_tree(), plot.title))


def _svg(root: ElementTree.Element, title: str) -> str:
    """The drawing alone: the page has one style sheet, no script, and a table in place of what shows under a mouse."""
    for parent in list(root.iter()):
        parent.attrib.pop("id", None)
        for child in list(parent):
            is_comment = not isinstance(child.tag, str)
            is_empty_overlay = "overlay" in child.get("class", "") and child.find(".//circle") is None
            if is_comment or is_empty_overlay or child.tag in ("defs", "title", "desc"):
                parent.remove(child)
    root.attrib |= {"role": "img", "aria-label": f"{title}, as in the figures that follow"}
    for element in root.iter():
        for attribute in ("d", "x", "y", "cx", "cy", "width", "height", "transform"):
            if text := element.get(attribute):
                element.set(attribute, _LONG_NUMBER.sub(lambda number: f"{float(number[0]):.1f}", text))
    return ElementTree.tostring(root, encoding="unicode")
