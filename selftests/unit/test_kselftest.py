# SPDX-License-Identifier: GPL-2.0-only
"""kselftest/: the C test's options, kselftest's exit statuses, and the folder for the kernel's tree."""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dirty_tracking.modes import LOG_MODES
from harness import c_test
from harness.selection import DIMENSIONS
from kvm_util.host_limits import HostLimit, Limit
from runner import ROOT
from selftests.unit.commands import ONE_CELL, QUICK
from selftests.unit.ktap_reader import read_ktap

PASS, FAIL, SKIP = 0, 1, 4
MATRIX = "selftests/matrix/test_dirty_log.py"
FOLDER = ROOT / "kselftest"
PROGRAM, MATRIX_PROGRAM = FOLDER / "dirty_log_test", FOLDER / "dirty_log_matrix.sh"
SMALL_CELL = ["-k", "test_dirty_log", *QUICK, *ONE_CELL[1:]]
# A kernel source tree, for the tests with its selftests
KERNEL_SOURCE = os.environ.get("KERNEL_SOURCE", "")


def run(*words: str, **environment: str) -> tuple[int, str, str]:
    """Run a program of kselftest/; returns exit status, standard output and standard error."""
    done = subprocess.run(words, env=os.environ | environment, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


# --- the C test's options ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "options"),
    [
        ("", []),
        ("-M all", []),
        ("-M dirty-log -M clear-log", ["--log-mode=clear-log,clear-log-unset"]),
        ("-Mdirty-ring -c 1024", ["--ring-count=1024", "--log-mode=dirty-ring,dirty-ring-plain"]),
        ("-i 3 -I 20 -p 0x40000000", ["--iterations=3", "--interval=20", "--phys-offset=0x40000000"]),
        ("-m 8", ["--guest-mode=48bit-4k,57bit-4k"]),
        ("-m 48bit-2m -m 48bit-1g", ["--guest-mode=48bit-1g,48bit-2m"]),
    ],
)
def test_options_of_the_c_test(words: str, options: list[str]) -> None:
    """Each option of the C test selects the part of the matrix, or the setting, that has its meaning."""
    assert sorted(c_test.suite_options(words.split())) == sorted([MATRIX, *options])


def test_c_test_has_all_log_modes() -> None:
    """Every log mode of the suite belongs to one of the C test's."""
    modes = [
        option for mode in ("dirty-log", "clear-log", "dirty-ring") for option in c_test.suite_options(["-M", mode])
    ]
    named = [name for word in modes if word.startswith("--log-mode=") for name in word.partition("=")[2].split(",")]
    assert sorted(named) == sorted(LOG_MODES)
    assert set(DIMENSIONS["guest_mode"]) <= set(c_test.USAGE.replace(",", " ").split())


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ("-x", "option -x not recognized (-h lists all options)"),
        ("-i", "option -i requires argument"),
        ("-i 0", "-i: 0 is out of range, it must be from 1 to 1000000"),
        ("-I soon", "-I: 'soon' is not a number of milliseconds"),
        ("-M bogus", "-M: no such mode: 'bogus' (there are all, dirty-log, clear-log, dirty-ring)"),
        ("-m 3", "-m: no such mode: '3' (there are 8, 9, 48bit-4k,"),
        ("-c 3", "--ring-count: 3 is not a power of two"),
        ("12", "'12' is no option"),
    ],
)
def test_wrong_option_of_the_c_test(words: str, text: str) -> None:
    """A wrong option is a usage error that names it."""
    with pytest.raises(pytest.UsageError) as raised:
        c_test.suite_options(words.split())
    assert text in str(raised.value)


def test_little_memory_is_no_usage_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host that has too little memory for the C test's sizes is a reason to skip."""
    monkeypatch.setattr(c_test, "memory_limits", lambda: [Limit("the machine has 100 MiB", 100 << 20, "more memory")])
    with pytest.raises(HostLimit, match="100 MiB"):
        c_test.suite_options([])


# --- exit statuses ----------------------------------------------------------------------------------------------------


def test_usage_and_help() -> None:
    """Help exits with 0, and a wrong option with 1 after one line on standard error."""
    status, output, errors = run(str(PROGRAM), "-h")
    assert (status, errors) == (PASS, "") and output.startswith("usage: dirty_log_test [-h]")
    assert run(str(PROGRAM), "-x") == (FAIL, "", "dirty_log_test: option -x not recognized (-h lists all options)\n")


PROGRAMS = [
    pytest.param(SMALL_CELL, PASS, id="passes"),
    pytest.param([*SMALL_CELL, "--kvm-device=/dev/null"], SKIP, id="no-kvm"),
    pytest.param([*SMALL_CELL, "-p", "docs.examples.planted_fault"], FAIL, id="lost-pages"),
    pytest.param([*SMALL_CELL, "--iterations=x"], FAIL, id="wrong-option", marks=pytest.mark.slow),
    pytest.param([*SMALL_CELL, "-k", "nothing_like"], FAIL, id="nothing-matches", marks=pytest.mark.slow),
]


@pytest.mark.usefixtures("kvm")
@pytest.mark.parametrize(("words", "wanted"), PROGRAMS)
def test_exit_status_of_kselftest(tmp_path: Path, words: list[str], wanted: int) -> None:
    """Pytest's exit statuses become kselftest's: a run that cannot begin fails, one without KVM is a skip."""
    status, output, errors = run(str(MATRIX_PROGRAM), *words, TMPDIR=str(tmp_path))
    assert status == wanted, output + errors
    if output:
        *_, the_run = read_ktap(output)
        assert the_run.ok == (wanted != FAIL)
        assert (the_run.directive == "SKIP") == (wanted == SKIP)
    kept = "--iterations=x" not in words and "nothing_like" not in words
    assert [path.name.rpartition("-")[0] for path in tmp_path.iterdir()] == [MATRIX_PROGRAM.name] * kept


def test_files_where_the_user_is(tmp_path: Path) -> None:
    """A file that an option names is relative to the folder that a program is called in, and no folder is left elsewhere."""
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    words = [str(MATRIX_PROGRAM), *SMALL_CELL, "--kvm-device=/dev/null", "--results=here", "--junitxml", "j.xml"]
    environment = os.environ | {"TMPDIR": str(temporary)}
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == SKIP, done.stderr
    assert (tmp_path / "here/results.json").is_file() and (tmp_path / "j.xml").is_file()
    assert [*temporary.iterdir()] == []


def test_no_folder_after_a_wrong_option(tmp_path: Path) -> None:
    """A run that never began leaves nothing behind."""
    assert run(str(MATRIX_PROGRAM), "--no-such-option", TMPDIR=str(tmp_path))[:2] == (FAIL, "")
    assert [*tmp_path.iterdir()] == []


@pytest.mark.slow
@pytest.mark.usefixtures("kvm")
def test_terminated_program_is_a_fail(tmp_path: Path) -> None:
    """SIGTERM, as kselftest's runner sends it, ends a program in seconds: the running test is named, and nothing passes."""
    words = [str(MATRIX_PROGRAM), *SMALL_CELL, "--iterations=1000000"]
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    with subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        begin = [process.stdout.readline()]
        while not begin[-1].startswith("# collected"):
            begin.append(process.stdout.readline())
        time.sleep(0.5)
        process.terminate()
        test, the_run = read_ktap("".join(begin) + process.stdout.read())
        assert process.wait() == FAIL
    assert test.name.startswith(MATRIX)
    assert (test.directive, the_run.directive) == ("ERROR", "ERROR")
    assert "SIGTERM" in test.text


def test_missing_package_is_a_skip(tmp_path: Path) -> None:
    """Without Python, a package or the suite itself a program is a skip, and the reason names what is missing."""
    shutil.copy(FOLDER / "ksft.sh", tmp_path / "dirty_log_test")
    for name in ("runner", "lib"):
        (tmp_path / name).symlink_to(ROOT / name)
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("sh", "readlink", "dirname", "basename"):
        (tools / name).symlink_to(str(shutil.which(name)))

    def reason() -> str:
        status, output, _ = run(str(tmp_path / "dirty_log_test"), PATH=str(tools))
        assert status == SKIP
        (result,) = read_ktap(f"{output}# Totals: pass:0 fail:0 xfail:0 xpass:0 skip:1 error:0\n")
        return result.text

    (tmp_path / "conftest.py").symlink_to("../nowhere/conftest.py")
    assert "cp -rL" in reason()
    (tmp_path / "conftest.py").unlink()
    shutil.copy(ROOT / "conftest.py", tmp_path)
    assert reason() == "there is no python3"
    (tools / "python3").write_text(f'#!/bin/sh\nexec {sys.base_prefix}/bin/python3 -S "$@"\n')
    (tools / "python3").chmod(0o755)
    assert reason().startswith("the suite needs pytest, ")


# --- the folder in a kernel's source ----------------------------------------------------------------------------------


def test_programs_of_the_folder() -> None:
    """Each program of the Makefile is there, stands for tests that exist, and no test of KVM is left out."""
    makefile = (FOLDER / "Makefile").read_text()
    programs = set(re.findall(r"^TEST_PROGS\w* [:+]= (\S+)$", makefile, re.MULTILINE))
    assert programs == {
        path.name for path in FOLDER.iterdir() if path.is_symlink() and path.resolve().name == "ksft.sh"
    }
    cases = dict(
        re.findall(r"^(dirty_log_\w+(?:\.sh)?)\) tests=(.*) ;;", (FOLDER / "ksft.sh").read_text(), re.MULTILINE)
    )
    assert set(cases) == programs
    named: list[str] = []
    for text in cases.values():
        words = re.findall(r"(--ignore=)?(selftests[\w/.]*)", text)
        assert [name for _, name in words if not (ROOT / name).exists()] == []
        ignored = [name for ignore, name in words if ignore]
        chosen = [name for ignore, name in words if not ignore]
        named += [
            str(path.relative_to(ROOT))
            for name in chosen if name != "selftests"
            for path in ([ROOT / name] if name.endswith(".py") else (ROOT / name).glob("test_*.py"))
            if str(path.relative_to(ROOT)) not in ignored
        ]  # fmt: skip
    tests = [path.relative_to(ROOT) for path in ROOT.glob("selftests/*/test_*.py")]
    assert sorted(named) == sorted(str(path) for path in tests if path.parts[1] != "unit")


def test_config_has_what_tests_skip_for() -> None:
    """The kernel options that a test names when it is skipped for want of them are in the config fragment."""
    files = [*ROOT.glob("lib/**/*.py"), *(path for path in ROOT.glob("selftests/*/*.py") if path.parent.name != "unit")]
    reasons = [
        reason for path in files for reason in re.findall(r"\((CONFIG_\w+(?:, CONFIG_\w+)*)\)", path.read_text())
    ]
    named = {name for reason in reasons for name in reason.split(", ")}
    assert {"CONFIG_KSM", "CONFIG_TRANSPARENT_HUGEPAGE"} <= named
    chosen = set(re.findall(r"^(CONFIG_\w+)=y$", (FOLDER / "config").read_text(), re.MULTILINE))
    assert named - chosen == {"CONFIG_KVM_GUEST_MEMFD"}  # KVM selects it


@pytest.fixture
def kernel_tree(tmp_path: Path) -> Path:
    """A kernel source tree that may be written to: what kselftest needs of the one that KERNEL_SOURCE names."""
    if not KERNEL_SOURCE:
        pytest.skip("KERNEL_SOURCE in the environment names no kernel source tree")
    if shutil.which("rsync") is None:
        pytest.skip("kselftest installs with rsync: apt install rsync")
    source, tree = Path(KERNEL_SOURCE).resolve(), tmp_path / "linux"
    selftests = Path("tools/testing/selftests")
    (tree / selftests).mkdir(parents=True)
    (tree / "scripts").symlink_to(source / "scripts")
    for path in (source / selftests).iterdir():
        if path.is_file():
            shutil.copy(path, tree / selftests)
    shutil.copytree(source / selftests / "kselftest", tree / selftests / "kselftest")
    return tree


def add_folder(tree: Path, how: str) -> None:
    """Link or copy kselftest/ to the kernel's selftests; the checkout is one that may be written to."""
    checkout, target = tree / "checkout", tree / "tools/testing/selftests/dirty_log"
    shutil.copytree(FOLDER, checkout / "kselftest", symlinks=True, ignore=shutil.ignore_patterns("*.elf", "testcases"))
    for path in FOLDER.iterdir():
        if path.is_symlink() and not (checkout / "kselftest" / path.name).exists():
            (checkout / path.name).symlink_to(ROOT / path.name)
    if how == "link":
        target.symlink_to(checkout / "kselftest")
    else:
        subprocess.run(["cp", "-rL", str(checkout / "kselftest"), str(target)], check=True)


def make(tree: Path, *words: str, **environment: str) -> str:
    """Run make in the kernel's selftests; returns what it printed."""
    command = ["make", "-C", f"{tree}/tools/testing/selftests", "TARGETS=dirty_log", "FORCE_TARGETS=1", *words]
    clean = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL")}
    done = subprocess.run(
        command, env=clean | environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def path_with_python(folder: Path) -> str:
    """A PATH whose first python3, put into *folder*, has the suite's packages, as a distribution's would."""
    folder.mkdir(exist_ok=True)
    (folder / "python3").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (folder / "python3").chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


ARGUMENTS = {"KSELFTEST_DIRTY_LOG_MATRIX_SH_ARGS": " ".join(SMALL_CELL)}


@pytest.mark.slow
@pytest.mark.usefixtures("kvm")
@pytest.mark.parametrize(
    ("how", "output"),
    # The last is what make kselftest O=... at the top of the tree does: the programs are copied to where they are built.
    [
        ("link", ""),
        ("copy", ""),
        ("link", "O=../out"),
        ("copy", "O=/out"),
        ("link", "O=/out building_out_of_srctree=1"),
    ],
)
def test_run_by_the_kernels_runner(kernel_tree: Path, tmp_path: Path, how: str, output: str) -> None:
    """Make run_tests builds the guest programs and runs a program through runner.sh, linked or copied, and with any O=."""
    add_folder(kernel_tree, how)
    words = output.replace("O=/", f"O={tmp_path}/").split()
    environment = ARGUMENTS | {"TMPDIR": str(tmp_path), "PATH": path_with_python(tmp_path / "tools")}
    text = make(kernel_tree, *words, "TEST_PROGS=dirty_log_matrix.sh", "run_tests", **environment)
    assert "\nok 1 selftests: dirty_log: dirty_log_matrix.sh\n" in text
    assert "timeout set to 45" not in text
    stream = [line[2:] for line in text.splitlines() if line.startswith("# ")]
    *_, the_run = read_ktap("\n".join(stream[stream.index("KTAP version 1") :]) + "\n")
    assert the_run.ok
    make(kernel_tree, *words, "clean")
    assert [*tmp_path.rglob("*.elf")] == []


@pytest.mark.slow
@pytest.mark.usefixtures("kvm")
def test_archive_on_another_machine(kernel_tree: Path, tmp_path: Path) -> None:
    """What gen_tar packs runs where there is nothing else of the suite, no binutils, and nothing may be written."""
    add_folder(kernel_tree, "link")
    make(kernel_tree, f"KSFT_INSTALL_PATH={tmp_path}/installed", "gen_tar")
    make(kernel_tree, "clean")
    target = tmp_path / "target"
    target.mkdir()
    (archive,) = (tmp_path / "installed/kselftest-packages").iterdir()
    subprocess.run(["tar", "-xf", str(archive), "-C", str(target)], check=True)
    shutil.rmtree(tmp_path / "installed")
    tests = target / "dirty_log"
    # The KVM Selftest Runner runs all that it finds, and kills what takes longer than two minutes.
    commands = {path.parent.name: path.read_text() for path in tests.glob("testcases/*/default.test")}
    names = re.findall(r"^TEST_PROGS [:+]= (\S+)$", (FOLDER / "Makefile").read_text(), re.MULTILINE)
    assert commands == {name: f"../dirty_log/{name}\n" for name in names}
    before = sorted(target.rglob("*"))
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("as", "ld", "gcc", "cc"):
        (tools / name).write_text("#!/bin/sh\nexit 1\n")
        (tools / name).chmod(0o755)
    status, text, _ = run(
        *(str(target / "run_kselftest.sh"), "-t", "dirty_log:dirty_log_matrix.sh"),
        PATH=path_with_python(tools), TMPDIR=str(tmp_path), **ARGUMENTS,
    )  # fmt: skip
    assert status == PASS
    parser = [sys.executable, "-B", f"{KERNEL_SOURCE}/tools/testing/kunit/kunit.py", "parse"]
    done = subprocess.run(parser, input=text, capture_output=True, text=True)
    assert done.stdout.endswith("Testing complete. Ran 1 tests: passed: 1\n"), done.stdout
    assert sorted(target.rglob("*")) == before
