# SPDX-License-Identifier: GPL-2.0-only
"""Limits of the whole machine and of its control groups are reported with their remedy; files of /proc and /sys are faked."""

import errno
import mmap
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from kvm_util import cgroups, host_limits, memory
from kvm_util.host_limits import HostLimit, explain
from kvm_util.memory import BACKINGS, GIB, KIB, MIB, GuestMemory, HugePagesMissing

MEMINFO = """
MemTotal:       2000000 kB
MemAvailable:   1500000 kB
CommitLimit:    1000000 kB
Committed_AS:    200000 kB
"""


Proc = Callable[..., None]


@pytest.fixture
def proc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Proc:
    """A function that adds files with the given contents to a fake /proc, which is empty at first."""
    monkeypatch.setattr(host_limits, "PROC", tmp_path)
    monkeypatch.setattr(cgroups, "PROC", tmp_path)

    def write(files: dict[str, object], folder: str = ".") -> None:
        for name, content in files.items():
            path = tmp_path / folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{content}\n")

    return write


def test_no_overcommit_limits_memory(proc: Proc, monkeypatch: pytest.MonkeyPatch) -> None:
    """With vm.overcommit_memory=2 the commit limit is reported as the reason, and bounds the available memory."""

    def refuses(*_arguments: object) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    proc({"meminfo": MEMINFO, "sys/vm/overcommit_memory": 2, "sys/vm/admin_reserve_kbytes": 8192})
    monkeypatch.setattr(mmap, "mmap", refuses)
    expected = (
        r"cannot map 1 GiB of anonymous guest memory: with vm.overcommit_memory=2 all processes may map 976 MiB, used or not"
        r" \(sysctl vm.overcommit_memory=0\)"
    )
    with pytest.raises(HostLimit, match=expected):
        GuestMemory(BACKINGS["anonymous"], GIB, 0)
    assert host_limits.available_memory() == (1000000 - 200000 - 8192) * KIB
    proc({"sys/vm/overcommit_memory": 0})
    assert host_limits.available_memory() == 1500000 * KIB
    with pytest.raises(memory.GuestMemoryError, match="ENOMEM"):
        GuestMemory(BACKINGS["anonymous"], GIB, 0)


MOUNTS_V2 = "30 23 0:26 {root} {at} rw,nosuid - cgroup2 cgroup2 rw,nsdelegate"
MOUNTS_V1 = "36 32 0:31 {root} {at} rw,nosuid shared:9 - cgroup cgroup rw,memory"


@pytest.mark.parametrize(
    ("groups", "root", "folder"),
    [
        ("0::/a/b", "/", "a/b"),  # a host
        ("0::/", "/", "."),  # a container with a cgroup namespace
        ("0::/system/docker-1", "/system/docker-1", "."),  # one without: the mount begins at its group
        ("0::/../other", "/", "."),  # a process that was moved out of the namespace's root
    ],
)
def test_cgroup_v2_paths(proc: Proc, tmp_path: Path, groups: str, root: str, folder: str) -> None:
    """The limits of this process's cgroup v2 group are found on a host and in containers of each kind."""
    at = tmp_path / "cgroup"
    proc({"self/cgroup": groups, "self/mountinfo": MOUNTS_V2.format(root=root, at=at)})
    proc({"memory.max": "max", "memory.high": 500 * MIB, "memory.current": 300 * MIB}, f"cgroup/{folder}")
    proc({"memory.stat": f"inactive_file {MIB}", "pids.max": 77, "pids.current": 7}, f"cgroup/{folder}")
    (limit,) = cgroups.memory()
    assert (limit.file, limit.limit, limit.usage) == (at / folder / "memory.high", 500 * MIB, 299 * MIB)
    assert [(limit.limit, limit.usage) for limit in cgroups.pids()] == [(77, 7)]


def test_cgroup_v1_limit_of_a_parent(proc: Proc, tmp_path: Path) -> None:
    """The limit of a parent group counts if the group itself has none; v1 controllers have separate hierarchies."""
    at = tmp_path / "cgroup"
    proc({"self/cgroup": "4:memory:/a/b\n3:pids:/\n0::/x", "self/mountinfo": MOUNTS_V1.format(root="/", at=at)})
    proc({"memory.limit_in_bytes": 9223372036854771712, "memory.usage_in_bytes": 5}, "cgroup/a/b")
    proc({"memory.limit_in_bytes": GIB, "memory.usage_in_bytes": 10 * MIB}, "cgroup/a")
    proc({"memory.stat": f"inactive_file 1\ntotal_inactive_file {4 * MIB}"}, "cgroup/a")
    (limit,) = cgroups.memory()
    assert (limit.file, limit.limit, limit.usage) == (at / "a/memory.limit_in_bytes", GIB, 6 * MIB)
    assert cgroups.pids() == []


@pytest.mark.parametrize(("file", "usage"), [("max", "current"), ("rsvd.max", "rsvd.current")])
def test_hugetlb_limit_of_a_control_group(
    proc: Proc, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, usage: str
) -> None:
    """A control group's hugetlb limit makes a backing unavailable although the pool has free pages."""
    at = tmp_path / "cgroup"
    proc({"pools/hugepages-2048kB/free_hugepages": 16})
    monkeypatch.setattr(memory, "_HUGEPAGES", tmp_path / "pools")
    proc({"self/cgroup": "0::/pod", "self/mountinfo": MOUNTS_V2.format(root="/", at=at)})
    proc({f"hugetlb.2MB.{file}": 8 * MIB, f"hugetlb.2MB.{usage}": 4 * MIB}, "cgroup/pod")
    backing = BACKINGS["anonymous_hugetlb_2mb"]
    assert backing.missing(4 * MIB) is None
    assert "needs 32 free huge pages of 2 MiB, the host has 16 (echo 32 >" in (backing.missing(64 * MIB) or "")
    expected = f"anonymous_hugetlb_2mb: needs 3 huge pages of 2 MiB, but {at}/pod/hugetlb.2MB.{file} allows 8 MiB ("
    assert (backing.missing(6 * MIB) or "").startswith(expected)


ALL_OFF = "transparent huge pages are off (echo {word} > {at})"
SIZE_OFF = "transparent huge pages of 2 MiB are off (echo inherit > {at_size})"


@pytest.mark.parametrize(
    ("name", "file", "word"), [("anonymous_thp", "enabled", "madvise"), ("shmem_thp", "shmem_enabled", "advise")]
)
@pytest.mark.parametrize(
    ("common", "of_size", "expected"),
    [
        ("always [madvise] never", None, None),
        ("always madvise [never]", None, ALL_OFF),
        ("always [madvise] never", "always inherit madvise [never]", SIZE_OFF),
        ("always [madvise] never", "always [inherit] madvise never", None),
        ("always madvise [never]", "always [inherit] madvise never", ALL_OFF),
        ("always madvise [never]", "always inherit [madvise] never", None),
        ("always within_size advise never [deny] force", "always inherit [advise] never", ALL_OFF),
    ],
)
def test_thp_settings_per_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    name: str, file: str, word: str, common: str, of_size: str | None, expected: str | None,
) -> None:  # fmt: skip
    """A size's own THP setting decides, or the global one that it inherits; the remedy names the right one."""
    at, at_size = tmp_path / file, tmp_path / "hugepages-2048kB" / file
    at.write_text(common)
    if of_size is not None:
        at_size.parent.mkdir()
        at_size.write_text(of_size)
    monkeypatch.setattr(memory, "_THP", tmp_path)
    reason = f"{name}: {expected.format(word=word, at=at, at_size=at_size)}" if expected else None
    assert BACKINGS[name].missing(2 * MIB) == reason
    # Memory that was mapped before THP was disabled, or gets no huge page although it is not: it would test base pages
    guest_memory = GuestMemory(BACKINGS[name], 8 * MIB, 0)
    monkeypatch.setattr(GuestMemory, "transparent_huge_size", lambda _: 0)
    with pytest.raises(HugePagesMissing, match=re.escape(reason or "gave no huge page")):
        guest_memory.populate()
    guest_memory.close()


def test_memory_left_explains_no_enomem(proc: Proc) -> None:
    """ENOMEM is explained only if less memory is left than the call asked for plus what KVM may allocate."""
    proc({"meminfo": MEMINFO.replace("1500000", "13000")})
    assert explain(errno.ENOMEM) is None
    assert explain(errno.ENOMEM, MIB) is not None
    proc({"meminfo": MEMINFO.replace("1500000", "12000")})
    assert explain(errno.ENOMEM) == "the host has 1953 MiB (end other programs)"


@pytest.mark.parametrize(("taken", "explained"), [(2, 1), (0, 0)])
def test_refused_fork_explains_one_error(
    proc: Proc, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, taken: int, explained: int
) -> None:
    """A fork refused by a control group explains one error, also after other threads have ended."""
    proc({"self/cgroup": "0::/", "self/mountinfo": MOUNTS_V2.format(root="/", at=tmp_path / "cgroup")})
    proc({"pids.max": 4, "pids.current": taken, "pids.events": "max 7"}, "cgroup")
    monkeypatch.setattr(host_limits, "_refusals", host_limits._Refusals())
    assert host_limits.why_thread_refused() is None
    proc({"pids.events": f"max {7 + explained}"}, "cgroup")
    assert [host_limits.why_thread_refused() is not None for _ in range(2)] == [bool(explained), False]
