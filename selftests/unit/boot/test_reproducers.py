# SPDX-License-Identifier: GPL-2.0-only
"""C programs in a booted kernel that has the known bugs: the reproducers of bugs/, and what --emit-c prints."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from dirty_tracking.sequence_in_c import c_program
from dirty_tracking.sequences import Collect, Create, Delete, FailedSequence, Write
from dirty_tracking.violations import Kind, Violation
from harness import known_bugs
from kvm_util.host import version_numbers
from runner import ROOT, initramfs
from runner.kernel import Kernel
from runner.program_boot import boot_programs
from runner.qemu import Machine

pytestmark = [pytest.mark.boots, pytest.mark.slow]

BUGS = sorted(path.parent.name for path in (ROOT / "bugs").glob("*/reproducer.c"))
TIME_LIMIT = 120  # seconds
# A sequence with ring-reset-drops-mask, and a sound one: the slot that is created again is smaller, or is not.
SEQUENCES = {
    f"sequence-{npages}": FailedSequence(
        "dirty-ring",
        (
            Create(1, 0, 70), Write(1, (69,)), Delete(1), Create(1, 0, npages), Write(1, (60,)), Collect(), Write(1, (60,)),
        ),
        (Violation(Kind.LOST, "page 60", 1, (60,)),),
        1024,
    )
    for npages in (64, 70)
}  # fmt: skip
# What the kernel runs once KVM's modules are loaded
RUN = """
import json, os, subprocess
input()
print(json.dumps({name: subprocess.run([f"/programs/{name}"]).returncode for name in os.listdir("/programs")}))
"""


def status_of(bug: str, kernel: Kernel) -> int:
    """With which status the reproducer of *bug* ends: 1, or 4 in a kernel that is older than the bug."""
    first = min(version_numbers(entry.kernels[0]) for entry in known_bugs.load() if entry.is_of(bug))
    return 1 if version_numbers(kernel.release) >= first else 4


def test_reproducers_show_their_bugs(kernel: Kernel, tmp_path: Path) -> None:
    """Without eager page splitting, each C program ends with status 1 in a kernel that has its bug, and only then."""
    if shutil.which("gcc") is None:
        pytest.skip("no gcc (apt install gcc libc6-dev)")
    expected = {bug: status_of(bug, kernel) for bug in BUGS} | {"sequence-64": 1, "sequence-70": 0}
    programs = []
    for name in expected:
        programs.append(tmp_path / name)
        source = tmp_path / f"{name}.c"
        if name in SEQUENCES:
            source.write_text(c_program(SEQUENCES[name]))
        else:
            shutil.copy(ROOT / "bugs" / name / "reproducer.c", source)
        subprocess.run(["gcc", "-O2", "-o", programs[-1], source], check=True)
    size = Machine(memory=1024, cpus=1, append="")
    command = [initramfs.PYTHON, "-c", RUN]
    *_, last = boot_programs(kernel, {"kvm.eager_page_split": "0"}, programs, command, tmp_path, size, TIME_LIMIT)
    output = str(last["output"])
    statuses = json.loads(output.splitlines()[-1])
    assert statuses == expected, output
