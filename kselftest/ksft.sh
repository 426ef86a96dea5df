#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-only
#
# Each test program of this folder is a link to this one, and runs what its name stands for with the suite's own Python, or the
# system's. Without what it needs, the test is skipped as kselftest has it. Arguments are options of pytest.
set -u

name=$(basename "$0")

skip() {
	printf 'KTAP version 1\n1..1\nok 1 %s # SKIP %s\n' "$name" "$1"
	exit 4
}

here=$(dirname "$(readlink -f "$0")")
# In the suite's checkout this folder has links to the suite; in a copy it has the suite itself.
[ -e "$here/conftest.py" ] || skip "the suite is not in $here: copy the folder with cp -rL (docs/kselftest.md)"
suite=$(dirname "$(readlink -f "$here/conftest.py")")

small() { # TESTS...: at sizes that take less than 45 s on a host
	echo "--test-mem=64M --iterations=8 --ring-count=4096 $*"
}

case $name in
dirty_log_test) tests= ;; # it takes the options of the kernel's own test; -h lists them
dirty_log_matrix.sh) tests=$(small selftests/matrix) ;;
dirty_log_bitmap.sh) tests=$(small selftests/interface/test_get_and_clear.py) ;;
dirty_log_ring.sh) tests=$(small selftests/interface/test_ring_protocol.py) ;;
dirty_log_slots.sh) tests=$(small selftests/interface/test_slots.py) ;;
dirty_log_arguments.sh) tests=$(small selftests/interface/test_arguments.py) ;;
dirty_log_writes.sh) tests=$(small selftests/memory/test_writes.py) ;;
dirty_log_write_protection.sh) tests=$(small selftests/memory/test_write_protection.py) ;;
dirty_log_host_memory.sh) tests=$(small selftests/memory --ignore=selftests/memory/test_writes.py --ignore=selftests/memory/test_write_protection.py) ;;
dirty_log_concurrency.sh) tests=$(small selftests/concurrency/test_concurrency.py) ;;
dirty_log_ring_concurrency.sh) tests=$(small selftests/concurrency --ignore=selftests/concurrency/test_concurrency.py) ;;
dirty_log_scenarios.sh) tests=$(small selftests/scenarios) ;;
dirty_log_x86.sh) tests=$(small selftests/x86_64) ;;
dirty_log_full.sh) tests="selftests --ignore=selftests/unit" ;; # all of them, at full size
*) skip "$name stands for no tests: start one of the links to it" ;;
esac

python=$suite/.venv/bin/python
[ -x "$python" ] || python=$(command -v python3) || skip "there is no python3"

# What a user's own Python and pytest are set up with could keep the suite's from finding its modules and plugins.
unset PYTHONHOME PYTHONSAFEPATH PYTHONOPTIMIZE PYTEST_PLUGINS PYTEST_DISABLE_PLUGIN_AUTOLOAD PYTEST_ADDOPTS
export PYTHONPATH="$suite/lib" PYTHONDONTWRITEBYTECODE=1

# The guest programs that make has built: it names their folder, or it is this one. In a checkout, the suite builds its own once
# their sources are newer.
if [ -z "${DIRTY_LOG_GUEST_CODE:-}" ] && [ -e "$here/dirty_writer.elf" ] &&
	{ [ "$here" = "$suite" ] || [ -z "$(find "$suite/guest_code" -type f -newer "$here/dirty_writer.elf")" ]; }; then
	export DIRTY_LOG_GUEST_CODE="$here"
fi

folder=$PWD
cd "$suite" || skip "$suite cannot be entered"
# shellcheck disable=SC2086 # words without spaces
exec "$python" -m harness.kselftest "$name" "$folder" $tests "$@"
