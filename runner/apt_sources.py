# SPDX-License-Identifier: GPL-2.0-only
"""The mirror of the Debian archive in the sources of this host's apt."""

import os
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from runner.errors import CannotTest

_Source = tuple[list[str], list[str], list[str], str]  # URIs, suites, components and key of an entry of apt's sources
_APT = Path("/etc/apt")
# sources.list(5): the two formats
_ONE_LINE = re.compile(r"^[ \t]*deb[ \t]+(?:\[([^\]]*)\][ \t]*)?(\S+)[ \t]+(\S+)[ \t]+([^#\n]*)", re.MULTILINE)
_FIELD = re.compile(r"^([\w-]+):(.*(?:\n[ \t].*)*)", re.MULTILINE)
_NO = ("no", "false", "without", "off", "disable", "0")  # apt-pkg/contrib/strutl.cc, StringToBool()
# Other suites, such as -security, are at other URIs.
_SUITE = re.compile(
    r"(stable|oldstable|oldoldstable|testing|unstable|sid|bullseye|bookworm|trixie|forky|duke)(-updates|-backports)?"
)
# The path of the archive on a mirror (debian.org/mirror/ftpmirror)
_ARCHIVE = re.compile(r"/debian/?$")


def mirror() -> str:
    """The URI of the mirror that DEBIAN_MIRROR names, or else that this host's apt uses."""
    if named := os.environ.get("DEBIAN_MIRROR"):
        return named
    for uris, suites, components, key in _sources():
        # Third parties use Debian's names of suites, but keys of their own.
        is_debian = "main" in components and any(map(_SUITE.fullmatch, suites)) and (not key or "debian-archive" in key)
        for uri in map(_resolve, uris if is_debian else ()):
            if _ARCHIVE.search(uri):
                return uri
    raise CannotTest("apt has no mirror of the Debian archive among its sources: name one in DEBIAN_MIRROR=URI")


def _sources() -> Iterator[_Source]:
    """The entries of the files that apt reads, in the same order."""
    parts = sorted(path for path in (_APT / "sources.list.d").glob("*") if path.suffix in (".list", ".sources"))
    for path in (_APT / "sources.list", *parts):
        if path.is_file() and os.access(path, os.R_OK):
            yield from (_stanzas if path.suffix == ".sources" else _lines)(path.read_text(errors="replace"))


def _lines(text: str) -> Iterator[_Source]:
    for options, uri, suite, components in _ONE_LINE.findall(text):
        yield [uri], [suite], components.split(), "".join(re.findall(r"signed-by=(\S+)", options))


def _stanzas(text: str) -> Iterator[_Source]:
    for stanza in re.split(r"\n\s*\n", re.sub(r"^#.*\n?", "", text, flags=re.MULTILINE)):
        fields = defaultdict(list, {name.lower(): value.split() for name, value in _FIELD.findall(stanza)})
        if "deb" in fields["types"] and not {*map(str.lower, fields["enabled"])} & {*_NO}:
            yield fields["uris"], fields["suites"], fields["components"], " ".join(fields["signed-by"])


def _resolve(uri: str) -> str:
    """*uri*, or the first one in the list of mirrors that it names (apt-transport-mirror(1); Debian's cloud images)."""
    match = re.fullmatch(r"mirror[+:]file:(?://(?=/))?(/.*)", uri)
    if match is None:
        return uri
    try:
        listed = Path(match[1]).read_text(errors="replace").splitlines()
    except OSError:
        return uri
    return next((line.split()[0] for line in listed if line.strip() and not line.lstrip().startswith("#")), uri)
