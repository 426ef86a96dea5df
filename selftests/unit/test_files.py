# SPDX-License-Identifier: GPL-2.0-only
"""Mistakes in the files that people edit, known_bugs.toml and matrix.toml, are one line with file, line and key."""

import time
from pathlib import Path

import pytest

from harness import known_bugs
from harness.toml_file import TomlError
from runner import ROOT
from runner.kernel_matrix import load as load_matrix

LIST = (ROOT / "known_bugs.toml").read_text()


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text)
    return path


def line_of(text: str, start: str) -> int:
    """The number of the first line of *text* that begins with *start*."""
    return next(number for number, line in enumerate(text.splitlines(), 1) if line.startswith(start))


# For each mistake: what to replace in the repository's list, by what, the start of the line with the mistake, and the message
MISTAKES = {
    "unknown-key": ("shows = ", "nonsense = 1\nshows = ", "nonsense", "nonsense: no such field (there are backend, cells, "),
    "unknown-at-top": ("[[bug]]", "bugs = 1\n[[bug]]", "bugs", "no such field: bugs (there are entries [[bug]])"),
    "no-list": ('findings = ["LOST", "GAP"', 'findings = "LOST" #', "findings",
                "findings: must be a list of strings, not 'LOST'"),
    "unknown-kind": ('"STUCK"', '"STUKC"', "findings", "findings: no such kind: 'STUKC' (there are LOST, SPURIOUS, VALUE,"),
    "unknown-need": ('needs = ["LOST"', 'needs = ["LOSS"', "needs", "needs: no such kind: 'LOSS' (there are LOST,"),
    "no-need-of-the-findings": ('needs = ["LOST", "GAP", "STUCK", "RESET_COUNT"]', 'needs = ["VALUE"]', "needs",
                                "needs: VALUE: not among the findings"),
    "no-id": ('id = "pvm-ring-overflow"\n', "", "[[bug]]", "bug 1 of the list: id: it is missing"),
    "no-summary": ('summary = "kvm_pvm', 'evidence_ = "kvm_pvm', "evidence_", "evidence_: no such field"),
    "no-evidence": ('evidence = "ring of', '# "', "[[bug]]", "evidence: it is missing"),
    "no-such-value": ('"dirty-ring-plain"]', '"dirty-rng"]', "cells",
                      "cells: log_mode has no value 'dirty-rng' (there are dirty-log, clear-log,"),
    "number-as-value": ('log_mode = ["dirty-ring", "dirty-ring-plain"]', "vcpus = [1]", "cells",
                        "cells: must be a list of strings, not [1]"),
    "too-many-vcpus": ('log_mode = ["dirty-ring", "dirty-ring-plain"]', 'vcpus = ["513"]', "cells",
                       "cells: vcpus has no value '513' (there are 1 to 512)"),
    "no-such-dimension": ("{ log_mode", "{ mode", "cells", "cells: no such dimension: 'mode' (there are log_mode,"),
    "one-kernel": ('kernels = ["6.1", "6.2"]', 'kernels = ["x"]', "kernels",
                   """kernels: must be ["from", "before"], such as ["6.1", "6.12"], not ['x']"""),
    "no-kernel": ('kernels = ["6.1", "6.2"]', 'kernels = ["7.0", "6.2"]', "kernels",
                  "kernels: no kernel is from 7.0 and before 6.2"),
    "no-release": ('kernels = ["6.1", "6.2"]', 'kernels = ["6.1", "6.2-rc1"]', "kernels",
                   'kernels: must be ["from", "before"]'),
    "no-pattern": ("log = ['^WARNING: ", "log = ['(", "log", "is no regular expression: missing ), unterminated subpattern"),
    "no-such-test": ('["test_dense_writer_never_overruns_its_ring"]', '["test_no_such"]', "tests",
                     "tests: no test function of selftests/ has the name 'test_no_such'"),
    "backend-number": ('backend = "kvm_pvm"', "backend = 3", "backend", "backend: must be a string, not 3"),
    "backend-misspelt": ('backend = "kvm_pvm"', 'backend = "kvm_pmv"', "backend",
                         "backend: no such vendor module: 'kvm_pmv' (there are kvm_intel, kvm_amd, kvm_pvm)"),
    "parameter-number": ('"kvm_pvm.pvm_emul_batch" = "1024"', '"kvm_pvm.pvm_emul_batch" = 1024', "parameters",
                         """parameters: must be such as { "kvm.tdp_mmu" = "Y" }, not 'kvm_pvm.pvm_emul_batch' = 1024"""),
    "parameters-string": ('parameters = { "kvm_pvm.pvm_emul_batch" = "1024" }', 'parameters = "x"', "parameters",
                          "parameters: must be a table in braces, not 'x'"),
    "no-pages": ("most_pages = 1", "most_pages = 0", "most_pages", "most_pages: must be a number from 1 on, not 0"),
    "no-flag": ("ring_lapped = true", 'ring_lapped = "yes"', "ring_lapped", "ring_lapped: must be true or false, not 'yes'"),
    "shows": ('shows = "sometimes"', 'shows = "often"', "shows", "shows: no such value: 'often' (there are always, some"),
    "no-toml": ("needs = [", "needs = [[", "ring_lapped", "not TOML: Unclosed array"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_in_known_bugs(tmp_path: Path, mistake: str) -> None:
    """A mistake in known_bugs.toml is one line with file, line, entry, key and the valid values."""
    old, new, key, message = MISTAKES[mistake]
    assert old in LIST
    text = LIST.replace(old, new, 1)
    path = write(tmp_path, "known_bugs.toml", text)
    with pytest.raises(TomlError) as caught:
        known_bugs.load(path)
    error = str(caught.value)
    assert "\n" not in error
    assert error.startswith(f"{path}:{line_of(text, key)}: "), error
    assert message in error


def test_duplicate_known_bug_id(tmp_path: Path) -> None:
    """A duplicate id is reported with the line of the second entry."""
    text = LIST.replace('id = "pvm-ring-overflow-always"', 'id = "pvm-ring-overflow"')
    path = write(tmp_path, "known_bugs.toml", text)
    second = [number for number, line in enumerate(text.splitlines(), 1) if line.startswith("id = ")][1]
    with pytest.raises(TomlError, match=f":{second}: bug 'pvm-ring-overflow': id: an earlier entry has the same$"):
        known_bugs.load(path)


def test_mistake_in_a_later_entry(tmp_path: Path) -> None:
    """A mistake is reported with the line of its own entry, also if an earlier entry or a subtable has the same key."""
    entry = '[[bug]]\nid = "{}"\nsummary = "s"\nevidence = "e"\nbackend = "kvm_amd"\nfindings = ["LOST"]\nshows = "always"\n'
    second = entry.format("b") + '[bug.cells]\nlog_mode = ["nope"]\n'
    path = write(tmp_path, "known_bugs.toml", entry.format("a") + '[bug.cells]\nstop = ["forced"]\n' + second)
    with pytest.raises(TomlError, match=r":17: bug 'b': cells: log_mode has no value 'nope'"):
        known_bugs.load(path)


def test_unreadable_known_bugs(tmp_path: Path) -> None:
    """A list of known bugs that is missing, a folder or not UTF-8 is one line with its path."""
    for path, message in ((tmp_path / "none.toml", "No such file or directory"), (tmp_path, "Is a directory")):
        with pytest.raises(TomlError, match=f"^{path}: {message}$"):
            known_bugs.load(path)
    latin = tmp_path / "latin.toml"
    latin.write_bytes(b"# 1\n# \xe4\n")
    with pytest.raises(TomlError, match=f"^{latin}:2: not UTF-8$"):
        known_bugs.load(latin)


def test_known_bugs_load_quickly(tmp_path: Path) -> None:
    """The list of known bugs loads in under 0.1 s of CPU time and is cached: every session and worker reads it."""
    path = write(tmp_path, "known_bugs.toml", LIST)
    start = time.thread_time()
    assert known_bugs.load(path)
    assert time.thread_time() - start < 0.1
    assert known_bugs.load(path) is known_bugs.load(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("# none\n", ":1: it names no kernels"),
        ("\nkernels = [\n", ":3: not TOML: Invalid value"),
        ('\nkernels = "debian:6.1"', ":2: kernels must be a list of strings, not 'debian:6.1'"),
        ("\n\nkernels = [6.1]", ":3: kernels must be a list of strings, not [6.1]"),
        ('kernels = ["a", ""]', ":1: kernels: a name is empty"),
        ('kernels = ["a"]\nkernel = 1', ":2: no such field: kernel (there are kernels, parameters, arguments)"),
        ('kernels = ["a"]\narguments = ["-v"]', ":2: arguments must be a string, not ['-v']"),
        ('kernels = ["a"]\narguments = "-k \'x"', ":2: arguments: No closing quotation"),
        (
            'kernels = ["a"]\n# the MMU\nparameters = ["kvm.tdp_mmu"]',
            ":3: parameters: 'kvm.tdp_mmu' is no parameter: write it",
        ),
    ],
)
def test_mistake_in_a_matrix_file(tmp_path: Path, text: str, message: str) -> None:
    """A mistake in a matrix file is one line that begins with the file and the line in it."""
    path = write(tmp_path, "matrix.toml", text)
    with pytest.raises(TomlError) as caught:
        load_matrix(path)
    assert str(caught.value).startswith(f"{path}{message}")
    assert "\n" not in str(caught.value)
