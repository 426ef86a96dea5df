# SPDX-License-Identifier: GPL-2.0-only
"""Kernel log: recognizing reports, and failing the test and the run during which one appears."""

import sys
from pathlib import Path
from unittest.mock import Mock

import pytest

from harness.kernel_log_watch import KernelWatch
from harness.known_bugs import load
from runner import ROOT
from runner.kernel_log import KernelLog, Kind, Splat, find_splats, kernel_lines
from runner.taint import describe, describe_set
from selftests.unit.commands import Done, start

# First lines of reports of Linux 6.1 to 7.2
TITLES = {
    "WARNING: CPU: 1 PID: 717 at virt/kvm/dirty_ring.c:255 kvm_dirty_ring_push+0xab/0xc0 [kvm]": Kind.WARN,
    "WARNING: virt/kvm/dirty_ring.c:255 at kvm_dirty_ring_push+0xab/0xc0 [kvm], CPU#1: python3/717": Kind.WARN,
    "WARNING: possible circular locking dependency detected": Kind.LOCKDEP,
    "WARNING: suspicious RCU usage": Kind.LOCKDEP,
    "[ BUG: Invalid wait context ]": Kind.LOCKDEP,
    "BUG: KASAN: slab-use-after-free in kvm_tdp_mmu_zap_leafs+0x1f/0x30 [kvm]": Kind.KASAN,
    "BUG: KFENCE: use-after-free read in test+0x1/0x2": Kind.KASAN,
    "UBSAN: shift-out-of-bounds in arch/x86/kvm/mmu/mmu.c:5:5": Kind.UBSAN,
    "rcu: INFO: rcu_preempt self-detected stall on CPU": Kind.STALL,
    "rcu: INFO: rcu_sched detected stalls on CPUs/tasks:": Kind.STALL,
    "watchdog: BUG: soft lockup - CPU#0 stuck for 26s! [python3:717]": Kind.STALL,
    "INFO: task python3:717 blocked for more than 120 seconds.": Kind.STALL,
    "kernel BUG at arch/x86/kvm/mmu/mmu.c:1000!": Kind.BUG,
    "BUG: sleeping function called from invalid context at mm/util.c:1": Kind.BUG,
    "BUG: Bad page state in process python3  pfn:12345": Kind.BUG,
    "Oops: general protection fault, probably for non-canonical address 0xdead: 0000 [#1] PREEMPT SMP NOPTI": Kind.OOPS,
    "general protection fault, probably for non-canonical address 0xdead000000000100: 0000 [#1] PREEMPT SMP": Kind.OOPS,
    "invalid opcode: 0000 [#1] PREEMPT SMP NOPTI": Kind.OOPS,
    "Kernel panic - not syncing: Fatal exception": Kind.PANIC,
    "unchecked MSR access error: RDMSR from 0x1b0 at rIP: 0xffffffff81234567": Kind.WARN,
}
HARMLESS = [
    "kvm_amd: Nested Paging enabled",
    "Warning: unsupported feature",
    "debug: BUG: is only mentioned",
    "python3[717]: segfault at 0 ip 0 sp 0 error 4",
    "x86/fpu: Supporting XSAVE feature 0x001: 'x87 floating point registers'",
    "Modules linked in: kvm_amd kvm irqbypass [last unloaded: test]: 0000 [#1]",
]


@pytest.mark.parametrize(("title", "kind"), TITLES.items(), ids=[title[:40] for title in TITLES])
def test_kinds_of_kernel_reports(title: str, kind: Kind) -> None:
    """The first line of each kind of kernel report is recognized, and the report extends to its end marker."""
    (splat,) = find_splats(["before", title, "Call Trace:", "---[ end trace 0000000000000000 ]---", "after"])
    assert (splat.kind, splat.title) == (kind, title)
    assert splat.lines[-1].startswith("---[ end trace")


END = "---[ end trace 0 ]---"
WARN, OTHER_WARN = "WARNING: CPU: 0 PID: 1 at a.c:1 f", "WARNING: CPU: 0 PID: 1 at b.c:2 g"
FAULT, KASAN = "BUG: kernel NULL pointer dereference, address: 0", "BUG: KASAN: use-after-free in f"
PANIC = "Kernel panic - not syncing: kernel: panic_on_warn set ..."


@pytest.mark.parametrize(
    ("lines", "reports"),
    [
        (HARMLESS, []),
        # A BUG line that an Oops follows is one report.
        ([FAULT, "#PF: supervisor write", "Oops: 0002 [#1] SMP", "RIP: 0010:f", END], [(Kind.OOPS, FAULT)]),
        # One that begins within another one is of its own: a known bug has to explain both.
        ([WARN, "Call Trace:", KASAN], [(Kind.WARN, WARN), (Kind.KASAN, KASAN)]),
        ([FAULT, WARN], [(Kind.BUG, FAULT), (Kind.WARN, WARN)]),
        ([WARN, PANIC], [(Kind.WARN, WARN), (Kind.PANIC, PANIC)]),
        ([WARN, END, OTHER_WARN], [(Kind.WARN, WARN), (Kind.WARN, OTHER_WARN)]),
    ],
    ids=["harmless", "oops", "within", "within-bug", "panic-within", "consecutive"],
)
def test_reports_in_a_log(lines: list[str], reports: list[tuple[Kind, str]]) -> None:
    """Each report of a log is found once, and lines that merely look like one are ignored."""
    assert [(splat.kind, splat.title) for splat in find_splats(lines)] == reports


def test_records_of_user_space_are_ignored() -> None:
    """Only records of facility 0 count; escapes are decoded and properties left out."""
    records = "12,1,1,-;WARNING: from a program\n4,2,2,-;WARNING: one\\x0atwo\n SUBSYSTEM=pci\n6,3,3,-;info\n"
    assert kernel_lines(records) == ["WARNING: one", "two", "info"]


def test_earlier_records_are_ignored(tmp_path: Path) -> None:
    """Records from before the log was opened, and those already read, are not reported."""
    path = tmp_path / "kmsg"
    path.write_text("4,1,1,-;WARNING: old\n")
    log = KernelLog(str(path))
    assert log.new_splats() == []
    with path.open("a") as file:
        file.write("4,2,2,-;WARNING: new\n")
    assert [splat.title for splat in log.new_splats()] == ["WARNING: new"]
    assert log.new_splats() == []
    log.close()


def test_overrun_of_the_kernel_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Records overwritten before they were read (EPIPE) are a report; reading continues after them."""
    path = tmp_path / "kmsg"
    path.write_text("")
    log = KernelLog(str(path))
    records = [BrokenPipeError(), b"4,9,9,-;WARNING: still here\n", BlockingIOError()]
    with monkeypatch.context() as patched:
        patched.setattr("runner.kernel_log.os.read", Mock(side_effect=records))
        splats = log.new_splats()
    assert [splat.kind for splat in splats] == [Kind.LOST, Kind.WARN]
    log.close()


def test_no_known_bug_explains_an_overrun() -> None:
    """An overrun of the kernel log is never explained by a known bug."""
    (bug,) = [bug for bug in load() if bug.id == "pvm-ring-overflow"]
    assert bug.explains_log([next(iter(TITLES))])
    assert not bug.explains_log(Splat(Kind.LOST, ["the kernel's log overran before it could be read"]).titles)


REPORTING_TEST = """
import pathlib
def report(text):
    with open({path!r}, "a") as file:
        file.write(f"4,1,1,-;{{text}}\\n")
def test_before():
    pass
def test_one():
    report("WARNING: CPU: 0 PID: 1 at virt/kvm/kvm_main.c:1 kvm_arch_thing+0x1/0x2 [kvm]")
def test_after():
    pass
"""


@pytest.mark.parametrize("workers", [[], ["-n2"]], ids=["alone", "xdist"])
@pytest.mark.parametrize("explained", [False, True], ids=["new", "known-bug"])
def test_kernel_report_fails_test_and_run(tmp_path: Path, workers: list[str], explained: bool) -> None:
    """A kernel report fails the test that was running and the run, unless a known bug explains it."""
    path = tmp_path / "kmsg"
    path.write_text("")
    (tmp_path / "test_it.py").write_text(REPORTING_TEST.format(path=str(path)))
    plugin = "import runner.kernel_log, harness.known_bugs\n"
    plugin += f"runner.kernel_log.KernelLog.__init__.__defaults__ = ({str(path)!r},)\n"
    if explained:
        plugin += "harness.known_bugs.KnownBug.on = lambda self, host: True\n"
        plugin += "harness.known_bugs.KnownBug.explains_log = lambda self, titles: 'kvm_arch_thing' in titles[0]\n"
    (tmp_path / "plugin.py").write_text(plugin)
    command = [sys.executable, "-m", "pytest", "-p", "plugin", "-v", f"--results={tmp_path}/results"]
    command += [str(tmp_path / "test_it.py"), *workers]
    command += [f"-c{ROOT}/pytest.ini", f"--rootdir={ROOT}", f"--confcutdir={ROOT}", "-p", "conftest"]
    done = start(command, ROOT, PYTHONPATH=f"{tmp_path}:{ROOT}:{ROOT / 'lib'}")
    assert "virt/kvm/kvm_main.c:1 kvm_arch_thing" in done.stdout, done.stdout + done.stderr
    if explained:
        assert done.returncode == 0, done.stdout
        assert "WARN, known bug pvm-ring-overflow" in done.stdout
    else:
        assert done.returncode == 1
        assert "::test_one" in done.stdout.partition("short test summary")[2]
        assert "WARN, while " in done.stdout
        if not workers:
            assert "1 failed, 2 passed" in done.stdout


TAINTING_TEST = """
import pathlib
def test_before():
    pass
def test_one():
    new = pathlib.Path({path!r} + ".new")
    new.write_text("{after}\\n")
    new.replace({path!r})  # another worker must not find it empty, as it never finds the kernel's
def test_after():
    pass
"""


def tainting_run(tmp_path: Path, before: int, after: int, *words: str) -> Done:
    """A run in which a test changes the taint flags, on a kernel whose log cannot be read."""
    path = tmp_path / "tainted"
    path.write_text(f"{before}\n")
    (tmp_path / "test_it.py").write_text(TAINTING_TEST.format(path=str(path), after=after))
    plugin = "import runner.kernel_log, runner.taint, harness.kernel_log_watch\n"
    plugin += f"harness.kernel_log_watch.KernelWatch.__init__.__defaults__ = ({str(path)!r},)\n"
    for function in ("taint_flags", "describe_set"):
        plugin += f"runner.taint.{function}.__defaults__ = ({str(path)!r},)\n"
    plugin += "runner.kernel_log.KernelLog.__init__.__defaults__ = ('/nonexistent',)\n"
    (tmp_path / "plugin.py").write_text(plugin)
    command = [sys.executable, "-m", "pytest", "-p", "plugin", "-v", f"--results={tmp_path}/results"]
    command += [str(tmp_path / "test_it.py"), *words]
    command += [f"-c{ROOT}/pytest.ini", f"--rootdir={ROOT}", f"--confcutdir={ROOT}", "-p", "conftest"]
    return start([*command, "--no-known-bugs"], ROOT, PYTHONPATH=f"{tmp_path}:{ROOT}:{ROOT / 'lib'}")


@pytest.mark.parametrize("workers", [[], ["-n2"]], ids=["alone", "xdist"])
def test_new_taint_flag_fails_test_and_run(tmp_path: Path, workers: list[str]) -> None:
    """A taint flag that appears fails the test that was running and the run; the header has those from before."""
    done = tainting_run(tmp_path, 1 << 12, 1 << 12 | 1 << 7, *workers)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "\ntainted  O (a module from outside of the kernel's tree was loaded)\n" in done.stdout
    assert "\n  taint flag D (the kernel oopsed, or met a BUG)\n" in done.stdout
    assert "::test_one" in done.stdout.partition("short test summary")[2]


def test_taint_flags_of_others(tmp_path: Path) -> None:
    """Flags that were set before, and those that modules, an administrator or the hardware cause, fail nothing."""
    before = 1 << 9
    others = sum(1 << bit for bit in (0, 1, 2, 3, 4, 6, 8, 10, 11, 12, 13, 15, 16, 17, 18, 19, 31))
    done = tainting_run(tmp_path, before, before | others)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "taint flag" not in done.stdout


class Log(KernelLog):
    """A log with these reports, one at each look."""

    def __init__(self, *kinds: Kind | None) -> None:
        self._looks = [[Splat(kind, [kind.value])] if kind else [] for kind in kinds]

    def new_splats(self) -> list[Splat]:
        return self._looks.pop(0)


def test_flag_of_a_report_in_the_log(tmp_path: Path) -> None:
    """A flag that comes with a report in the log, or just after it, is no second report; any other flag is."""
    path = tmp_path / "tainted"
    path.write_text("0")
    watch = KernelWatch(Log(Kind.WARN, None, None), str(path))
    assert [report.kind for report in watch.new_reports()] == [Kind.WARN]
    path.write_text(str(1 << 9))
    assert watch.new_reports() == []
    path.write_text(str(1 << 9 | 1 << 7))
    assert [report.title for report in watch.new_reports()] == ["taint flag D (the kernel oopsed, or met a BUG)"]


def test_kernel_without_taint_flags(tmp_path: Path) -> None:
    """Flags that cannot be read are not watched, and the header says so; if they can be read later, none of them is new."""
    path = tmp_path / "tainted"
    watch = KernelWatch(None, str(path))
    assert describe_set(str(path)) == [f"not watched: {path} cannot be read"]
    assert watch.new_reports() == []
    path.write_text(str(1 << 7))
    assert watch.new_reports() == []
    watch = KernelWatch(None, str(path))
    path.unlink()
    assert watch.new_reports() == []
    path.write_text(str(1 << 7 | 1 << 5))
    assert [report.title for report in watch.new_reports()] == ["taint flag B (a page was found in a bad state)"]


def test_names_of_taint_flags() -> None:
    """Each flag has its letter, as the kernel prints it; one that is newer than the suite has its number."""
    assert [text[0] for text in describe((1 << 20) - 1)] == [*"PFSRMBUDAWCIOELKXTNJ"]
    assert describe(1 << 40 | 1 << 9) == ["W (a WARN in the kernel)", "bit 40"]
