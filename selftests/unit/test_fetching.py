# SPDX-License-Identifier: GPL-2.0-only
"""Fetching kernels and QEMU from the Debian archive, the caches they go into, and the choice of a QEMU."""

import hashlib
import multiprocessing
import os
import re
import shutil
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from runner import apt, apt_sources, debian, emulator, fetch, initramfs
from runner.apt import Suite, cause
from runner.apt_sources import mirror
from runner.arch import this_arch
from runner.emulator import Emulator, debian_emulator, find_emulator
from runner.errors import CANNOT_TEST, CannotTest
from runner.store import fill, is_complete

SOUND, UNSOUND = "10.0.13", "7.2.22"


@pytest.fixture(autouse=True)
def build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder in place of the checkout's build/."""
    for module in (apt, debian, emulator):
        monkeypatch.setattr(module, "BUILD", tmp_path / "build")
    monkeypatch.setattr(emulator, "_CACHE", tmp_path / "build/qemu")
    return tmp_path / "build"


def make_program(path: Path, text: str) -> Path:
    """Write a shell script."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


# --- folders that are filled once -------------------------------------------------------------------------------------


def test_interrupted_fill(tmp_path: Path) -> None:
    """A fill that fails leaves no folder, an incomplete folder is filled from nothing, and a complete one is left as it is."""

    def fail(path: Path) -> None:
        (path / "half").touch()
        raise CannotTest("no space")

    with pytest.raises(CannotTest, match="no space"):
        fill(tmp_path / "a", fail)
    assert not (tmp_path / "a").exists()
    (tmp_path / "a").mkdir()  # as an interrupted copy leaves it
    (tmp_path / "a/half").touch()
    assert not is_complete(tmp_path / "a")
    fill(tmp_path / "a", lambda path: (path / "whole").touch())
    fill(tmp_path / "a", lambda path: (path / "second").touch())
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [".complete", "whole"]


def _write_slowly(folder: Path) -> None:
    with (folder.parents[1] / "log").open("a") as log:
        log.write("x")
    time.sleep(0.5)


def test_concurrent_fills(tmp_path: Path) -> None:
    """The second run waits for the first one, and uses what it wrote."""
    runs = [multiprocessing.Process(target=fill, args=(tmp_path / "a", _write_slowly)) for _ in range(3)]
    for run in runs:
        run.start()
    for run in runs:
        run.join()
    assert [run.exitcode for run in runs] == [0, 0, 0]
    assert (tmp_path / "log").read_text() == "x"


def test_read_only_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A complete folder is used without a lock, and a lock file may be another user's."""
    opened: list[int] = []
    real = os.open

    def recorded(path: Path, flags: int, *more: Any, **named: Any) -> int:
        opened.extend([flags & os.O_ACCMODE] if Path(path).name == ".lock" else [])
        return real(path, flags, *more, **named)

    monkeypatch.setattr(os, "open", recorded)
    monkeypatch.setattr(initramfs, "CACHE", tmp_path)
    monkeypatch.setattr(initramfs, "_make_base", Path.touch)
    for _ in range(2):
        fill(tmp_path / "a", lambda _path: None)
        initramfs._base()
    assert opened == [os.O_RDONLY] * 2  # in the first iteration


def test_leftovers_of_killed_runs(tmp_path: Path) -> None:
    """The next fill of a folder removes them, and nothing else."""
    for name in (".partial/root", "other"):
        (tmp_path / name).mkdir(parents=True)
    fill(tmp_path / "a", lambda _path: None)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "a", "other"]


# --- the archive ------------------------------------------------------------------------------------------------------


MIRROR = "http://mirror.test/debian"
STANZA = f"Types: deb\nURIs: {MIRROR}\nSuites: bookworm\nComponents: main\n"


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder in place of the sources of the host's apt."""
    (tmp_path / "apt/sources.list.d").mkdir(parents=True)
    monkeypatch.delenv("DEBIAN_MIRROR", raising=False)
    monkeypatch.setattr(apt_sources, "_APT", tmp_path / "apt")
    return tmp_path / "apt/sources.list.d"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("../sources.list", f"deb {MIRROR} bookworm main\n"),
        ("b.list", f"# deb http://comment.test/debian sid main\n  deb\t{MIRROR}  bookworm contrib main # why"),
        ("b.list", f"deb [signed-by=/debian-archive.gpg arch=amd64] {MIRROR} trixie-updates main"),
        ("b.sources", STANZA),
        ("b.sources", f"# a comment\n{STANZA}"),
        ("b.sources", STANZA.replace("URIs:", "uris:\n # not a comment\n").replace("Suites", "SUITES")),
        ("b.sources", STANZA.replace("URIs:", "URIs: http://other.test/apt")),
        ("b.sources", f"{STANZA}Enabled: yes\nSigned-By: /usr/share/keyrings/debian-archive-keyring.gpg"),
        ("b.sources", f"{STANZA.replace(MIRROR, 'http://no.test/debian')}Enabled: no\n\n{STANZA}"),
    ],
)
def test_mirror_in_apt_sources(sources: Path, name: str, text: str) -> None:
    """Packages come from the mirror of the host's apt, in either format of its sources."""
    (sources / name).write_text(text)
    assert mirror() == MIRROR


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.list", "deb https://docker.test/linux/debian bookworm stable"),
        ("a.list", "deb [signed-by=/keys/other.gpg] https://other.test/debian bookworm main"),
        ("a.list", "deb https://nodes.test/debian nodistro main"),
        ("a.list", "deb https://security.test/debian bookworm-security main"),
        ("a.list", "deb https://other.test/apt bookworm main"),
        ("a.list", "deb-src https://source.test/debian bookworm main"),
        ("a.list.save", "deb http://old.test/debian bookworm main"),
        ("a.sources", f"Enabled: No\n{STANZA}".replace("mirror", "old")),
        ("a.sources", f"{STANZA}Signed-By: /keys/other.gpg\n".replace("mirror", "other")),
        ("a.sources", STANZA.replace("mirror", "source").replace("deb\n", "deb-src\n")),
        ("a.sources", STANZA.replace("mirror", "docker").replace("main", "stable")),
    ],
)
def test_sources_of_third_parties(sources: Path, name: str, text: str) -> None:
    """Third parties, disabled entries and files that apt does not read are skipped, although they come first."""
    (sources / name).write_text(text)
    with pytest.raises(CannotTest, match="no mirror"):
        mirror()
    (sources / "b.sources").write_text(STANZA)
    assert mirror() == MIRROR


@pytest.mark.parametrize("scheme", ["mirror+file://", "mirror+file:", "mirror:file:"])
def test_list_of_mirrors(sources: Path, scheme: str) -> None:
    """Of a list of mirrors, as in Debian's cloud images, the first one is taken."""
    listed = sources.parent / "mirrors.list"
    (sources / "a.sources").write_text(STANZA.replace(MIRROR, f"{scheme}{listed}"))
    with pytest.raises(CannotTest, match="no mirror"):
        mirror()
    listed.write_text(f"# a comment\n\n{MIRROR}\tpriority:1 type:deb\nhttp://second.test/debian\n")
    assert mirror() == MIRROR


@pytest.mark.usefixtures("sources")
def test_mirror_in_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a mirror in apt's sources, DEBIAN_MIRROR names one."""
    with pytest.raises(CannotTest, match="name one in DEBIAN_MIRROR=URI"):
        mirror()
    monkeypatch.setenv("DEBIAN_MIRROR", "http://named.test/debian")
    assert mirror() == "http://named.test/debian"


def make_archive(folder: Path) -> None:
    """An archive of the suite trixie, unsigned, with one package, ``tiny``."""
    index = folder / "dists/trixie/main/binary-amd64/Packages"
    index.parent.mkdir(parents=True)
    (folder / "tree/DEBIAN").mkdir(parents=True)
    control = "Package: tiny\nVersion: 1\nArchitecture: amd64\nMaintainer: nobody <n@o.test>\nDescription: none\n"
    (folder / "tree/DEBIAN/control").write_text(control)
    subprocess.run(["dpkg-deb", "-b", str(folder / "tree"), str(folder / "tiny.deb")], check=True, capture_output=True)
    package = (folder / "tiny.deb").read_bytes()
    digest = hashlib.sha256(package).hexdigest()
    index.write_text(f"{control}Filename: tiny.deb\nSize: {len(package)}\nSHA256: {digest}\n\n")


@pytest.mark.skipif(shutil.which("apt-get") is None, reason="apt-get is not there")
def test_hostile_apt_configuration(tmp_path: Path, build: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The host's apt configuration has no effect: no hooks run, no release is preferred, and its archives are kept."""
    mine, marker = tmp_path / "mine/user.deb", tmp_path / "marker"
    mine.parent.mkdir()
    mine.touch()
    hooks = ("APT::Update::Pre-Invoke", "APT::Update::Post-Invoke", "APT::Update::Post-Invoke-Success")
    settings = [
        *(f'{hook}:: "touch {marker}";' for hook in (*hooks, "DPkg::Post-Invoke", "AptCli::Hooks::Install")),
        *('APT::Default-Release "bookworm";', f'Dir::Cache::archives "{mine.parent}";'),
    ]
    (tmp_path / "hostile.conf").write_text("\n".join(settings))
    monkeypatch.setenv("APT_CONFIG", str(tmp_path / "hostile.conf"))
    monkeypatch.setenv("DEBIAN_MIRROR", f"file://{tmp_path}/archive")
    make_archive(tmp_path / "archive")
    suite = Suite("trixie")
    source = suite._folder / "sources.list"
    source.write_text(re.sub(r"\[.*\]", "[trusted=yes]", source.read_text()))
    suite._update()
    assert suite.packages("t") == ["tiny"]
    (downloaded,) = suite.download_with_dependencies("tiny")
    assert downloaded.is_relative_to(build)
    assert [path.name for path in suite.download(["tiny"])] == ["tiny_1_amd64.deb"]
    suite.forget_archives()
    assert (mine.exists(), downloaded.exists(), marker.exists()) == (True, False, False)
    with pytest.raises(CannotTest, match=r"failed: E: Unable to locate package none$"):
        suite.download_with_dependencies("none")


@pytest.mark.parametrize(
    ("said", "line"),
    [
        ("E: Failed to fetch http://a  Could not connect\nE: Some index files failed to download.", 0),
        ("W: old\nE: Failed to fetch http://a  Hash mismatch\nE: Write error - write (28: No space left on device)", 2),
        ("E: You don't have enough free space in /a.\nE: Aborting.", 0),
        ("tar: ./a: Cannot write: No space left on device\ndpkg-deb: error: tar subprocess returned 2", 0),
        ("one\ndpkg-deb: error: 'a' is not a Debian format archive\nlast", 1),
        ("W: a warning\nE: Unable to locate package a\nlast", 1),
        ("first\nlast", 1),
    ],
)
def test_cause_in_output_of_apt(said: str, line: int) -> None:
    """The line that names the cause is shown, wherever it is."""
    assert cause(said) == said.splitlines()[line]
    assert cause("") == "no message"


@pytest.mark.parametrize(
    ("said", "network"),
    [
        ("E: Failed to fetch http://a  Could not connect", True),
        ("E: The repository 'http://a trixie Release' does not have a Release file.", True),
        ("E: Failed to fetch http://a  Write error - write (28: No space left on device)", False),
        ("E: Unable to locate package a", False),
    ],
)
def test_remedy_without_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str, network: bool) -> None:
    """Only a missing network is answered with the remedy for one."""
    make_program(tmp_path / "apt-get", f'echo "{said}" >&2; exit 100')
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("DEBIAN_MIRROR", MIRROR)
    with pytest.raises(CannotTest) as raised:
        Suite("trixie")._update()
    assert str(raised.value).startswith(f"apt-get update (trixie) failed: {said}")
    assert ("without network" in str(raised.value)) == network


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """An archive that cannot be reached."""
    if not Path(apt._KEYRING).exists():
        pytest.skip(f"{apt._KEYRING} is not there (apt install debian-archive-keyring)")
    monkeypatch.setenv("DEBIAN_MIRROR", "file:///nonexistent/debian")
    Suite.updated.cache_clear()


@pytest.mark.usefixtures("no_network")
def test_fetch_without_network(capsys: pytest.CaptureFixture[str]) -> None:
    """One line says what could not be fetched, and how to fetch it elsewhere and copy it."""
    assert fetch.main([]) == CANNOT_TEST
    shown = capsys.readouterr().err.strip().splitlines()
    assert len(shown) == 2, shown
    assert shown[0].startswith("fetching QEMU, about 40 MB of Debian packages, into ")
    assert shown[1].startswith("cannot fetch: apt-get update (trixie) failed: ")
    assert "run make fetch in a clone that has it, and copy its build/kernels and build/qemu here" in shown[1]


USAGE = "usage: python -m runner.fetch KERNEL ..., such as debian:6.12"


@pytest.mark.parametrize(
    ("name", "status", "message"),
    [
        ("nonsense", CANNOT_TEST, "cannot fetch: no kernel 'nonsense': neither a file or folder, nor an installed release"),
        ("--help", 128, USAGE),
        ("", 128, USAGE),
    ],
)  # fmt: skip
def test_wrong_kernel_to_fetch(capsys: pytest.CaptureFixture[str], name: str, status: int, message: str) -> None:
    """A wrong name is one line, before QEMU is fetched."""
    assert fetch.main([name]) == status
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(message)


@pytest.mark.parametrize("kernels", [[], ["debian:6.12"], ["debian:6.12-rt-arm64"]], ids=["qemu", "kernel", "flavour"])
def test_unsupported_machine(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kernels: list[str]
) -> None:
    """On an architecture without an entry in arch.py nothing is fetched, and one line says so."""
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    monkeypatch.setattr("runner.kernel.CACHE", Path("/nonexistent"))
    assert fetch.main(kernels) == CANNOT_TEST
    shown = capsys.readouterr().err
    assert shown == "cannot fetch: no kernel can be booted on aarch64 yet: only x86_64 is supported\n"


@pytest.mark.parametrize("tool", ["apt-get", "apt-cache", "dpkg-deb"])
def test_host_without_apt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tool: str) -> None:
    """The missing tool is named, and what the user can do instead."""
    monkeypatch.setattr("shutil.which", lambda name: None if name == tool else f"/usr/bin/{name}")
    lacks = f"fetched with {tool}, which this machine lacks"
    with pytest.raises(CannotTest, match=f"{lacks}: install {this_arch().qemu}, or name one .*, or run make fetch"):
        debian_emulator("why")
    with pytest.raises(CannotTest, match=f"{lacks}: give the path of a kernel instead of debian:6.12, or run make"):
        debian.fetch("6.12", tmp_path / "kernels")


def test_host_without_archive_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package of the missing key is named."""
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(apt, "_KEYRING", Path("/nonexistent"))
    with pytest.raises(CannotTest, match="apt install debian-archive-keyring, or give a path"):
        apt.require("give a path")


def test_unwritable_build_folder(build: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A fetch that cannot write is one line."""
    build.touch()
    assert fetch.main([]) == CANNOT_TEST
    assert capsys.readouterr().err == f"cannot fetch: {build}/apt: Not a directory\n"


# --- which QEMU -------------------------------------------------------------------------------------------------------


@pytest.fixture
def host_qemu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The path of this host's QEMU, where none is yet; Debian's has the version "fetched"."""
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    monkeypatch.setattr(emulator, "debian_emulator", lambda why: Emulator(("fetched",), "fetched", why))
    other = replace(this_arch(), qemu="qemu-of-the-test")
    monkeypatch.setattr(emulator, "this_arch", lambda: other)
    return tmp_path / "bin/qemu-of-the-test"


def make_qemu(path: Path, version: str) -> str:
    """Write a program that reports *version* as QEMU does."""
    return str(make_program(path, f"echo 'QEMU emulator version {version} (Debian 1:{version})'"))


@pytest.mark.parametrize(
    ("installed", "emulates", "version", "why"),
    [
        (SOUND, True, SOUND, "this host's"),
        (UNSOUND, True, "fetched", f"this host's QEMU {UNSOUND} lets a guest set XCR0 behind KVM's back"),
        (UNSOUND, False, UNSOUND, "this host's"),
        (None, True, "fetched", "this host has no qemu-of-the-test"),
        ("v9.2.0-rc1", True, "9.2.0-rc1", "this host's"),
        ("unknown", True, "fetched", "this host's qemu-of-the-test does not run"),
    ],
    ids=["sound", "faulty", "faulty-not-emulating", "none", "of-ones-own", "without-number"],
)
def test_choice_of_a_qemu(host_qemu: Path, installed: str | None, emulates: bool, version: str, why: str) -> None:
    """This host's QEMU is used, unless there is none, or its emulation is used and has a fault to avoid."""
    if installed:
        make_qemu(host_qemu, installed)
    found = find_emulator(None, emulates)
    assert found.version == version
    assert found.origin.startswith(why)
    assert found.command == ("fetched" if version == "fetched" else str(host_qemu),)


def test_qemu_named_by_option(host_qemu: Path, tmp_path: Path) -> None:
    """--qemu is used whatever its version; a program that is missing or no QEMU is one line."""
    make_qemu(host_qemu, SOUND)
    assert find_emulator(make_qemu(tmp_path / "named", UNSOUND), emulates=True).version == UNSOUND
    with pytest.raises(CannotTest, match="--qemu /nonexistent: there is no such program"):
        find_emulator("/nonexistent", emulates=True)
    with pytest.raises(CannotTest, match="/bin/true is not a QEMU that runs here: "):
        find_emulator("/bin/true", emulates=True)


def test_faulty_qemu_without_network(
    host_qemu: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is used anyway, and one line says so and why."""
    monkeypatch.setattr(emulator, "debian_emulator", Mock(side_effect=CannotTest("no network")))
    make_qemu(host_qemu, UNSOUND)
    assert find_emulator(None, emulates=True).version == UNSOUND
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "it is used anyway, as there is no other: no network" in line


@pytest.mark.parametrize("content", ["#!/bin/sh\nexit 127\n", "\x7fELF of another machine"], ids=["script", "binary"])
def test_broken_qemu_of_the_host(host_qemu: Path, capsys: pytest.CaptureFixture[str], content: str) -> None:
    """Debian's QEMU replaces one that does not run, with the reason; if --qemu names it, that is an error."""
    make_program(host_qemu, "").write_text(content)
    assert find_emulator(None, emulates=True).version == "fetched"
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(f"{host_qemu} is not a QEMU that runs here: ")
    assert line.endswith("; Debian's is used instead")
    with pytest.raises(CannotTest, match="is not a QEMU that runs here"):
        find_emulator(str(host_qemu), emulates=True)


@pytest.mark.parametrize("mark", [":", ";"])
def test_checkout_path_with_separators(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mark: str) -> None:
    """Debian's QEMU is not fetched to a path that its loader would split."""
    monkeypatch.setattr(emulator, "_CACHE", tmp_path / f"a{mark}b/build/qemu")
    with pytest.raises(CannotTest, match="move the suite to a path without : and ;, or install"):
        debian_emulator("why")


def test_archive_without_qemu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A download that lacks QEMU's package is one line."""
    monkeypatch.setattr(emulator, "require", lambda _instead: None)
    monkeypatch.setattr(Suite, "updated", Mock(return_value=Mock(download_with_dependencies=Mock(return_value=[]))))
    with pytest.raises(CannotTest, match="downloaded other packages only: install qemu-system-x86_64"):
        debian_emulator("why")
