# SPDX-License-Identifier: GPL-2.0-only
"""Which kernel to boot: from what a user names to an image, its release and its modules."""

import gzip
import lzma
import platform
import re
import shutil
import struct
import subprocess
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from runner import debian
from runner.errors import CannotTest
from runner.store import BUILD, is_complete

CACHE = BUILD / "kernels"

# The x86 boot protocol (Documentation/arch/x86/boot.rst): offsets in the image
_HEADER_MAGIC, _VERSION_POINTER, _XLOADFLAGS = 0x202, 0x20E, 0x236
_XLF_KERNEL_64 = 1
# Documentation/arch/arm64/booting.rst, Documentation/arch/riscv/boot-image-header.rst, include/uapi/linux/elf-em.h
_ARM64_MAGIC, _RISCV_MAGIC, _MAGIC_OFFSET = b"ARM\x64", b"RSC\x05", 56
_ELF_MACHINES = {3: "i386", 22: "s390", 62: "x86_64", 183: "arm64", 243: "riscv", 258: "loongarch"}


@dataclass(frozen=True)
class Kernel:
    """A kernel that can be booted.

    :ivar release: as ``uname -r`` will say
    :ivar modules: the folder with its modules, at any depth, and with ``modules.builtin``
    """

    image: Path
    release: str
    modules: Path


def find_kernel(name: str) -> Kernel:
    """The kernel that *name* means.

    :param name: path of an image, build tree, unpacked package or .deb; an installed release; or ``debian:6.12``
    :raises CannotTest: there is no such kernel, or it is not one that can be booted here
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
    if "/" not in name and (found := _installed(Path("/"), name)):
        return found
    installed = ", ".join(kernel.release for kernel in kernels_under(Path("/"))) or "none"
    hint = f"; Debian's is debian:{name}" if re.fullmatch(r"\d+(\.\d+)+", name) else ""
    raise CannotTest(
        f"no kernel {name!r}: neither a file or folder, nor an installed release (installed: {installed}){hint}"
    )


def kernels_at_hand() -> list[Kernel]:
    """The kernels that can be booted without fetching one, newest first: those fetched from Debian, and installed ones."""
    roots = [path for path in CACHE.glob("[0-9]*") if is_complete(path)]
    return _newest_first(kernel for root in (Path("/"), *roots) for kernel in kernels_under(root))


def kernels_under(root: Path) -> list[Kernel]:
    """The bootable kernels, with modules, of a file system or of an unpacked package at *root*, newest first."""
    images = [
        *root.glob("boot/vmlinuz-*"),
        *root.glob("usr/lib/modules/*/vmlinuz"),
        *root.glob("lib/modules/*/vmlinuz"),
    ]
    found: dict[str, Kernel] = {}
    for image in images:
        try:
            kernel = _from_image(image)
        except (CannotTest, PermissionError):
            continue  # a rescue image, one of another architecture, or one that only root may read: not for us
        found.setdefault(kernel.release, kernel)
    return _newest_first(found.values())


def _newest_first(kernels: Iterable[Kernel]) -> list[Kernel]:
    return sorted(kernels, key=lambda kernel: debian.version_key(kernel.release), reverse=True)


def _installed(root: Path, release: str) -> Kernel | None:
    for image in (root / f"boot/vmlinuz-{release}", root / f"lib/modules/{release}/vmlinuz"):
        if image.is_file():
            return _from_image(image)
    return None


def _in_root(root: Path) -> Kernel:
    kernels = kernels_under(root)
    if len(kernels) == 1:
        return kernels[0]
    if kernels:
        raise CannotTest(
            f"{root} holds several kernels: name one of {', '.join(str(kernel.image) for kernel in kernels)}"
        )
    for image in [*root.glob("boot/vmlinuz-*"), *root.glob("usr/lib/modules/*/vmlinuz")]:
        return _from_image(image)  # says what is wrong with it
    raise CannotTest(
        f"{root} is neither a kernel build tree nor a folder with boot/vmlinuz-* or usr/lib/modules/*/vmlinuz and lib/modules/"
    )


def _is_build_tree(path: Path) -> bool:
    """Whether a kernel is built in *path*, be it with ``O=``, or may be."""
    return (path / "Kbuild").exists() or ((path / ".config").exists() and (path / "arch").is_dir())


def _in_build_tree(tree: Path) -> Kernel:
    image = tree / "arch/x86/boot/bzImage"
    if not image.is_file():
        raise CannotTest(f"{tree} is a kernel tree without arch/x86/boot/bzImage: build it (make bzImage modules)")
    return _from_image(image.absolute())


def _from_image(image: Path) -> Kernel:
    release = image_release(image)
    return Kernel(image, release, _find_modules(image, release))


def _find_modules(image: Path, release: str) -> Path:
    parents = image.resolve().parents
    if image.name == "bzImage" and len(parents) > 3 and _is_build_tree(parents[3]):
        return parents[3]
    folder = image.parent
    for modules in (folder.parent / "lib/modules" / release, folder.parent / "usr/lib/modules" / release):
        if modules.is_dir():
            return modules
    if (folder / "kernel").is_dir():
        return folder
    beside = folder / "lib/modules" / release
    if beside.is_dir():
        return beside
    raise CannotTest(f"no modules for {image}: neither {folder.parent / 'lib/modules' / release} nor {beside} exists")


def image_release(image: Path) -> str:
    """The release in the header of a bzImage.

    :raises CannotTest: *image* is no kernel, or one that does not run here
    """
    with image.open("rb") as file:
        head = file.read(0x10000)
    if len(head) > 0x260 and head[_HEADER_MAGIC : _HEADER_MAGIC + 4] == b"HdrS":
        (flags,) = struct.unpack_from("<H", head, _XLOADFLAGS)
        if not flags & _XLF_KERNEL_64:
            raise CannotTest(f"{image} is a 32-bit x86 kernel: only x86_64 kernels are tested")
        if platform.machine() != "x86_64":
            raise CannotTest(f"{image} is an x86_64 kernel, this machine is {platform.machine()}")
        (pointer,) = struct.unpack_from("<H", head, _VERSION_POINTER)
        version = head[pointer + 0x200 : pointer + 0x400].split(b"\0")[0].decode(errors="replace")
        if pointer and version:
            return version.split()[0]
        raise CannotTest(f"{image} does not say its release in its header: it is damaged")
    raise CannotTest(f"{image} {_what_it_is(head)}")


def _what_it_is(head: bytes) -> str:
    if head[_MAGIC_OFFSET : _MAGIC_OFFSET + 4] in (_ARM64_MAGIC, _RISCV_MAGIC):
        other = "arm64" if head[_MAGIC_OFFSET : _MAGIC_OFFSET + 4] == _ARM64_MAGIC else "riscv"
        return f"is a kernel for {other}, this machine is {platform.machine()}"
    if head[:4] == b"\x7fELF":
        machine = _ELF_MACHINES.get(struct.unpack_from("<H", head, 18)[0], "an unknown machine")
        if machine == "x86_64":
            return "is an ELF file: give the compressed image (arch/x86/boot/bzImage), or the build tree"
        return f"is an ELF file for {machine}, this machine is {platform.machine()}"
    if head[:2] == b"\x1f\x8b" or head[4:8] == b"zimg":
        return f"is compressed as kernels of other architectures are; this machine is {platform.machine()}"
    return "is not a kernel image (no x86 boot header)"


def _package_set(package: Path) -> list[Path]:
    """*package*, and the packages beside it that hold the rest of the same kernel (its modules or its image)."""
    fields = debian.package_fields(package)
    kinds = ("linux-image-", "linux-image-unsigned-", "linux-binary-", "linux-modules-")
    release = next(
        (fields["Package"].removeprefix(kind) for kind in kinds[::-1] if fields["Package"].startswith(kind)), None
    )
    if release is None:
        raise CannotTest(f"{package} is the package {fields['Package']}, not a kernel's (linux-image-*)")
    if fields["Architecture"] != "amd64":
        raise CannotTest(f"{package} is a package for {fields['Architecture']}, this machine is {platform.machine()}")
    release = release.removesuffix("-unsigned")
    beside = [path for kind in kinds for path in package.parent.glob(f"{kind}{release}_*_{fields['Architecture']}.deb")]
    return [package, *(path for path in beside if path != package)]


def decompress_module(path: Path) -> bytes:
    """A module's ELF file, whatever it is packed with.

    :raises CannotTest: the tool that unpacks it is missing, or the file is damaged
    """
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
