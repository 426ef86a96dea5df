#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-only
#
# ksft.sh NAME [arguments]: run the test program NAME of this folder with the suite's own Python, or the system's. Without
# what it needs, the test is skipped as kselftest has it.
set -u

name=$1

skip() {
	printf 'KTAP version 1\n1..1\nok 1 %s # SKIP %s\n' "$name" "$1"
	exit 4
}

here=$(dirname "$(readlink -f "$0")")
# In the suite's checkout this folder has links to the suite; in an installed copy it has the suite itself.
[ -e "$here/conftest.py" ] || skip "the suite is not in $here: copy the folder with cp -rL (docs/kselftest.md)"
suite=$(dirname "$(readlink -f "$here/conftest.py")")
python=$suite/.venv/bin/python
[ -x "$python" ] || python=$(command -v python3) || skip "there is no python3"

# What a user's own Python and pytest are set up with could keep the suite's from finding its modules and plugins.
unset PYTHONHOME PYTHONSAFEPATH PYTHONOPTIMIZE PYTEST_PLUGINS PYTEST_DISABLE_PLUGIN_AUTOLOAD PYTEST_ADDOPTS
export PYTHONPATH="$suite/lib" PYTHONDONTWRITEBYTECODE=1
cd "$suite" || skip "$suite cannot be entered"
exec "$python" -m harness.kselftest "$@"
