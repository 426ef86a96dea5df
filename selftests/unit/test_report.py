# SPDX-License-Identifier: GPL-2.0-only
"""``make report``: what the HTML file has of the runs, in which form, and how it stays small and alone."""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("jinja2", reason="Jinja2 is not installed (make report, or make lint, installs it)")
pytest.importorskip("pygal", reason="pygal is not installed (make report, or make lint, installs it)")

from harness.report.__main__ import main
from harness.report.page import render
from harness.report.plots import bar_plot, line_plot, logarithmic_line_plot
from harness.report.saved import ReportedRun
from runner import ROOT
from selftests.unit.commands import ONE_CELL, QUICK, pytest_command, start
from selftests.unit.mutants.faults import LOSING_PLUGIN
from selftests.unit.saved_runs import cell, figures, kernel_report, row, save_failure, save_journal, save_run

HOSTILE = "</script></pre><img src=//evil/x onerror=alert(1)> \"'&<b>"


class Document(HTMLParser):
    """A page as its parser sees it.

    :ivar elements: all elements, in order: their names and attributes
    :ivar text: all text
    """

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._fields: list[tuple[str, list[str]]] = []  # of tables: class and text
        self._in_field = False
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag in ("td", "th"):
            self._fields.append((dict(attrs).get("class") or "", []))
        self._in_field = tag in ("td", "th") or (self._in_field and tag not in ("tr", "tbody"))

    def handle_endtag(self, tag: str) -> None:
        self._in_field = self._in_field and tag != "table"

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._in_field:
            self._fields[-1][1].append(data)

    @property
    def fields(self) -> list[tuple[str, str]]:
        """The fields of all tables: class, and text with white space made one space."""
        return [(name, " ".join("".join(text).split())) for name, text in self._fields]

    @property
    def texts(self) -> set[str]:
        """The texts of all fields of tables."""
        return {text for _, text in self.fields}

    def classes(self, text: str) -> set[str]:
        """The classes of the fields with this text."""
        return {name for name, field in self.fields if field == text}

    def attributes(self, name: str) -> list[str]:
        """The values of an attribute, of all elements."""
        return [value for _, attributes in self.elements if (value := attributes.get(name)) is not None]


def report(*folders: Path) -> tuple[str, Document]:
    """The page about runs."""
    page = render([ReportedRun.load(folder) for folder in folders])
    return page, Document(page)


def test_verdicts_in_words_and_colour(tmp_path: Path) -> None:
    """Cells, areas and test functions have a row each, and a field for each run that has words as well as a colour."""
    tests = [row("interface/test_a.py::test_x[1]"), row("interface/test_a.py::test_x[2]", "FAIL")]
    save_run(tmp_path / "a", cells=[cell(**figures())], tests=tests[:1])
    skipped = row("memory/test_b.py::test_y", "skipped", "no such feature")
    save_run(tmp_path / "b", cells=[cell(verdict="known bug", reason="some-bug")], tests=[*tests, skipped])
    _, document = report(tmp_path / "a", tmp_path / "b")
    assert document.classes("known bug") == {"v-known-bug"}
    assert document.classes("pass") == {"v-pass"}
    assert document.classes("1 passed, 1 failed") == {"v-fail"}
    assert document.classes("FAIL 1 of 2") == {"v-fail"}
    assert document.classes("1 skipped") == {"v-skipped"}
    assert document.classes("none") == {"none"}
    assert "dirty-log 48bit-4k anonymous forced sparse 1 vCPU" in document.texts
    assert "test_a.py::test_x" in document.texts
    assert "skipped no such feature: test_b.py::test_y" in " ".join(document.text.split())
    assert document.classes("regression, 1 newly failing, 1 newly with a known bug, 1 new") == {"v-fail"}


def test_figures_of_a_cell(tmp_path: Path) -> None:
    """The details of a cell have its figures, the times of its collections, and the command that runs it again."""
    machine = {"image": "/boot/vmlinuz-6.12", "parameters": {"kvm_amd.npt": "0"}, "qemu": "10.0", "emulated": True}
    _, document = report(save_run(tmp_path / "a", cells=[cell(**figures())], machine=machine))
    for text in ("12345", "4322", "0.125", "0.25 / 0.75 / 2.5"):
        assert text in document.texts, text
    command = (
        ".venv/bin/python -m pytest --kernel=/boot/vmlinuz-6.12 --kvm-params=kvm_amd.npt=0 selftests/matrix/test_dirty_log.py"
        " --log-mode dirty-log --guest-mode 48bit-4k --backing anonymous --stop forced --density sparse --vcpus 1"
    )
    assert command in document.text


def test_links_lead_to_one_place(tmp_path: Path) -> None:
    """Each link leads to an element of the page, and no two elements have the same id."""
    failed = cell(verdict="FAIL")
    for name in "ab":
        save_run(
            tmp_path / name, cells=[failed, cell("dirty-ring", **figures())], tests=[row("memory/t.py::test_x", "FAIL")]
        )
    _, document = report(tmp_path / "a", tmp_path / "b")
    ids = document.attributes("id")
    assert len(ids) == len(set(ids))
    links = document.attributes("href")
    assert len(links) > 20
    assert {link for link in links if link not in {f"#{name}" for name in ids}} == set()


def test_report_of_a_violation(tmp_path: Path) -> None:
    """A violation has its message, a map of the slot that tells lost from spurious pages, command, history and log."""
    failed = cell(verdict="FAIL")
    folder = save_run(tmp_path / "a", cells=[failed], kernel_log=[kernel_report("WARNING", failed["test"])])
    lost, spurious = {"kind": "LOST", "pages": [0, 1, 130]}, {"kind": "SPURIOUS", "pages": [2, 1001]}
    of_cell = {
        "cell": {"log_mode": "dirty-log"},
        "message": "LOST [R1]: 3 pages",
        "history": ["page 0: never reported"],
    }
    save_failure(folder, failed["test"], [lost, spurious], **of_cell)
    page, document = report(folder)
    plain = re.search(r'<pre class="map"[^>]*>(.*?)</pre>', page, re.DOTALL)
    assert plain is not None
    rows = re.sub(r"<[^>]*>", "", plain[1]).split()
    # 1024 pages, two a character
    assert [len(line) for line in rows] == [64] * 8
    assert rows[0] == "LS" + 62 * "." and rows[1] == ".L" + 62 * "." and rows[7] == 52 * "." + "S" + 11 * "."
    assert '<span class="mark-L">L</span><span class="mark-S">S</span>' in plain[1]
    for text in ("LOST [R1]: 3 pages", "2 pages a character", "pytest it", "page 0: never reported"):
        assert text in document.text, text
    assert document.text.count("line of WARNING") == 2  # with the run, and with the test


def test_failure_without_a_file(tmp_path: Path) -> None:
    """A failure that is no violation has the text and the command from the journal, also of a run that died."""
    failed = row("memory/test_b.py::test_y", "FAIL")
    folder = save_run(tmp_path / "a", tests=[failed, row("memory/test_b.py::test_z", "FAIL")])
    save_journal(folder, failed["test"], "E assert 1 == 2", "pytest that")
    _, document = report(folder)
    assert "E assert 1 == 2" in document.text
    assert "pytest that" in document.text
    assert document.text.count("The results have no report of it.") == 1


def test_run_data_is_escaped(tmp_path: Path) -> None:
    """Whatever the names and texts of a run have in them, the page has the elements that it has without it."""
    pages = []
    for name, text in (("a", "plain"), ("b", HOSTILE)):
        failed = cell(verdict="FAIL", reason=text, **figures())
        rounds = [{"copied": 3}]
        folder = save_run(
            tmp_path / name,
            cells=[failed],
            tests=[row(f"memory/t.py::test_x[{text}]", "FAIL", text)],
            kernel_log=[kernel_report(text, failed["test"])],
            migrations={"t": {"name": text, "rounds": rounds, "verdict": "pass"}},
            host={"kernel": text, "backend": text, "cpu": text, "parameters": {text: text}},
            end={"ending": "PANIC", "text": text, "console": [text]},
        )
        finding = {"kind": "LOST", "pages": [3], "detail": text}
        save_failure(folder, failed["test"], [finding], message=text, reproduce=text, history=[text])
        pages.append(report(folder))
    (_, plain), (hostile_page, hostile) = pages
    assert [tag for tag, _ in hostile.elements] == [tag for tag, _ in plain.elements]
    assert "<img" not in hostile_page
    assert hostile.text.count(HOSTILE) > 10


def test_page_needs_nothing_else(tmp_path: Path) -> None:
    """The page names no other file and no address, and forbids the browser to load any."""
    page, document = report(save_run(tmp_path / "a", cells=[cell(**figures())]))
    assert [value for name in ("src", "srcset", "data", "action") for value in document.attributes(name)] == []
    assert not re.search(r"url\(|@import|import\(|fetch\(", page)
    assert [tag for tag, _ in document.elements if tag in ("link", "iframe", "object", "base")] == []
    assert document.attributes("content")[1].startswith("default-src 'none';")


def test_plots_and_their_figures(tmp_path: Path) -> None:
    """Each plot has a name, and a table with the figures that it shows: of iterations, collections and migrations."""
    rounds = [{"copied": 2345}, {"copied": 0}]
    migrations = {"t": {"name": "dirty-ring, 1 vCPU", "rounds": rounds, "verdict": "pass"}}
    folder = save_run(tmp_path / "a", cells=[cell("dirty-ring", **figures())], migrations=migrations)
    _, document = report(folder)
    titles = [
        "Dirty pages per iteration", "Fullest ring per iteration, in percent",
        "Latency of collections, 99th percentile, in ms", "dirty-ring, 1 vCPU: pages copied",
    ]  # fmt: skip
    drawings = [attributes for tag, attributes in document.elements if tag == "svg"]
    assert [drawing["aria-label"] for drawing in drawings] == [
        f"{title}, as in the figures that follow" for title in titles
    ]
    assert {drawing["role"] for drawing in drawings} == {"img"}
    for value in ("103", "50.3", "0.75", "2345"):
        assert value in document.texts, value


def test_many_lines_become_their_range() -> None:
    """A plot with more lines than can be told apart has the lowest, the median and the highest at each point."""
    few = {f"run {number}": [number, 10 * number, None] for number in range(6)}
    assert line_plot("t", "x", few).series == few
    many = few | {"run 6": [50, 60, 70]}
    assert line_plot("t", "x", many).series == {
        "lowest of 7 runs": [0, 0, 70],
        "median of 7 runs": [3, 30, 70],
        "highest of 7 runs": [50, 60, 70],
    }


def test_drawn_points_of_a_plot() -> None:
    """A line has a point for each value, or for each of a sample; a logarithmic scale leaves out zeros."""
    path = re.compile(r'<path d="(M[^"]*)" class="line reactive nofill"')
    drawn = path.findall(line_plot("t", "x", {"a": [5, 0, 7]}).svg)
    assert [len(line.replace("L", "").split()) for line in drawn] == [6]
    drawn = path.findall(logarithmic_line_plot("t", "x", {"a": [500, 50, 0]}).svg)
    assert [len(line.replace("L", "").split()) for line in drawn] == [4]
    long = line_plot("t", "x", {"a": list(range(600))})
    assert (long.x_labels[:2], long.series["a"][:2], len(long.x_labels)) == (["1", "11"], [0, 10], 60)
    bars = re.findall(
        r'<rect [^>]*height="([\d.]+)" class="rect', bar_plot("t", "x", ["get"], {"a": [0.5], "b": [8.0]}).svg
    )
    assert 0 < float(bars[0]) < float(bars[1])


@pytest.mark.slow
@pytest.mark.parametrize("verdict", ["pass", "FAIL"])
def test_fifty_runs_stay_small(tmp_path: Path, verdict: str) -> None:
    """A report on 50 runs of 1300 tests takes less than 2 MB, also if all of them failed; what it leaves out, it counts."""
    modes = ("dirty-log", "clear-log", "clear-log-unset", "dirty-ring", "dirty-ring-plain")
    folders = []
    for number in range(50):
        cells = [cell(mode, vcpus, verdict, **figures(32, number + 1)) for mode in modes for vcpus in range(1, 8)]
        tests = [
            row(f"{area}/test_{area}.py::test_a_property_{one}[{case}]", verdict)
            for area in ("interface", "memory", "concurrency", "x86_64") for one in range(100) for case in "abc"
        ]  # fmt: skip
        folder = save_run(tmp_path / f"{number}", cells=cells, tests=tests)
        folders.append(folder)
        for failed in [*cells, *tests][:: 10 if verdict == "FAIL" else 300]:
            finding = {"kind": "LOST", "pages": list(range(0, 1000, 2))}
            save_failure(
                folder, failed["test"], [finding], message="LOST\n" * 100, history=["page 1: " + 80 * "x"] * 16
            )
    page, document = report(*folders)
    assert 500_000 < len(page.encode()) < 2_000_000
    assert ("more failures and known bugs have no report here" in document.text) is (verdict == "FAIL")


def test_run_in_which_nothing_ran(tmp_path: Path) -> None:
    """A kernel that could not be tested has its place in the report, with the reason; it is compared with nothing."""
    save_run(tmp_path / "a", tests=[row("memory/t.py::test_x")])
    end = {"ending": "NOT_TESTED", "text": "it cannot be tested: no KVM in it", "console": []}
    save_run(tmp_path / "b", tests=[row("memory/t.py::test_x", "not run")], end=end)
    _, document = report(tmp_path / "a", tmp_path / "b")
    assert document.classes("cannot be compared") == {""}
    assert any(field.startswith("cannot be tested: no KVM in it") for field in document.texts)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (None, "results.json: No such file or directory"),
        ("{", "results.json is no results.json of a run"),
        ("[]", "results.json is no results.json of a run"),
        ({"cells": [{"log_mode": "dirty-log"}]}, "results.json is no results.json of a run"),
        ({"cells": [cell(phases={"get": {"p50": 1}})]}, "results.json is no results.json of a run"),
        ({"tests": [row("a/t.py::x", "fine")]}, "results.json is no results.json of a run"),
        ({"tests": [row("a/t.py::x", "FAIL")]}, "t-x.json is no report of a failed test"),
    ],
    ids=["none", "cut", "list", "cell", "phases", "verdict", "failure"],
)  # fmt: skip
def test_folder_that_is_no_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, Any] | str | None, message: str
) -> None:
    """A folder without the results of a run, or with malformed ones, is one line of error, status 2, and no file."""
    folder = save_run(tmp_path / "a", **change if isinstance(change, dict) else {})
    (folder / "t-x.json").write_text("{}")
    if change is None:
        (folder / "results.json").unlink()
    elif isinstance(change, str):
        (folder / "results.json").write_text(change)
    assert main([str(folder), "--output", str(tmp_path / "r.html")]) == 2
    out, error = capsys.readouterr()
    assert (out, len(error.splitlines())) == ("", 1)
    assert error.startswith("report: ") and message in error
    assert not (tmp_path / "r.html").exists()


def test_output_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An output that cannot be written is one line of error and status 2; one that can is named, with its size."""
    folder = str(save_run(tmp_path / "a", tests=[row("memory/t.py::test_x")]))
    assert main([folder, "--output", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"report: {tmp_path}: Is a directory\n"
    assert main([folder, "--output", str(tmp_path / "r.html")]) == 0
    assert re.fullmatch(r"\S+/r\.html: 0\.\d\d MB\n", capsys.readouterr().out)


def test_packages_that_are_missing(tmp_path: Path) -> None:
    """Without the packages that only the report needs, one line names one of them and the remedy, with status 2."""
    (tmp_path / "jinja2.py").write_text("raise ModuleNotFoundError(name='jinja2')")
    done = start([sys.executable, "-m", "harness.report", "x"], ROOT, PYTHONPATH=f"{tmp_path}:lib")
    assert done.returncode == 2
    assert done.stderr == "report: there is no Python package jinja2; `make report` installs it\n"


@pytest.mark.usefixtures("kvm")
def test_report_on_real_runs(tmp_path: Path) -> None:
    """A run with a planted fault, against one without, has figures of each iteration, and the map of the lost pages."""
    for name, plugin in (("a", ""), ("b", LOSING_PLUGIN)):
        command, environment = pytest_command(tmp_path / name, plugin)
        subprocess.run([*command, *ONE_CELL, *QUICK], env=environment, capture_output=True, check=False, timeout=60)
    folders = [tmp_path / name / "results" for name in "ab"]
    page, document = report(*folders)
    assert document.classes("regression, 1 newly failing") == {"v-fail"}
    (data,) = [json.loads(path.read_text()) for path in folders[1].glob("test_dirty_log-*.json")]
    assert "mark-L" in page
    assert data["reproduce"] in document.text
    sizes = json.loads((folders[0] / "results.json").read_text())["cells"][0]["dirty_by_iteration"]
    assert all(str(size) in document.texts for size in sizes)
