"""What `pip install .` and `pipx install .` give: a wheel, installed outside of the clone."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest
from mounting import is_mounted, require_fuse, take_away
from support import require

ROOT = Path(__file__).parent.parent
LEFT_OUT = shutil.ignore_patterns(".*", "build", "*.egg-info", "__pycache__", "tests")


@dataclass
class Installed:
    wheel: Path
    prefix: Path

    def run(self, name: str, *words: str) -> subprocess.CompletedProcess[str]:
        """Run one of its programs, far from the clone and with nothing of the environment."""
        return subprocess.run(
            [str(self.prefix / "bin" / name), *words], capture_output=True, text=True, timeout=30, check=False,
            cwd=self.prefix, env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8"},
        )  # fmt: skip


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Installed:
    """The wheel in an environment of its own; what it depends on is lent by the environment of the tests."""
    top = tmp_path_factory.mktemp("installed")
    source, wheels, prefix = top / "source", top / "wheels", top / "venv"
    shutil.copytree(ROOT, source, ignore=LEFT_OUT)
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    quiet = {"capture_output": True, "text": True, "timeout": 120, "check": False, "cwd": top}
    built = subprocess.run([*pip, "wheel", "--no-deps", "-w", str(wheels), str(source)], **quiet)
    require("No matching distribution found for setuptools" not in built.stderr, "pip cannot get setuptools")
    assert built.returncode == 0, built.stderr
    [wheel] = wheels.iterdir()
    venv.create(prefix, symlinks=True)
    python = prefix / "bin" / "python"
    done = subprocess.run([*pip, "--python", str(python), "install", "--no-deps", "--no-index", str(wheel)], **quiet)
    assert done.returncode == 0, done.stderr
    [packages] = prefix.glob("lib/python*/site-packages")
    (packages / "lent.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return Installed(wheel, prefix)


def test_the_wheel_holds_every_file_of_the_packages(installed):
    wanted = {
        str(path.relative_to(ROOT))
        for package in ("engine", "cloudfs")
        for path in (ROOT / package).rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    held = set(zipfile.ZipFile(installed.wheel).namelist())
    assert wanted - held == set()


def test_the_wheel_holds_nothing_but_the_packages_and_the_manual(installed):
    held = zipfile.ZipFile(installed.wheel).namelist()
    version = installed.wheel.name.split("-")[1]
    assert {name.split("/")[0] for name in held} == {
        "engine", "cloudfs", f"cloudfs-{version}.data", f"cloudfs-{version}.dist-info",
    }  # fmt: skip


def test_its_programs_say_their_version_outside_of_the_clone(installed):
    version = installed.wheel.name.split("-")[1]
    for name in ("cloudfs", "mount.fuse.cloudfs"):
        done = installed.run(name, "--version")
        assert (done.returncode, done.stdout, done.stderr) == (0, f"cloudfs {version}\n", "")


def test_every_command_can_be_loaded(installed):
    done = installed.run("cloudfs", "--help")
    assert (done.returncode, done.stderr) == (0, "")


def test_it_mounts_and_unmounts(installed, tmp_path):
    require_fuse()
    done = installed.run("mount.fuse.cloudfs", "native", str(tmp_path))
    try:
        assert (done.returncode, done.stderr) == (0, "")
        assert (tmp_path / "os/native/processes/1/comm").read_text() == Path("/proc/1/comm").read_text()
    finally:
        done = installed.run("cloudfs", "umount", str(tmp_path))
        take_away(tmp_path)
    assert done.returncode == 0, done.stderr
    assert not is_mounted(tmp_path)


def test_the_manual_pages_are_installed_where_man_looks(installed):
    assert (installed.prefix / "share/man/man1/cloudfs.1").is_file()
    assert (installed.prefix / "share/man/man8/mount.fuse.cloudfs.8").is_file()


def test_type_checkers_find_its_types(installed):
    [packages] = installed.prefix.glob("lib/python*/site-packages")
    assert (packages / "engine/py.typed").is_file()
    assert (packages / "cloudfs/py.typed").is_file()
