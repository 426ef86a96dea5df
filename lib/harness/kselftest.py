# SPDX-License-Identifier: GPL-2.0-only
"""A test program of kselftest/: harness.kselftest NAME FOLDER [arguments]. It prints KTAP and has kselftest's exit statuses.

The arguments are options of pytest, or those of the C test if NAME is dirty_log_test. Files that they name to write are
relative to FOLDER, where the user is.
"""

import os
import shutil
import sys
import tempfile

from runner.unmet import unmet

PASS, FAIL, SKIP = 0, 1, 4


def main(name: str, folder: str, words: list[str]) -> int:
    """Run the program *name*, as called in *folder*, and return its exit status."""
    if reason := unmet("install it (on Debian, apt install python3-pytest python3-pyelftools python3-hypothesis)"):
        return _skip(name, reason)
    # Only now: these need what may be missing.
    import pytest

    from harness.c_test import USAGE, suite_options
    from kvm_util.guest_program import GuestProgramError, assemble_all
    from kvm_util.host_limits import HostLimit
    from runner.suite_pytest import make_absolute

    if name == "dirty_log_test":
        try:
            words = suite_options(words)
        except pytest.UsageError as error:
            print(f"{name}: {error}", file=sys.stderr)
            return FAIL
        except HostLimit as limit:
            return _skip(name, str(limit))
        if not words:
            print(USAGE)
            return PASS
    try:
        assemble_all()
    except GuestProgramError as error:
        return _skip(name, str(error))
    return _run(name, make_absolute(words, folder))


def _run(name: str, words: list[str]) -> int:
    """Run pytest, and return kselftest's exit status for pytest's own."""
    import pytest

    from runner.errors import CANNOT_TEST
    from runner.suite_pytest import run

    try:
        results = tempfile.mkdtemp(prefix=f"{name}-")
    except OSError as error:
        return _skip(name, f"no folder for the results can be made: {error.strerror} (TMPDIR names another place)")
    try:
        # The folder of the suite may be read-only.
        status = run(["--ktap", f"--results={results}", "-o", f"cache_dir={results}/pytest_cache", *words])
    finally:
        # Nothing is kept after a wrong option, say, or if --results names another place.
        if set(os.listdir(results)) <= {"pytest_cache"}:
            shutil.rmtree(results)
    # Whatever else it is, an interruption, a wrong option or no test at all, it is no pass.
    statuses: dict[int, int] = {pytest.ExitCode.OK: PASS, pytest.ExitCode.NO_TESTS_COLLECTED: SKIP, CANNOT_TEST: SKIP}
    return statuses.get(status, FAIL)


def _skip(name: str, reason: str) -> int:
    print(f"KTAP version 1\n1..1\nok 1 {name} # SKIP {' '.join(reason.split())}")
    return SKIP


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2], sys.argv[3:]))
