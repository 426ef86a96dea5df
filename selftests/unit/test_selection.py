# SPDX-License-Identifier: GPL-2.0-only
"""From a user's words to cells: options, the matrix, known bugs."""

from dataclasses import replace
from itertools import combinations, product
from pathlib import Path

import pytest

from dirty_tracking.cell import DENSITIES, STOPS, Cell, Settings, place_test_memory
from dirty_tracking.violations import Kind, Violation
from harness import known_bugs
from harness.combinations import all_cells, pairwise_cells
from harness.failure_report import cell_command
from harness.selection import (
    DEFAULTS,
    DIMENSIONS,
    check_settings,
    parse_milliseconds,
    parse_names,
    parse_number,
    parse_size,
)
from kvm_util.host import Host, version_numbers
from kvm_util.memory import BACKINGS, GIB, KIB, MIB

CELL = Cell("dirty-log", "48bit-4k", "anonymous", "cooperative", "sparse", 1)

# --- options ----------------------------------------------------------------------------------------------------------


def test_order_of_chosen_names() -> None:
    """Values of an option are in the order of its choices, however they are given."""
    assert parse_names("--x", "c, a", ("a", "b", "c")) == ("a", "c")


@pytest.mark.parametrize(
    ("text", "size"),
    [("64M", 64 * MIB), ("1g", GIB), ("8K", 8 * KIB), ("0x2000", 8192), ("4096", 4096), ("2T", 2048 * GIB)],
)
def test_sizes_with_units(text: str, size: int) -> None:
    """A size is a number, in any base, with an optional binary unit."""
    assert parse_size("--x", text) == size


@pytest.mark.parametrize(
    ("parse", "message"),
    [
        (lambda: parse_names("--log-mode", "dirty", ("dirty-log",)), "--log-mode: no such value: 'dirty' (choose from"),
        (lambda: parse_names("--log-mode", "", ("dirty-log",)), "--log-mode: no such value: ''"),
        (lambda: parse_number("--iterations", "0", 1), "--iterations: 0 is out of range, it must be at least 1"),
        (lambda: parse_number("--iterations", "ten", 1), "--iterations: 'ten' is not a whole number"),
        (lambda: parse_number("--vcpus", "9", 1, 8), "--vcpus: 9 is out of range, it must be from 1 to 8"),
        (lambda: parse_milliseconds("--interval", "0"), "--interval: 0 ms is out of range"),
        (lambda: parse_milliseconds("--interval", "nan"), "--interval: nan ms is out of range"),
        (lambda: parse_milliseconds("--interval", "soon"), "--interval: 'soon' is not a number of milliseconds"),
        (lambda: parse_size("--test-mem", "1000"), "--test-mem: 1000 is not a multiple of the page size"),
        (lambda: parse_size("--test-mem", "1P"), "'1P' is no size: write a whole number and a unit (K, M, G or T)"),
        (lambda: parse_size("--test-mem", "G"), "'G' is no size: write a whole number and a unit (K, M, G or T)"),
        (lambda: parse_size("--test-mem", "64MB"), "--test-mem: '64MB' is no size: "),
        (lambda: parse_size("--test-mem", ""), "--test-mem: '' is no size: "),
        (lambda: parse_size("--test-mem", "-1M"), "--test-mem: -1M is out of range, it must be at least a page (4096)"),
        (lambda: check_settings(Settings(ring_count=1000), 1, 1), "--ring-count: 1000 is not a power of two"),
        (lambda: check_settings(Settings(), 513, 1), "--vcpus: 513 is out of range"),
        (lambda: check_settings(Settings(test_mem=1 << 50), 1, 1), "MiB of memory, but the host has"),
        (lambda: check_settings(Settings(test_mem=GIB), 1, 1 << 20), "1048576 at a time need"),
        (
            lambda: check_settings(Settings(ring_count=1 << 40), 1, 1),
            "--ring-count: rings of 1099511627776 entries need ",
        ),
    ],
)
def test_bad_values_of_options(parse: object, message: str) -> None:
    """A bad value is an error of one line, with the option, the value and what is allowed."""
    with pytest.raises(pytest.UsageError) as error:
        parse()  # type: ignore[operator]
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_place_of_test_memory() -> None:
    """Test memory is at the top of the guest-physical addresses, aligned to the backing's page size."""
    limit = 1 << 46
    size = Settings().slot_size
    assert place_test_memory(Settings(), CELL, limit) == limit - size
    huge = place_test_memory(Settings(), replace(CELL, backing="anonymous_hugetlb_1gb"), limit)
    assert huge % GIB == 0
    assert limit - 2 * GIB <= huge <= limit - size


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (Settings(phys_offset=0x1001), "not a multiple of the page size"),
        (Settings(phys_offset=0x1000), "runs into the guest's own memory"),
        (Settings(phys_offset=(1 << 36) - MIB), "ends beyond the guest-physical limit"),
        (Settings(test_mem=1 << 36), "runs into the guest's own memory"),
    ],
)
def test_no_place_for_test_memory(settings: Settings, message: str) -> None:
    """An offset that is unaligned, in the guest's own memory or beyond the limit, or too much memory, is an error."""
    with pytest.raises(ValueError, match=message):
        place_test_memory(settings, CELL, 1 << 36)


# --- the matrix -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vcpus", [(1,), (1, 2)])
@pytest.mark.parametrize("left_out", [(), ("stop",), ("guest_mode", "backing"), ("log_mode", "density")])
def test_default_matrix_is_pairwise(left_out: tuple[str, ...], vcpus: tuple[int, ...]) -> None:
    """The default matrix has every pair of values of any two dimensions, also if some dimensions are pinned."""
    dimensions = {name: values[:1] if name in left_out else values for name, values in DIMENSIONS.items()}
    every = {**dimensions, "vcpus": vcpus}
    cells = pairwise_cells(every)
    assert len(set(cells)) == len(cells) <= len(all_cells(every))
    for first, second in combinations(every, 2):
        met = {(getattr(cell, first), getattr(cell, second)) for cell in cells}
        assert met == set(product(every[first], every[second]))


def test_shared_huge_pages_run_when_named() -> None:
    """By default all values of each dimension run, except the backings in shared huge pages."""
    left_out = {name: set(values) - set(DEFAULTS[name]) for name, values in DIMENSIONS.items()}
    assert {name: values for name, values in left_out.items() if values} == {
        "backing": {"shmem_thp", "shared_hugetlb_2mb"}
    }


def test_full_matrix_is_the_product() -> None:
    """The full matrix has each combination of values once."""
    every = {**DIMENSIONS, "vcpus": (1, 2)}
    cells = all_cells(every)
    assert len(set(cells)) == len(cells) == 5 * 6 * len(BACKINGS) * len(STOPS) * len(DENSITIES) * 2


def test_command_that_reproduces_a_cell() -> None:
    """The command that reproduces a cell has the cell, the seed, and all settings that are not the default."""
    command = cell_command("pytest --kernel=x", CELL, Settings(iterations=7, phys_offset=1 << 32, seed=5))
    assert command == (
        "pytest --kernel=x selftests/matrix/test_dirty_log.py --log-mode dirty-log --guest-mode 48bit-4k --backing anonymous"
        " --stop cooperative --density sparse --vcpus 1 --iterations 7 --phys-offset 0x100000000 --seed 5"
    )


# --- known bugs -------------------------------------------------------------------------------------------------------

HOST = Host("6.18.44-x", "kvm_pvm", {"kvm_pvm.pvm_emul_batch": "1024"}, "cpu", 2, 1)
ENTRY = """
[[bug]]
id = "x"
summary = "s"
evidence = "e"
backend = "kvm_pvm"
kernels = ["6.12", "6.19"]
parameters = { "kvm_pvm.pvm_emul_batch" = "1024" }
cells = { log_mode = ["dirty-ring"], vcpus = ["1"] }
findings = ["LOST", "GAP"]
shows = "sometimes"
"""


def read(folder: Path, text: str) -> tuple[known_bugs.KnownBug, ...]:
    path = folder / "known_bugs.toml"
    path.write_text(text)
    known_bugs.load.cache_clear()
    return known_bugs.load(path)


def test_known_bugs_file_is_valid() -> None:
    """known_bugs.toml has unique ids, each with summary and evidence, and a bug that always shows."""
    bugs = known_bugs.load()
    assert len({bug.id for bug in bugs}) == len(bugs) > 0
    assert any(bug.always and bug.tests for bug in bugs)
    assert all(bug.evidence and bug.summary for bug in bugs)


@pytest.mark.parametrize(
    ("host", "applies"),
    [
        (HOST, True),
        (replace(HOST, backend="kvm_amd"), False),
        (replace(HOST, kernel="6.11.9"), False),
        (replace(HOST, kernel="6.19-rc1"), False),
        (replace(HOST, parameters={"kvm_pvm.pvm_emul_batch": "16"}), False),
        (replace(HOST, parameters={}), False),
    ],
)
def test_conditions_of_a_known_bug(tmp_path: Path, host: Host, applies: bool) -> None:
    """A known bug applies only with its backend, kernels and module parameters."""
    (bug,) = read(tmp_path, ENTRY)
    assert bug.on(host) is applies


def test_cells_and_kinds_of_a_known_bug(tmp_path: Path) -> None:
    """A known bug concerns its cells only, and explains only its kinds of violations, about as many pages at most."""
    (bug,) = read(tmp_path, ENTRY)
    assert bug.concerns("test_dirty_log", replace(CELL, log_mode="dirty-ring"))
    assert not bug.concerns("test_dirty_log", CELL)
    assert not bug.concerns("test_dirty_log", replace(CELL, log_mode="dirty-ring", vcpus=2))
    lost, spurious = Violation(Kind.LOST, "", 1, (3, 4)), Violation(Kind.SPURIOUS, "", 1, (5,))
    assert bug.explains([lost])
    assert not bug.explains([lost, spurious])
    (bug,) = read(tmp_path, ENTRY.replace('"GAP"]', '"SPURIOUS"]\nneeds = ["LOST"]'))
    assert bug.explains([lost, spurious])
    assert not bug.explains([spurious])
    for most in (1, 2):
        (bug,) = read(tmp_path, ENTRY + f"most_pages = {most}\n")
        assert bug.explains([lost, lost]) is (most == 2)
    (bug,) = read(tmp_path, ENTRY + "ring_lapped = true\n")
    assert not bug.explains([lost])
    assert bug.explains([replace(lost, ring_lapped=True)])


@pytest.mark.parametrize(
    ("release", "numbers"), [("6.12.117+deb12-amd64", (6, 12, 117)), ("7.2-rc1", (7, 2)), ("6.1.0-56-cloud", (6, 1, 0))]
)
def test_release_numbers(release: str, numbers: tuple[int, ...]) -> None:
    """The version numbers of a kernel release are those before any suffix."""
    assert version_numbers(release) == numbers
