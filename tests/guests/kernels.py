"""Debian's kernels for test guests: found by their series, fetched with apt's own client, kept in a cache.

Nothing of the system changes: apt gets a root of its own, with the architectures of the guests and the mirror that
this machine uses. A package's name carries a number that moves on with the suite; so the newest of a series is looked
up when it is not in the cache yet, and stays until `scripts/guest.py update`.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import lzma
import os
import re
import shutil
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
MODULES = ("llc", "stp", "bridge", "dummy", "tun", "overlay")
"""Kernel modules that guests load, in the order in which they need one another."""
_APT_LIMIT = 600.0
_INDEX_AGE = 86400.0


class GuestError(Exception):
    """A guest, or what it needs, could not be had; the text says why and what to do."""


class MissingError(GuestError):
    """This machine lacks what guests need: QEMU, a compiler, apt or a mirror that answers."""


@dataclass(frozen=True)
class Kernel:
    """One series of kernels of one architecture and flavour."""

    name: str
    architecture: str
    """Debian's word: amd64, i386, arm64, armhf, riscv64."""
    suite: str
    package: str
    """A regular expression; what is variable in it are the numbers by which the newest is told."""
    bare: bool = False
    """Booted without a userland: only the kernel itself is fetched."""


@dataclass(frozen=True)
class KernelFiles:
    """A kernel in the cache."""

    package: str
    version: str
    image: Path
    modules: tuple[Path, ...]
    busybox: Path


KERNELS = {
    kernel.name: kernel
    for kernel in (
        Kernel("amd64-5.10", "amd64", "bullseye", r"linux-image-5\.10\.0-\d+-cloud-amd64"),
        Kernel("amd64-6.1", "amd64", "bookworm", r"linux-image-6\.1\.0-\d+-cloud-amd64"),
        Kernel("amd64-6.12", "amd64", "trixie", r"linux-image-6\.12\.\d+\+deb13-cloud-amd64"),
        Kernel("amd64-6.12-rt", "amd64", "trixie", r"linux-image-6\.12\.\d+\+deb13-rt-amd64"),
        Kernel("amd64-7", "amd64", "sid", r"linux-image-7\.\d+(\.\d+)?(\+deb\d+)?-cloud-amd64"),
        Kernel("i386-6.1", "i386", "bookworm", r"linux-image-6\.1\.0-\d+-686"),
        Kernel("i386-6.1-pae", "i386", "bookworm", r"linux-image-6\.1\.0-\d+-686-pae"),
        Kernel("arm64-6.1", "arm64", "bookworm", r"linux-image-6\.1\.0-\d+-cloud-arm64"),
        Kernel("arm64-6.12-16k", "arm64", "trixie", r"linux-image-6\.12\.\d+\+deb13-arm64-16k"),
        Kernel("armhf-6.1", "armhf", "bookworm", r"linux-image-6\.1\.0-\d+-armmp"),
        Kernel("armhf-6.1-lpae", "armhf", "bookworm", r"linux-image-6\.1\.0-\d+-armmp-lpae"),
        Kernel("riscv64-6.12", "riscv64", "trixie", r"linux-image-6\.12\.\d+\+deb13-riscv64"),
        Kernel("ppc64el-6.1", "ppc64el", "bookworm", r"linux-image-6\.1\.0-\d+-powerpc64le", bare=True),
        Kernel("s390x-6.1", "s390x", "bookworm", r"linux-image-6\.1\.0-\d+-s390x", bare=True),
        Kernel("mips64el-6.1", "mips64el", "bookworm", r"linux-image-6\.1\.0-\d+-5kc-malta", bare=True),
    )
}


def cache_root() -> Path:
    """The folder of everything that guests need: $CLOUDFS_GUESTS, or cloudfs/guests in the user's cache folder."""
    given = os.environ.get("CLOUDFS_GUESTS")
    if given:
        return Path(given).absolute()
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base).absolute() / "cloudfs" / "guests"


@contextlib.contextmanager
def locked(name: str) -> Iterator[None]:
    """One session at a time does what has this name; others wait."""
    folder = cache_root() / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / name, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def made_whole(place: Path) -> Iterator[Path]:
    """A folder that becomes `place` once all is in it; what is cut short leaves nothing at `place`. Hold a lock."""
    place.parent.mkdir(parents=True, exist_ok=True)
    for killed in place.parent.glob(f".{place.name}.*"):
        shutil.rmtree(killed, ignore_errors=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{place.name}.", dir=place.parent))
    try:
        yield unfinished
        unfinished.chmod(0o755)
        if place.exists():
            shutil.rmtree(place)
        unfinished.rename(place)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def provide(names: Iterable[str]) -> dict[str, KernelFiles]:
    """Kernels of KERNELS by name; those that are not in the cache are fetched, of each suite in one call of apt-get.

    Raises MissingError where there is no apt-get or no mirror, GuestError where a suite has no such package any more.
    """
    wanted = {name: KERNELS[name] for name in dict.fromkeys(names)}
    missing = [kernel for kernel in wanted.values() if not _place(kernel).exists()]
    if missing:
        with locked("apt"):
            _fetch([kernel for kernel in missing if not _place(kernel).exists()])
    return {name: _files(kernel) for name, kernel in wanted.items()}


def forget() -> None:
    """Forget which packages are the newest; the next `provide` looks again."""
    with locked("apt"):
        shutil.rmtree(cache_root() / "kernels", ignore_errors=True)
        shutil.rmtree(cache_root() / "apt", ignore_errors=True)


def _place(kernel: Kernel) -> Path:
    return cache_root() / "kernels" / kernel.name


def _files(kernel: Kernel) -> KernelFiles:
    place = _place(kernel)
    told = json.loads((place / "package.json").read_text())
    modules = tuple(path for name in MODULES if (path := place / f"{name}.ko").exists())
    return KernelFiles(told["package"], told["version"], place / "image", modules, place / "busybox")


def _fetch(kernels: list[Kernel]) -> None:
    """One root for each suite of an architecture: an index that a mirror is just renewing hinders no other's guests."""
    for suite, architecture in dict.fromkeys((kernel.suite, kernel.architecture) for kernel in kernels):
        some = [one for one in kernels if (one.suite, one.architecture) == (suite, architecture)]
        _fetch_with(_apt_for(some[0]), some)


def _apt_for(kernel: Kernel) -> _Apt:
    place = cache_root() / "apt" / f"{kernel.suite}-{kernel.architecture}"
    return _Apt(place, kernel.suite, kernel.architecture)


def fetch_package(name: str, files: KernelFiles, folder: Path) -> Path:
    """The package with a kernel's modules once more, into a folder, for what `provide` left in it; it may be gone."""
    kernel = KERNELS[name]
    with locked("apt"):
        apt = _apt_for(kernel)
        package = apt.parts(kernel, files.package, files.version)[-1]
        apt.download([f"{package}:{kernel.architecture}={files.version}"], folder)
    return _deb(folder, package, kernel.architecture)


def _fetch_with(apt: _Apt, kernels: list[Kernel]) -> None:
    found = {kernel: apt.newest(kernel) for kernel in kernels}
    downloads = apt.root / "downloads"
    busyboxes = {kernel: f"busybox-static:{kernel.architecture}" for kernel in kernels if not kernel.bare}
    parts = {kernel: apt.parts(kernel, *newest) for kernel, newest in found.items()}
    wanted = {f"{part}:{kernel.architecture}={found[kernel][1]}" for kernel in kernels for part in parts[kernel]}
    apt.download(wanted | set(busyboxes.values()), downloads)
    for kernel, (package, version) in found.items():
        with made_whole(_place(kernel)) as folder:
            for part in parts[kernel]:
                _extract_kernel(_deb(downloads, part, kernel.architecture), folder)
            if kernel in busyboxes:
                busybox = _deb(downloads, "busybox-static", kernel.architecture)
                _extract(busybox, {r"(usr/)?bin/busybox": "busybox"}, folder)
            if not all((folder / name).exists() for name in ("image", "busybox")[: 1 if kernel.bare else 2]):
                raise GuestError(f"the packages {' '.join(parts[kernel])} and busybox-static hold no kernel or program")
            told = {"package": package, "version": version, "suite": kernel.suite}
            (folder / "package.json").write_text(json.dumps(told))
    shutil.rmtree(downloads)


class _Apt:
    """apt with a root of its own."""

    def __init__(self, root: Path, suite: str, architecture: str) -> None:
        self.root = root
        for folder in ("etc/sources.d", "state/lists/partial", "cache/archives/partial"):
            (root / folder).mkdir(parents=True, exist_ok=True)
        (root / "status").touch()
        self._write_configuration(suite, architecture)
        stamp = root / "updated"
        if not stamp.exists() or time.time() - stamp.stat().st_mtime > _INDEX_AGE:
            self.run("apt-get", "update", "-qq")
            stamp.touch()

    def _write_configuration(self, suite: str, architecture: str) -> None:
        signed = f" signed-by={KEYRING}" if KEYRING.exists() else ""
        line = f"deb [arch={architecture}{signed}] {_mirror()} {suite} main\n"
        (self.root / "etc/sources.list").write_text(line)
        (self.root / "apt.conf").write_text(
            f'Dir::State "{self.root}/state";\nDir::State::status "{self.root}/status";\n'
            f'Dir::Cache "{self.root}/cache";\nDir::Etc::sourcelist "{self.root}/etc/sources.list";\n'
            f'Dir::Etc::sourceparts "{self.root}/etc/sources.d";\nAPT::Architectures {{"{architecture}";}};\n'
            'APT::Sandbox::User "root";\nAcquire::Languages "none";\n'
        )

    def run(self, *command: str, folder: Path | None = None) -> str:
        """What apt prints; GuestError with its own words when it fails."""
        settings = ("Acquire::IndexTargets::deb::DEP-11::DefaultEnabled=false", "Acquire::Retries=3",
                    "Acquire::http::Timeout=30")  # fmt: skip
        options = [part for setting in settings for part in ("-o", setting)]
        environment = os.environ | {"APT_CONFIG": str(self.root / "apt.conf"), "LC_ALL": "C.UTF-8"}
        try:
            done = subprocess.run(
                [command[0], *options, *command[1:]], cwd=folder, env=environment, capture_output=True, text=True,
                stdin=subprocess.DEVNULL, timeout=_APT_LIMIT, check=False,
            )  # fmt: skip
        except FileNotFoundError:
            raise MissingError("kernels for test guests are fetched with apt-get, which this machine lacks") from None
        except subprocess.TimeoutExpired:
            raise GuestError(f"{' '.join(command[:2])} took more than {_APT_LIMIT:.0f} s; run it again") from None
        if done.returncode:
            last = (done.stderr or done.stdout).strip().splitlines()[-3:]
            raise MissingError(f"{' '.join(command[:2])} failed: {' '.join(last)}; is the network there? Run it again")
        return done.stdout

    def newest(self, kernel: Kernel) -> tuple[str, str]:
        """Name and version of the newest package of a series."""
        names = self.run("apt-cache", "pkgnames", "linux-image-").split()
        fitting = [name for name in names if re.fullmatch(kernel.package, name)]
        for name in sorted(fitting, key=_numbers, reverse=True):
            shown = self.run("apt-cache", "show", f"{name}:{kernel.architecture}")
            version = re.search(r"^Version: (\S+)$", shown, re.MULTILINE)
            if version:
                return name, version[1]
        raise GuestError(
            f"the suite {kernel.suite} has no package {kernel.package} for {kernel.architecture} any more;"
            f" write a newer series into {Path(__file__).name}"
        )

    def parts(self, kernel: Kernel, package: str, version: str) -> list[str]:
        """The packages of which a kernel consists: since 7.2 what is in one before is spread over several."""
        told = self.run("apt-cache", "show", f"{package}:{kernel.architecture}={version}")
        release = package.removeprefix("linux-image-")
        return [package, *sorted(re.findall(rf"\b(linux-(?:binary|modules)-{re.escape(release)}) \(=", told))]

    def download(self, packages: Iterable[str], folder: Path) -> None:
        """Packages into a folder, each checked by apt; what is there already is not fetched again."""
        folder.mkdir(exist_ok=True)
        self.run("apt-get", "download", "-qq", *sorted(packages), folder=folder)


def _numbers(name: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", name)]


def _mirror() -> str:
    """The Debian mirror that this machine's apt uses, or $CLOUDFS_DEBIAN_MIRROR."""
    given = os.environ.get("CLOUDFS_DEBIAN_MIRROR")
    if given:
        return given
    try:
        told = subprocess.run(
            ["apt-get", "indextargets", "--format", "$(ORIGIN)|$(LABEL)|$(REPO_URI)"],
            capture_output=True, text=True, timeout=60, check=False,
        ).stdout  # fmt: skip
    except FileNotFoundError:
        told = ""
    for line in told.splitlines():
        origin, label, address = line.split("|", 2)
        if (origin, label) == ("Debian", "Debian"):
            return address
    raise MissingError(
        "kernels for test guests come from a Debian mirror, and apt here uses none (apt-get update was never run?);"
        " name one in CLOUDFS_DEBIAN_MIRROR"
    )


def _deb(folder: Path, package: str, architecture: str) -> Path:
    return next(folder.glob(f"{package}_*_{architecture}.deb"))


def _extract_kernel(deb: Path, folder: Path) -> None:
    wanted = {r"boot/vmlinu[xz]-.*": "image", r"boot/config-.*": "config"}
    wanted[r"(usr/)?lib/modules/[^/]+/vmlinu[xz]"] = "image"  # since 7.2 of Debian
    wanted |= {rf"(usr/)?lib/modules/.*/{name}\.ko(\.xz)?": f"{name}.ko" for name in MODULES}
    _extract(deb, wanted, folder)
    for module in folder.glob("*.ko"):
        if module.read_bytes()[:6] == b"\xfd7zXZ\0":
            module.write_bytes(lzma.decompress(module.read_bytes()))


def _extract(deb: Path, wanted: dict[str, str], folder: Path) -> None:
    """Members whose path matches, under a name of ours."""
    with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", deb], stdout=subprocess.PIPE) as unpacking:
        assert unpacking.stdout is not None
        with tarfile.open(fileobj=unpacking.stdout, mode="r|") as archive:
            for member in archive:
                name = next((ours for theirs, ours in wanted.items() if re.fullmatch(rf"\./{theirs}", member.name)), "")
                if name and member.isfile():
                    source = archive.extractfile(member)
                    assert source is not None
                    with open(folder / name, "wb") as file:
                        shutil.copyfileobj(source, file)
