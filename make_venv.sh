#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-only
#
# make_venv.sh VENV REQUIREMENTS: make the virtual environment VENV, or bring it up to date, with the packages that the
# file REQUIREMENTS pins.
#
# Debian splits pip's part of the venv module off into python3-venv. Where that is missing, pip comes from the system's
# own pip, or from the wheel in Debian's python3-pip-whl, which is downloaded and unpacked here without installing it.
set -eu

venv=$1
requirements=$2
python=${PYTHON:-python3}

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
	echo "make_venv.sh: Python 3.11 or newer is needed, $python is $("$python" --version 2>&1)" >&2
	exit 1
}

install() {
	"$@" install --quiet --disable-pip-version-check --requirement "$requirements"
}

# Give the path of a pip wheel from Debian's archive, through a package index of our own where the system's is empty.
debian_pip_wheel() {
	store=$PWD/build/debian
	mkdir -p "$store/lists/partial" "$store/archives/partial"
	if ! (cd "$store" && apt-get download python3-pip-whl) >/dev/null 2>&1; then
		apt-get -qq -o Dir::State::Lists="$store/lists" -o Dir::Cache="$store" update >&2
		(cd "$store" && apt-get -qq -o Dir::State::Lists="$store/lists" -o Dir::Cache="$store" \
			download python3-pip-whl) >&2
	fi
	dpkg-deb -x "$store"/python3-pip-whl_*.deb "$store"
	echo "$store"/usr/share/python-wheels/pip-*.whl
}

[ -x "$venv/bin/python" ] || "$python" -m venv --without-pip "$venv"
if "$venv/bin/python" -c 'import pip' 2>/dev/null; then
	:
elif "$python" -c 'import ensurepip' 2>/dev/null; then
	"$venv/bin/python" -m ensurepip --default-pip >/dev/null
elif "$python" -m pip --version >/dev/null 2>&1; then
	install "$python" -m pip --python "$venv/bin/python"
	exit
elif command -v apt-get >/dev/null && command -v dpkg-deb >/dev/null; then
	wheel=$(debian_pip_wheel)
	PYTHONPATH=$wheel install "$venv/bin/python" -m pip
	exit
else
	rm -rf "$venv"
	echo "make_venv.sh: no pip for $python: install it (apt install python3-venv, or your distribution's pip)" >&2
	exit 1
fi
install "$venv/bin/python" -m pip
