# SPDX-License-Identifier: GPL-2.0-only
"""Kernels to boot: from the name that a user gives to the image, its release and its modules."""

import gzip
import lzma
import platform
import re
import shutil
import struct
import subprocess
import zlib
from dataclasses import dataclass
from pathlib import Path

from runner import debian
from runner.arch import BOOT_MAGICS, ELF_MACHINES, HEADER_SIZE, this_arch
from runner.errors import CannotTest
from runner.store import BUILD, is_complete, version_key

CACHE = BUILD / "kernels"


@dataclass(frozen=True)
class Kernel:
    """A kernel that can be booted here.

    :ivar release: as ``uname -r`` has it
    :ivar modules: the folder that holds its modules, at any depth, and ``modules.builtin``
    """

    image: Path
    release: str
    modules: Path


def find_kernel(name: str) -> Kernel:
    """Find the kernel called *name*; one of Debian's is fetched.

    :param name: path of an image, build tree, unpacked package or .deb; an installed release; or ``debian:6.12``
    """
    if name.startswith("debian:"):
        return _in_root(debian.fetch(name.removeprefix("debian:"), CACHE))
    path = Path(name).expanduser()
    if path.is_dir():
        return _in_build_tree(path) if _is_build_tree(path) else _in_root(path)
    if path.suffix == ".deb" and path.is_file():
        return _in_root(debian.unpack_files(_package_set(path), CACHE))
    if path.is_file():
        return _from_image(path.absolute())
    for image in (Path(f"/boot/vmlinuz-{name}"), Path(f"/lib/modules/{name}/vmlinuz")):
        if "/" not in name and image.is_file():
            return _from_image(image)
    installed = ", ".join(kernel.release for kernel in kernels_under(Path("/"))) or "none"
    hint = f"; Debian's is debian:{name}" if re.fullmatch(r"\d+(\.\d+)+", name) else ""
    raise CannotTest(
        f"no kernel {name!r}: neither a file or folder, nor an installed release (installed: {installed}){hint}"
    )


def local_kernels() -> list[Kernel]:
    """The kernels that can be booted without a download, newest first: installed ones, and those fetched from Debian."""
    roots = [Path("/"), *(path for path in CACHE.glob("[0-9]*") if is_complete(path))]
    return sorted((kernel for root in roots for kernel in kernels_under(root)), key=_by_release, reverse=True)


def kernels_under(root: Path) -> list[Kernel]:
    """The kernels with modules in the file system or unpacked package at *root* that can be booted here, newest first."""
    found: dict[str, Kernel] = {}
    for image in _images(root):
        try:
            kernel = _from_image(image)
        except (CannotTest, PermissionError):
            continue  # a rescue image, another architecture's, or one that only root may read
        found.setdefault(kernel.release, kernel)
    return sorted(found.values(), key=_by_release, reverse=True)


def _by_release(kernel: Kernel) -> list[tuple[int, str]]:
    return version_key(kernel.release)


def _images(root: Path) -> list[Path]:
    folders = ("boot/vmlinuz-*", "usr/lib/modules/*/vmlinuz", "lib/modules/*/vmlinuz")
    return [image for pattern in folders for image in root.glob(pattern)]


def _in_root(root: Path) -> Kernel:
    kernels = kernels_under(root)
    if len(kernels) == 1:
        return kernels[0]
    if kernels:
        raise CannotTest(
            f"{root} holds several kernels: name one of {', '.join(str(kernel.image) for kernel in kernels)}"
        )
    if images := _images(root):
        return _from_image(images[0])  # the error says what is wrong with the image
    raise CannotTest(
        f"{root} is neither a kernel build tree nor a folder with boot/vmlinuz-* or usr/lib/modules/*/vmlinuz and lib/modules/"
    )


def _is_build_tree(path: Path) -> bool:
    """Whether *path* is a kernel's source tree or an ``O=`` folder, built or not."""
    return (path / "Kbuild").exists() or ((path / ".config").exists() and (path / "arch").is_dir())


def _in_build_tree(tree: Path) -> Kernel:
    image = tree / this_arch().image
    if not image.is_file():
        raise CannotTest(f"{tree} is a kernel tree without {this_arch().image}: build it (make {image.name} modules)")
    return _from_image(image.absolute())


def _from_image(image: Path) -> Kernel:
    release = image_release(image)
    return Kernel(image, release, _find_modules(image, release))


def _find_modules(image: Path, release: str) -> Path:
    real, in_tree = image.resolve(), this_arch().image
    if str(real).endswith(f"/{in_tree}") and _is_build_tree(tree := real.parents[in_tree.count("/")]):
        return tree
    folder, name = image.parent, f"lib/modules/{release}"
    itself = [folder] if (folder / "kernel").is_dir() else []
    for modules in (folder.parent / name, folder.parent / "usr" / name, *itself, folder / name):
        if modules.is_dir():
            return modules
    raise CannotTest(f"no modules for {image}: neither {folder.parent / name} nor {folder / name} exists")


def image_release(image: Path) -> str:
    """The release in the header of a boot image."""
    with image.open("rb") as file:
        head = file.read(HEADER_SIZE)
    offset, magic = BOOT_MAGICS[this_arch().name]
    if not head.startswith(magic, offset):
        raise CannotTest(f"{image} {_describe_other_file(head)}")
    try:
        return this_arch().image_release(head)
    except ValueError as error:
        raise CannotTest(f"{image} {error}") from None


def _describe_other_file(head: bytes) -> str:
    """What a file is that has no boot header of this architecture, to complete the sentence "<image> ..."."""
    arch, here = this_arch(), f"this machine is {platform.machine()}"
    for other, (offset, magic) in BOOT_MAGICS.items():
        if head.startswith(magic, offset):
            return f"is a kernel for {other}, {here}"
    if head[:4] == b"\x7fELF":
        machine = ELF_MACHINES.get(struct.unpack_from("<H", head, 18)[0], "an unknown machine")
        if machine == arch.name:
            return f"is an ELF file: give the compressed image ({arch.image}), or the build tree"
        return f"is an ELF file for {machine}, {here}"
    if head[:2] == b"\x1f\x8b" or head[4:8] == b"zimg":
        return f"is compressed as kernels of other architectures are; {here}"
    return f"is not a kernel image (no {arch.name} boot header)"


def _package_set(package: Path) -> list[Path]:
    """*package*, and the packages beside it that hold the rest of the same kernel (its modules or its image)."""
    name, architecture = debian.name_of_package(package)
    kinds = ("linux-image-", "linux-image-unsigned-", "linux-binary-", "linux-modules-")
    releases = [name.removeprefix(kind) for kind in kinds[::-1] if name.startswith(kind)]
    if not releases:
        raise CannotTest(f"{package} is the package {name}, not a kernel's (linux-image-*)")
    if architecture != this_arch().debian:
        raise CannotTest(f"{package} is a package for {architecture}, this machine is {platform.machine()}")
    release = releases[0].removesuffix("-unsigned")
    beside = [path for kind in kinds for path in package.parent.glob(f"{kind}{release}_*_{architecture}.deb")]
    return [package, *(path for path in beside if path != package)]


def decompress_module(path: Path) -> bytes:
    """A module's ELF file, decompressed."""
    try:
        data = path.read_bytes()
        if path.suffix == ".xz":
            return lzma.decompress(data)
        if path.suffix == ".gz":
            return gzip.decompress(data)
        return _unpack_zstd(path) if path.suffix == ".zst" else data
    except (lzma.LZMAError, OSError, EOFError, zlib.error) as error:
        raise CannotTest(f"{path} cannot be unpacked: {error}") from None


def _unpack_zstd(path: Path) -> bytes:
    # Python has had zstd in its library since 3.14 only.
    if shutil.which("zstd") is None:
        raise CannotTest(f"{path.name} cannot be unpacked: install zstd (apt install zstd)")
    done = subprocess.run(["zstd", "-dc", str(path)], capture_output=True, check=False)
    if done.returncode:
        raise CannotTest(f"{path} cannot be unpacked: {done.stderr.decode(errors='replace').strip()}")
    return done.stdout
