# SPDX-License-Identifier: GPL-2.0-only
"""The documentation agrees with the tree: examples run, links lead somewhere, and every option is described."""

import re
import sys
from pathlib import Path

import pytest

from harness import known_bugs
from harness.version import suite_version
from runner import ROOT
from selftests.unit.commands import CELLS, QUICK, Done, start

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
EXAMPLES = sorted((ROOT / "docs/examples").glob("[!_]*.py"))
BLOCK = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
TEMPLATE = "docs/examples/test_straddling_store.py"


def python(*arguments: str) -> Done:
    """Run this Python in the suite's folder."""
    return start([sys.executable, *arguments], ROOT, PYTHONPATH=f"{ROOT}:{ROOT}/lib")


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", BLOCK.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_of_a_page(page: Path) -> None:
    """Each relative link leads to a file of the tree and, where it names one, to a heading in it."""
    broken = []
    for link in re.findall(r"\]\((?!https?:)([^)]+)\)", BLOCK.sub("", page.read_text())):
        name, _, anchor = link.partition("#")
        target = (page.parent / name) if name else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert not broken


def test_length_of_the_readme() -> None:
    """The README is a page to begin with: 200 lines at most."""
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200


def test_change_log_has_the_version() -> None:
    """The newest section of CHANGELOG.md is the version's; between two releases it is "Unreleased"."""
    newest = re.search(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest is not None
    assert newest[1] == ("Unreleased" if ".dev" in suite_version() else suite_version())


def test_every_option_is_described() -> None:
    """docs/options.md has each option that the suite adds to pytest's."""
    groups = re.findall(r"^KVM dirty-page tracking.*?(?=^\S)", python("-m", "pytest", "--help").stdout, re.M | re.S)
    options = set(re.findall(r"^  (--[\w-]+)", "".join(groups), re.MULTILINE))
    assert len(options) > 20
    described = set(re.findall(r"`(--[\w-]+)", (ROOT / "docs/options.md").read_text()))
    assert sorted(options - described) == []


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.stem)
def test_example_is_shown_as_it_is(example: Path) -> None:
    """Each file of docs/examples/ stands in one of the pages, without its first line."""
    code = example.read_text().partition("\n")[2]
    assert any(f"```python\n{code}```\n" in page.read_text() for page in PAGES)


@pytest.mark.usefixtures("kvm")
def test_library_example() -> None:
    """The script of docs/library.md prints the two pages that its guest wrote."""
    done = python("docs/examples/dirty_bitmap.py")
    assert done.stdout == "[3, 7]\n", done.stderr


@pytest.mark.usefixtures("kvm")
@pytest.mark.parametrize(
    ("plugins", "status", "absent"), [([], 0, "failed"), (["-p", "docs.examples.planted_fault"], 1, "passed")]
)
def test_template_of_a_test(tmp_path: Path, plugins: list[str], status: int, absent: str) -> None:
    """The test of docs/extending.md passes on KVM, and fails in each log mode under the planted fault shown there."""
    done = python("-m", "pytest", *plugins, TEMPLATE, f"--results={tmp_path}")
    assert done.returncode == status, done.stdout + done.stderr
    assert absent not in done.stdout.splitlines()[-1]


@pytest.mark.usefixtures("kvm")
def test_log_mode_of_ones_own(tmp_path: Path) -> None:
    """The log mode of docs/extending.md takes part in the matrix once it is registered, and passes there."""
    plugin = ("-m", "pytest", "-p", "docs.examples.log_mode", f"--results={tmp_path}")
    done = python(*plugin, *CELLS, *QUICK, "--log-mode=clear-log-by-word", "--vcpus=1")
    assert "1 cell: 1 pass" in done.stdout, done.stdout + done.stderr


def test_entry_of_a_known_bug(tmp_path: Path) -> None:
    """The entry of docs/extending.md is one that the list takes."""
    (entry,) = re.findall(r"```toml\n(\[\[bug\]\]\n.*?)```", (ROOT / "docs/extending.md").read_text(), re.DOTALL)
    path = tmp_path / "known_bugs.toml"
    path.write_text(entry)
    assert len(known_bugs.load(path)) == 1
