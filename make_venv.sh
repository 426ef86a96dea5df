#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-only
#
# make_venv.sh VENV REQUIREMENTS: make the virtual environment VENV, or bring it up to date, with the packages that the
# file REQUIREMENTS pins. PYTHON names the Python to make it with; without it, an environment that works stays.
#
# pip runs from the wheel that comes with Python, and is not installed: that and the compiling of files that are never used
# would take most of the time. Debian splits that wheel off into python3-venv. Where that is missing, pip is the system's own,
# or the wheel in Debian's python3-pip-whl, which is downloaded and unpacked here without installing it.
set -eu

refuse() {
	echo "make_venv.sh: $1" >&2
	exit 1
}

[ $# = 2 ] || refuse "usage: make_venv.sh VENV REQUIREMENTS, as 'make .venv/run' calls it"
venv=$1
requirements=$2
python=${PYTHON:-python3}
log=build/pip.log

[ -r "$requirements" ] || refuse "$requirements cannot be read"
command -v "$python" >/dev/null || refuse "no such program: $python (PYTHON=... names a Python 3.11 or newer)"
version=$("$python" -c 'import sys; print("%s %s" % (sys.version_info >= (3, 11), sys.version.split()[0]))' 2>/dev/null) || version=
case $version in
"True "*) ;;
"False "*) refuse "Python 3.11 or newer is needed, $python is ${version#* } (PYTHON=... names another one)" ;;
*) refuse "$python is no Python (PYTHON=... names a Python 3.11 or newer)" ;;
esac

# One at a time; to read is enough for flock(2).
exec 9<"$0"
if command -v flock >/dev/null && ! flock --nonblock 9; then
	echo "make_venv.sh: another run makes $venv: waiting for it" >&2
	flock 9
fi

# It works if its Python runs and is of the version that it was made with.
works() {
	"$venv/bin/python" -c 'import os, sys
sys.exit(not os.path.isdir("%s/lib/python%d.%d/site-packages" % ((sys.prefix,) + sys.version_info[:2])))' 2>/dev/null
}

identity='import sys; print(sys.version_info, sys.base_prefix)'
why=
if [ -e "$venv/.incomplete" ]; then
	why="it was not complete"
elif [ -e "$venv/pyvenv.cfg" ]; then
	if ! works; then
		why="its Python is gone, or is another one by now"
	elif [ -n "${PYTHON:-}" ] && [ "$("$venv/bin/python" -c "$identity")" != "$("$python" -c "$identity")" ]; then
		why="it was made with another Python"
	fi
elif [ -e "$venv" ]; then
	refuse "$venv is there, and is no virtual environment: remove it"
fi
[ -z "$why" ] || echo "make_venv.sh: $venv is made again: $why" >&2

made=
if [ -n "$why" ] || ! [ -e "$venv" ]; then
	made=yes
	rm -rf "$venv"
	mkdir -p "$venv"
fi
touch "$venv/.incomplete"

give_up() {
	if [ -n "$made" ]; then rm -rf "$venv"; else rm -f "$venv/.incomplete"; fi
	refuse "$1"
}

install() {
	echo "make_venv.sh: installing the packages of $requirements into $venv" >&2
	"$@" install --quiet --no-compile --disable-pip-version-check --requirement "$requirements" >>"$log" 2>&1 ||
		give_up "no packages from pip: $(sed -n 's,^ERROR: ,,p' "$log" | tail -n 1) (no network? docs/setup.md, 'Without network'; all that pip said is in $log)"
}

# Print the path of the pip wheel that ensurepip would install; Debian keeps it elsewhere (--with-wheel-pkg-dir).
pip_wheel='import ensurepip, pathlib, sysconfig
folder = sysconfig.get_config_var("WHEEL_PKG_DIR") or pathlib.Path(ensurepip.__file__).parent / "_bundled"
print(max(pathlib.Path(folder).glob("pip-*.whl")))'

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

mkdir -p "$(dirname "$log")"
: >"$log"
[ -z "$made" ] || "$python" -m venv --without-pip "$venv" >>"$log" 2>&1 ||
	give_up "$python cannot make a virtual environment: $(tail -n 1 "$log") (apt install python3-venv)"
if wheel=$("$python" -c "$pip_wheel" 2>/dev/null); then
	PYTHONPATH=$wheel install "$venv/bin/python" -m pip
elif "$python" -m pip --version >/dev/null 2>&1; then
	install "$python" -m pip --python "$venv/bin/python"
elif command -v apt-get >/dev/null && command -v dpkg-deb >/dev/null; then
	wheel=$(debian_pip_wheel 2>>"$log") ||
		give_up "no pip for $python, and none from Debian's archive: $(sed -n 's,^E: ,,p' "$log" | tail -n 1) (apt install python3-venv brings one)"
	PYTHONPATH=$wheel install "$venv/bin/python" -m pip
else
	give_up "no pip for $python: install it (apt install python3-venv, or your distribution's pip)"
fi
rm "$venv/.incomplete"
