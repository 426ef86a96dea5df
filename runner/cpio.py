# SPDX-License-Identifier: GPL-2.0-only
"""Archives in the "newc" format of an initramfs (Documentation/driver-api/early-userspace/buffer-format.rst)."""

import stat
from pathlib import Path, PurePosixPath
from typing import BinaryIO


class CpioWriter:
    """Writes an archive to *file*, all of it owned by root; the folders of a file are added before it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._inode = 0
        self._folders = {PurePosixPath("/")}

    def add_file(self, name: str, data: bytes, mode: int = 0o644, mtime: int = 0) -> None:
        """Add a file at the absolute path *name*."""
        self._add_parents(name)
        self._write(name, stat.S_IFREG | mode, data, mtime)

    def add_node(self, name: str, major: int, minor: int) -> None:
        """Add a character device."""
        self._add_parents(name)
        self._write(name, stat.S_IFCHR | 0o600, b"", 0, (major, minor))

    def add_folder(self, name: str) -> None:
        """Add a folder, unless it is there already."""
        if PurePosixPath(name) not in self._folders:
            self._add_parents(name)
            self._folders.add(PurePosixPath(name))
            self._write(name, stat.S_IFDIR | 0o755, b"", 0)

    def add_tree(self, name: str, source: Path) -> None:
        """Add all files under *source*, below the folder *name*."""
        for path in sorted(path for path in source.rglob("*") if not path.is_dir()):
            status = path.stat()
            inside = f"{name}/{path.relative_to(source)}"
            self.add_file(inside, path.read_bytes(), stat.S_IMODE(status.st_mode), int(status.st_mtime))

    def finish(self) -> None:
        """Write the end of the archive, which another one may follow."""
        self._write("/TRAILER!!!", 0, b"", 0)

    def _add_parents(self, name: str) -> None:
        for parent in reversed(PurePosixPath(name).parents):
            self.add_folder(str(parent))

    def _write(self, name: str, mode: int, data: bytes, mtime: int, device: tuple[int, int] = (0, 0)) -> None:
        self._inode += 1
        path = name.lstrip("/").encode() + b"\0"
        # ino, mode, uid, gid, nlink, mtime, filesize, dev (major, minor), rdev (major, minor), namesize, check
        numbers = (self._inode, mode, 0, 0, 1, mtime, len(data), 0, 0, *device, len(path), 0)
        header = b"070701" + b"".join(b"%08X" % number for number in numbers) + path
        self._file.write(header + bytes(-len(header) % 4) + data + bytes(-len(data) % 4))
