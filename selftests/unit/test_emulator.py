# SPDX-License-Identifier: GPL-2.0-only
"""The known faults of emulators, and the probe that finds them; it runs in a real QEMU if there is one."""

from pathlib import Path
from unittest.mock import Mock

import pytest

from runner import emulator_probe
from runner.emulator import Emulator, find_emulator
from runner.emulator_faults import FAULTS, faults_of, withheld, without
from runner.emulator_probe import CHECKS, evaluate, probe
from runner.errors import CannotTest
from runner.qemu import find_qemu

ACCEL = "tcg,thread=multi"
# The output of the probe on a correct CPU
SOUND = [f"{check.name}= " + " ".join(f"{number:016x}" for number in check.answer) for check in CHECKS]
# Changes of the probe, each with the checks that must find it
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
    """This host's QEMU, whatever its faults, or else Debian's."""
    try:
        return find_emulator(None, emulates=False)
    except CannotTest as error:
        pytest.skip(str(error))


@pytest.fixture
def known(qemu: Emulator) -> set[str]:
    """The checks that fail in this QEMU."""
    return {check for fault in faults_of(qemu.version) for check in fault.checks}


@pytest.mark.boots
def test_probe_finds_known_faults(qemu: Emulator, known: set[str]) -> None:
    """In this host's QEMU the checks of its version's known faults fail and no other, and none once they are withheld."""
    failed = probe(qemu.command, "max", ACCEL)
    assert set(failed) == known
    assert probe(qemu.command, without("max", withheld(failed)), ACCEL) == {}


@pytest.mark.parametrize("planted", PLANTED)
@pytest.mark.boots
def test_probe_finds_planted_faults(
    qemu: Emulator, known: set[str], planted: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Each fault planted in the probe fails the checks for it, and no other."""
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
@pytest.mark.boots
def test_cpu_that_cannot_be_probed(qemu: Emulator, cpu_model: str, said: str) -> None:
    """A CPU model without SVM, and one that QEMU does not have, are one line each."""
    with pytest.raises(CannotTest, match=said):
        probe(qemu.command, cpu_model, ACCEL)


@pytest.mark.parametrize(
    ("command", "said"),
    [(["/nonexistent/qemu"], "No such file"), (["sh", "-c", "exec sleep 60"], r"gave no answer: no end within 0\.2 s")],
    ids=["missing", "hangs"],
)
def test_probe_without_an_answer(monkeypatch: pytest.MonkeyPatch, command: list[str], said: str) -> None:
    """A program that does not exist, and a probe that does not end in time, are one line each."""
    monkeypatch.setattr(emulator_probe, "_TIMEOUT", 0.2)
    with pytest.raises(CannotTest, match=said):
        probe(command, "max", ACCEL)


def test_answers_of_a_correct_cpu() -> None:
    """The right answers pass, also if the CPU lacks a feature of one."""
    assert evaluate("\n".join(SOUND), "") == {}
    assert evaluate("\n".join("avx-store absent" if "avx-store=" in line else line for line in SOUND), "") == {}


@pytest.mark.parametrize("number", range(1, 5))
@pytest.mark.parametrize("index", range(len(CHECKS)), ids=[check.name for check in CHECKS])
def test_wrong_answer_is_found(index: int, number: int) -> None:
    """A wrong number fails its check, in each position of each check."""
    numbers = SOUND[index].split(" ")
    numbers[number] = f"{int(numbers[number], 16) ^ 1 << 40:016x}"
    lines = [*SOUND[:index], " ".join(numbers), *SOUND[index + 1 :]]
    assert list(evaluate("\n".join(lines), "")) == [CHECKS[index].name]


@pytest.mark.parametrize("index", range(len(CHECKS)), ids=[check.name for check in CHECKS])
def test_incomplete_output(index: int) -> None:
    """The check during which the machine crashed has failed."""
    lines = [*SOUND[:index], f"{CHECKS[index].name}="]
    assert evaluate("\n".join(lines), "it fell") == {CHECKS[index].name: "the machine broke down: it fell"}


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
    """Versions are compared as numbers, and a fault is gone in the version that fixes it; one without a number is refused."""
    assert [fault.name for fault in faults_of(version) if fault.avoid] == names
    with pytest.raises(ValueError, match="not a version"):
        faults_of("unknown")


def test_withheld_features() -> None:
    """The features of failed checks are removed from the CPU model."""
    assert withheld(["xsetbv"]) == ("avx",)
    assert withheld([]) == ()
    assert without("max", ("avx", "xsave")) == "max,-avx,-xsave"
    assert without("EPYC,+svm", ()) == "EPYC,+svm"


@pytest.fixture
def named(tmp_path: Path) -> Path:
    """A program that reports the version of QEMU 7.2."""
    path = tmp_path / "qemu"
    path.write_text("#!/bin/sh\necho QEMU emulator version 7.2.22\n")
    path.chmod(0o755)
    return path


def test_withheld_feature_is_reprobed(monkeypatch: pytest.MonkeyPatch, named: Path) -> None:
    """A feature that fails is withheld, the CPU is probed once more, and the restrictions have the reason."""
    probed = Mock(side_effect=[{"xsetbv": "it is not intercepted"}, {}])
    monkeypatch.setattr("runner.qemu.probe", probed)
    qemu = find_qemu("max", "tcg", (), str(named))
    assert [call.args[1] for call in probed.call_args_list] == ["max", "max,-avx"]
    assert (qemu.accel, qemu.cpu_model) == ("tcg,thread=single", "max,-avx")
    thread, feature = qemu.restrictions
    assert thread.startswith("all CPUs share a thread, as QEMU 7.2.22 misses what another CPU writes to code")
    assert feature == "the CPU is max,-avx, as it is not intercepted"


@pytest.mark.parametrize(
    "answers",
    [[{"store-protected-again": "it does not fault"}], [{"xsetbv": "it broke down"}, {"xsetbv": "it broke down"}]],
    ids=["no-feature-to-withhold", "withheld-in-vain"],
)
def test_fault_without_remedy(monkeypatch: pytest.MonkeyPatch, named: Path, answers: list[dict[str, str]]) -> None:
    """An emulator that still fails a check cannot be used."""
    monkeypatch.setattr("runner.qemu.probe", Mock(side_effect=answers))
    with pytest.raises(CannotTest, match=r"QEMU 7\.2\.22 .*: it (does not fault|broke down)"):
        find_qemu("max", "tcg", (), str(named))


def test_checks_of_faults_exist() -> None:
    """The table of faults names only checks that the probe has."""
    assert {check for fault in FAULTS for check in fault.checks} <= {check.name for check in CHECKS}
