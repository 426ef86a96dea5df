# SPDX-License-Identifier: GPL-2.0-only
"""What is known of emulators, and what the probe finds in one; the probe runs in QEMU, where there is one."""

from pathlib import Path

import pytest

from runner import emulator_probe
from runner.emulator import Emulator, find_emulator
from runner.emulator_faults import FAULTS, faults_of, withheld, without
from runner.emulator_probe import CHECKS, judge, probe
from runner.errors import CannotTest
from runner.qemu import find_qemu

ACCEL = "tcg,thread=multi"
# The output of the probe on a sound CPU
SOUND = [f"{check.name}= " + " ".join(f"{number:016x}" for number in check.answer) for check in CHECKS]
# What is changed in the probe, and which checks have to find it
PLANTED = {
    "avx-not-enabled": (".set XCR0_AVX, 7", ".set XCR0_AVX, 3", {"avx-store", "avx-store-nested"}),
    "xsetbv-not-intercepted": ("1 << 0 | 1 << 1 | 1 << 13", "1 << 0 | 1 << 1", {"xsetbv"}),
    "nothing-protected": (
        "andb $~WRITABLE, nested_table",
        "andb $-1, nested_table",
        {"store-protected-again", "failed-exchange-protected", "string-store-protected", "walk-protected"},
    ),
    "marked-before": (
        "mov $TEST + WRITABLE + PRESENT",
        "mov $TEST + DIRTY + WRITABLE + PRESENT",
        {"load-marks", "load-marks-nested"},
    ),
    "a-fault-in-the-host": ("\tcall run_vector_store\n", "\tud2\n", {"avx-store"}),
}


@pytest.fixture
def qemu() -> Emulator:
    """The QEMU of this host, whatever its faults, else Debian's."""
    try:
        return find_emulator(None, emulates=False)
    except CannotTest as error:
        pytest.skip(str(error))


@pytest.fixture
def known(qemu: Emulator) -> set[str]:
    """The checks that fail in this QEMU."""
    return {check for fault in faults_of(qemu.version) for check in fault.checks}


def test_the_probe_finds_what_is_known(qemu: Emulator, known: set[str]) -> None:
    """In the QEMU of this host: what is known of its version and no more, and nothing once it is withheld."""
    failed = probe(qemu.command, "max", ACCEL)
    assert set(failed) == known
    assert probe(qemu.command, without("max", withheld(failed)), ACCEL) == {}


@pytest.mark.parametrize("planted", PLANTED)
def test_the_probe_finds_a_gap(
    qemu: Emulator, known: set[str], planted: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Each fault that is planted in the program fails the checks that it concerns, and no other."""
    old, new, found = PLANTED[planted]
    text = emulator_probe.SOURCE.read_text()
    assert old in text
    source = tmp_path / "probe.S"
    source.write_text(text.replace(old, new))
    monkeypatch.setattr(emulator_probe, "SOURCE", source)
    monkeypatch.setattr(emulator_probe, "OUTPUT", tmp_path / "probe.elf")
    assert set(probe(qemu.command, "max", ACCEL)) | known == found | known


@pytest.mark.parametrize(
    ("cpu_model", "said"), [("max,-svm", "no SVM"), ("nonsense", "nonsense")], ids=["without-svm", "unknown"]
)
def test_a_cpu_that_cannot_be_probed(qemu: Emulator, cpu_model: str, said: str) -> None:
    """A CPU model without SVM, and one that QEMU does not have, are one line."""
    with pytest.raises(CannotTest, match=said):
        probe(qemu.command, cpu_model, ACCEL)


def test_a_program_that_does_not_run(tmp_path: Path) -> None:
    """A program that is not there is one line."""
    with pytest.raises(CannotTest, match="No such file"):
        probe([str(tmp_path / "qemu")], "max", ACCEL)


def test_a_machine_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that gives no answer in time is one line."""
    monkeypatch.setattr(emulator_probe, "_PATIENCE", 0.2)
    with pytest.raises(CannotTest, match=r"gave no answer: nothing came for 0\.2 s"):
        probe(["sh", "-c", "exec sleep 60"], "max", ACCEL)


def test_what_a_sound_cpu_answers() -> None:
    """Also where it lacks a feature: what it does not offer, it does not do wrong."""
    assert judge("\n".join(SOUND), "") == {}
    assert judge("\n".join("avx-store absent" if "avx-store=" in line else line for line in SOUND), "") == {}


@pytest.mark.parametrize("number", range(1, 5))
@pytest.mark.parametrize("index", range(len(CHECKS)), ids=[check.name for check in CHECKS])
def test_a_wrong_answer_is_found(index: int, number: int) -> None:
    """In each number of each check."""
    numbers = SOUND[index].split(" ")
    numbers[number] = f"{int(numbers[number], 16) ^ 1 << 40:016x}"
    lines = [*SOUND[:index], " ".join(numbers), *SOUND[index + 1 :]]
    assert list(judge("\n".join(lines), "")) == [CHECKS[index].name]


@pytest.mark.parametrize("index", range(len(CHECKS)), ids=[check.name for check in CHECKS])
def test_an_answer_that_breaks_off(index: int) -> None:
    """The check during which the machine broke down has failed."""
    lines = [*SOUND[:index], f"{CHECKS[index].name}="]
    assert judge("\n".join(lines), "it fell") == {CHECKS[index].name: "the machine broke down: it fell"}


@pytest.mark.parametrize(
    ("version", "names"),
    [
        ("7.2.22", ["XSETBV not intercepted", "code translated before its page is locked"]),
        ("8.1.5", ["XSETBV not intercepted", "second page of translated code not recorded"]),
        ("8.2.2", ["second page of translated code not recorded"]),
        ("9.1.0", []),
        ("10.0.2", []),
        ("11.1.3", []),
        ("10.2.50-dirty", []),
    ],
)
def test_versions_to_avoid(version: str, names: list[str]) -> None:
    """Numbers are compared as numbers, and a fault is gone in the version that mends it."""
    assert [fault.name for fault in faults_of(version) if fault.avoid] == names


def test_a_version_that_is_none() -> None:
    """A version without a number is refused."""
    with pytest.raises(ValueError, match="not a version"):
        faults_of("unknown")


def test_what_is_withheld() -> None:
    """The features of the failed checks are taken from the CPU model."""
    assert withheld(["xsetbv"]) == ("avx",)
    assert withheld([]) == ()
    assert without("max", ("avx", "xsave")) == "max,-avx,-xsave"
    assert without("EPYC,+svm", ()) == "EPYC,+svm"


class Probe:
    """Stands in for the probe: gives one answer after the other, and keeps the CPU models that it was asked about."""

    def __init__(self, *answers: dict[str, str]) -> None:
        self.cpu_models: list[str] = []
        self._answers = list(answers)

    def __call__(self, _command: object, cpu_model: str, _accel: str) -> dict[str, str]:
        self.cpu_models.append(cpu_model)
        return self._answers.pop(0)


@pytest.fixture
def named(tmp_path: Path) -> Path:
    """A program that says it is QEMU 7.2."""
    path = tmp_path / "qemu"
    path.write_text("#!/bin/sh\necho QEMU emulator version 7.2.22\n")
    path.chmod(0o755)
    return path


def test_a_gap_is_withheld_and_probed_again(monkeypatch: pytest.MonkeyPatch, named: Path) -> None:
    """A feature that fails is not offered, and the restrictions say what and why."""
    answers = Probe({"xsetbv": "it is not intercepted"}, {})
    monkeypatch.setattr("runner.qemu.probe", answers)
    qemu = find_qemu("max", "tcg", (), str(named))
    assert answers.cpu_models == ["max", "max,-avx"]
    assert (qemu.accel, qemu.cpu_model) == ("tcg,thread=single", "max,-avx")
    assert qemu.restrictions[0].startswith(
        "all CPUs share a thread, as QEMU 7.2.22 misses what another CPU writes to code"
    )
    assert qemu.restrictions[1:] == ("the CPU is max,-avx, as it is not intercepted",)


@pytest.mark.parametrize(
    "answers",
    [[{"store-protected-again": "it does not fault"}], [{"xsetbv": "it broke down"}, {"xsetbv": "it broke down"}]],
    ids=["no-feature-to-withhold", "withheld-in-vain"],
)
def test_a_gap_that_is_left(monkeypatch: pytest.MonkeyPatch, named: Path, answers: list[dict[str, str]]) -> None:
    """An emulator that still fails a check gives no verdict."""
    monkeypatch.setattr("runner.qemu.probe", Probe(*answers))
    with pytest.raises(CannotTest, match=r"QEMU 7\.2\.22 .*: it (does not fault|broke down)"):
        find_qemu("max", "tcg", (), str(named))


def test_the_checks_that_faults_name() -> None:
    """The table names only checks that the probe has."""
    assert {check for fault in FAULTS for check in fault.checks} <= {check.name for check in CHECKS}
