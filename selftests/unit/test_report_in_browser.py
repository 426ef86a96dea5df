# SPDX-License-Identifier: GPL-2.0-only
"""The HTML report in a real browser: phone and desktop, light and dark, by keyboard, and as assistive technology sees it."""

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("jinja2", reason="Jinja2 is not installed (make report, or make lint, installs it)")
pytest.importorskip("pygal", reason="pygal is not installed (make report, or make lint, installs it)")

from harness.report.__main__ import main
from selftests.unit.chromium import PROGRAM, Page, browser
from selftests.unit.saved_runs import cell, figures, kernel_report, row, save_failure, save_run

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PROGRAM is None, reason="no Chromium on this machine (apt install chromium)"),
]

PHONE, DESKTOP = 360, 1280
WIDTHS = pytest.mark.parametrize("width", [PHONE, DESKTOP], ids=["phone", "desktop"])
SCHEMES = pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
OPEN_ALL = "document.querySelectorAll('details').forEach(details => details.open = true)"

# The texts and the lines of plots that stand out from what is behind them by less than WCAG's contrast of AA
FAINT = """
(() => {
  const context = new OffscreenCanvas(1, 1).getContext("2d", {willReadFrequently: true});
  function rgb(colour) {
    context.clearRect(0, 0, 1, 1);
    context.fillStyle = colour;
    context.fillRect(0, 0, 1, 1);
    return [...context.getImageData(0, 0, 1, 1).data];
  }
  function luminance(colour) {
    const [r, g, b] = rgb(colour).slice(0, 3).map(part => part / 255).map(
      part => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  }
  function background(element) {
    for (; element; element = element.parentElement) {
      const colour = getComputedStyle(element).backgroundColor;
      if (rgb(colour)[3] == 255) return colour;
    }
    return "white";
  }
  function contrast(element, colour) {
    const [low, high] = [luminance(colour), luminance(background(element))].sort((a, b) => a - b);
    return (high + 0.05) / (low + 0.05);
  }
  const found = new Set();
  let looked = 0;
  function look(element, colour, least) {
    looked++;
    if (contrast(element, colour) < least)
      found.add(`${element.localName}.${element.getAttribute("class")}: ${contrast(element, colour).toFixed(2)}`);
  }
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (texts.nextNode()) {
    const element = texts.currentNode.parentElement;
    if (!texts.currentNode.data.trim() || !element.checkVisibility() || element.closest("script")) continue;
    const style = getComputedStyle(element);
    look(element, element.ownerSVGElement ? style.fill : style.color, 4.5);
  }
  for (const line of document.querySelectorAll("svg .series path")) look(line, getComputedStyle(line).stroke, 3);
  for (const bar of document.querySelectorAll("svg .series rect")) look(bar, getComputedStyle(bar).fill, 3);
  return [looked, ...found];
})()
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    """A page of a browser that all tests use."""
    with browser(tmp_path_factory.mktemp("browser")) as page:
        yield page


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report on eight runs with each kind of thing that a page can have."""
    folder = tmp_path_factory.mktemp("runs")
    long = "a_very_long_name_of_a_test_without_any_place_where_a_line_could_be_broken_" * 2
    failed = cell("dirty-ring-plain", 2, "FAIL", **figures(20))
    rounds = [{"copied": count} for count in (5000, 300, 4)]
    for number in range(8):
        verdicts = ["pass", "FAIL", "known bug", "known bug, not seen", "skipped", "not run"]
        tests = [row(f"memory/test_m.py::{long}[{verdict}]", verdict, "a reason") for verdict in verdicts]
        save_run(
            folder / f"{number}",
            cells=[cell(**figures(20, number + 1)), failed],
            tests=[*tests, row("x86_64/test_x.py::test_it", "skipped", "why")],
            kernel_log=[kernel_report("WARNING: CPU: 1 PID: 22 at arch/x86/kvm/mmu/mmu.c:1", failed["test"])],
            migrations={"t": {"name": "dirty-ring, 1 vCPU", "rounds": rounds, "verdict": "pass"}},
        )
        findings = [{"kind": "LOST", "pages": [1, 500]}, {"kind": "SPURIOUS", "pages": [900]}]
        save_failure(
            folder / f"{number}", failed["test"], findings, cell={"vcpus": 1}, history=["page 1: " + 9 * "late "]
        )
    output = folder / "report.html"
    assert main([*(str(folder / f"{number}") for number in range(8)), "--output", str(output)]) == 0
    return output


@WIDTHS
@SCHEMES
def test_page_as_wide_as_the_window(page: Page, file: Path, width: int, dark: bool) -> None:
    """With all details open nothing is wider than the window; what is scrolls in a region of its own."""
    page.open(file, width, dark)
    page.run(OPEN_ALL)
    assert page.run("document.documentElement.scrollWidth <= innerWidth") is True
    assert page.run("innerWidth") == width
    scrolling = "[...document.querySelectorAll('.region')].filter(region => region.scrollWidth > region.clientWidth)"
    assert page.run(f"{scrolling}.length") > 0
    # A region that scrolls has to be reached by keyboard.
    assert page.run(f"{scrolling}.every(region => region.tabIndex == 0 && region.ariaLabel)") is True


@SCHEMES
def test_contrast_of_texts_and_lines(page: Page, file: Path, dark: bool) -> None:
    """All texts have a contrast of 4.5 with their background, and lines and bars one of 3, in both schemes."""
    page.open(file, DESKTOP, dark)
    page.run(OPEN_ALL)
    looked, *faint = page.run(FAINT)
    assert looked > 500
    assert faint == []
    background = page.run("getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(255, 255, 255)") is not dark


@WIDTHS
def test_details_by_keyboard(page: Page, file: Path, width: int) -> None:
    """Tab reaches a field of the matrix; Enter opens what it leads to and goes there, and Enter closes it again."""
    page.open(file, width, dark=False)
    page.press("Tab")
    assert page.run("document.activeElement.className") == "skip"
    assert page.run("document.activeElement.getBoundingClientRect().left >= 0") is True
    for _ in range(100):
        page.press("Tab")
        if page.run("document.activeElement.matches('#matrix td a')"):
            break
    outline = page.run("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"
    target = page.run("document.activeElement.hash.slice(1)")
    details = f"document.getElementById('{target}')"
    assert page.run(f"{details}.open") is False
    page.press("Enter")
    page.wait_for(f"{details}.open && document.activeElement === {details}.querySelector('summary')")
    assert page.run(f"{details}.getBoundingClientRect().top < innerHeight") is True
    page.press("Enter")
    page.wait_for(f"!{details}.open")


def test_failure_is_opened_by_its_link(page: Page, file: Path) -> None:
    """The verdict of a failed cell leads to its failure report within the details of the cell, also from elsewhere."""
    page.open(file, DESKTOP, dark=False)
    page.run("[...document.querySelectorAll('#matrix td a')].find(link => link.text == 'FAIL').click()")
    page.wait_for("location.hash && document.querySelector(location.hash).matches('details[open] .report[open]')")
    target = page.run("location.hash.slice(1)")
    page.open(file, DESKTOP, dark=False, fragment=target)
    assert page.run(f"document.querySelector('#{target} .map').checkVisibility()") is True


def test_page_loads_nothing_else(page: Page, file: Path) -> None:
    """The browser asks for no other file or address, and has no error or warning to report."""
    page.open(file, DESKTOP, dark=False)
    page.run(OPEN_ALL)
    asked = [
        event["params"]["request"]["url"] for event in page.events if event["method"] == "Network.requestWillBeSent"
    ]
    assert asked == [file.as_uri()]
    complaints = ("Log.entryAdded", "Runtime.exceptionThrown", "Runtime.consoleAPICalled")
    assert [event for event in page.events if event["method"] in complaints] == []


def test_names_in_the_accessibility_tree(page: Page, file: Path) -> None:
    """Each link, image, region and heading has a name, the fields of tables have headers, and the page a language."""
    page.open(file, DESKTOP, dark=False)
    page.run(OPEN_ALL)
    nodes: list[dict[str, Any]] = [
        node for node in page.call("Accessibility.getFullAXTree")["nodes"] if not node["ignored"]
    ]
    names: dict[str, list[str]] = {}
    for node in nodes:
        names.setdefault(node["role"]["value"], []).append(node.get("name", {}).get("value", ""))
    for role in ("RootWebArea", "heading", "link", "region", "navigation", "image", "rowheader", "columnheader"):
        assert names.get(role), f"no {role}"
        assert all(names[role]), f"a {role} without a name"
    assert "run 1 6.12.1" in names["columnheader"]
    assert "dirty-log 48bit-4k anonymous forced sparse 1 vCPU" in names["rowheader"]
    assert "Fullest ring per iteration, in percent, as in the figures that follow" in names["image"]
    assert page.run("document.documentElement.lang") == "en"
    levels = page.run("[...document.querySelectorAll('h1, h2, h3')].map(heading => +heading.localName[1])")
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(later - earlier <= 1 for earlier, later in pairwise(levels))
