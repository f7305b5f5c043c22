"""What real programs do with every kind of file: docs/tools.md is what these tests saw.

CLOUDFS_WRITE_TOOLS=1 writes that page anew. Its tables are compared cell by cell on a machine like the one
they were made on, as versions of tools and kernels differ; that nothing is false and nothing hangs holds anywhere.
"""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from clients.kinds import PAGE, World, await_rest, world
from clients.page import HEAD, LIMITS, page, read_tables
from clients.tools import TOOLS
from clients.verdicts import ENDLESS, NOTHING, Cells, compare, matrix
from clients.writers import WRITERS, Writable, check_writer
from mounting import Mount, mounted, require_fuse
from support import applies, require
from targets import Target, running_target

PAGE_FILE = Path(__file__).parents[2] / "docs/tools.md"


def machine(scene: World) -> str:
    """What the tables depend on."""
    facts = platform.freedesktop_os_release() if Path("/etc/os-release").exists() else {}
    system = f"{facts.get('ID', 'unknown')} {facts.get('VERSION_ID', '')}".strip()
    shim = "with" if scene.tells_holes else "without"
    return f"{system}, Linux {'.'.join(platform.release().split('.')[:2])}, {shim} the shim"


def require_tools() -> None:
    require_fuse()
    require(os.geteuid() == 0, "the table was made by root, who may look into everything")
    for tool in (*TOOLS, *WRITERS):
        require(shutil.which(tool.program), f"{tool.program} is missing: install {tool.package}")


@pytest.fixture(scope="module")
def scene() -> Iterator[World]:
    require_tools()
    memory = Path("/dev/shm")
    require(memory.is_dir() and os.access(memory, os.W_OK), "there is no /dev/shm for sparse files of 2^47 bytes")
    with tempfile.TemporaryDirectory(prefix="cloudfs-clients-", dir=memory) as folder, world(Path(folder)) as found:
        yield found


@pytest.fixture(scope="module")
def reading(scene) -> Cells:
    """The first table."""
    return matrix(TOOLS, scene.kinds)


@pytest.fixture(scope="module")
def writing(tmp_path_factory) -> Cells:
    """The second table."""
    require_tools()
    folder = tmp_path_factory.mktemp("writers")
    with running_target() as target, mounted("--writable", limit=300) as mount:
        files = list(_writable_files(mount, target, folder))
        return {(tool.name, file.name): check_writer(tool, file) for file in files for tool in WRITERS}


def _writable_files(mount: Mount, target: Target, folder: Path) -> Iterator[Writable]:
    image = folder / "image.raw"
    image.write_bytes(os.urandom(8 * PAGE))
    (mount.folder / "connector/new").write_text(f"raw1 raw:{image}\n")
    await_rest(target.pid)

    def memory(start: int, size: int = 8 * PAGE):
        def look() -> bytes:
            with open(f"/proc/{target.pid}/mem", "rb", buffering=0) as file:
                return os.pread(file.fileno(), size, start)

        return look

    process = mount.folder / "os/processes" / str(target.pid)
    yield Writable("process mem", process / "mem", target.pattern + PAGE, memory(target.pattern), PAGE)
    for path in (process / "regions").iterdir():
        start, stop = (int(word, 16) for word in path.name.split(".")[0].split("-"))
        if start <= target.pattern < stop:
            offset = target.pattern + PAGE - start
            yield Writable("region", path, offset, memory(target.pattern), PAGE)
    yield Writable("phys_mem, raw", mount.folder / "connector/raw1/phys_mem", PAGE, image.read_bytes, PAGE)
    text = Path(f"/proc/{target.pid}/maps")
    yield Writable("maps", process / "maps", 64, text.read_bytes, 64)


def _complaints(cells: Cells) -> list[str]:
    return [f"{tool} on {kind}: {cell}, {why}" for (tool, kind), (cell, why) in cells.items() if why]


@pytest.mark.slow
def test_no_tool_hangs_or_is_told_what_is_false(reading):
    assert not _complaints(reading)


@pytest.mark.slow
def test_what_reads_all_of_a_tebibyte_is_the_only_thing_that_takes_hours(reading):
    assert {kind for (_, kind), (cell, _) in reading.items() if cell == ENDLESS} <= {"region of 1 TiB"}


@pytest.mark.slow
def test_only_files_that_say_size_0_are_taken_for_empty(scene, reading):
    unsized = {kind.name for kind in scene.kinds if kind.unsized}
    assert {kind for (_, kind), (cell, _) in reading.items() if cell == NOTHING} <= unsized


def test_a_tool_that_writes_changes_what_it_means_to_or_nothing_and_says_so(writing):
    assert not _complaints(writing)


@pytest.mark.slow
def test_the_page_says_what_was_seen(scene, reading, writing):
    if os.environ.get("CLOUDFS_WRITE_TOOLS") == "1":
        PAGE_FILE.parent.mkdir(exist_ok=True)
        PAGE_FILE.write_text(page(machine(scene), reading, writing))
    text = PAGE_FILE.read_text()
    assert text.startswith(HEAD)
    assert text.endswith(LIMITS)
    made_on, tables = read_tables(text)
    elsewhere = f"the page was made on {made_on}, this is {machine(scene)}: CLOUDFS_WRITE_TOOLS=1 makes one of this"
    applies(made_on == machine(scene), elsewhere)
    seen = {**_plain(reading), **_plain(writing)}
    for table in tables:
        print(table.text)
    kept = {key: cell for table in tables for key, cell in table.cells.items()}
    for tool in TOOLS:  # what differs is tried again, alone: limits of time hit others on a busy machine
        for kind in scene.kinds:
            key = tool.name, kind.name
            if seen[key] != kept.get(key):
                seen[key] = compare(tool, kind)[0]
    assert {key: (kept.get(key), cell) for key, cell in seen.items() if kept.get(key) != cell} == {}
    assert kept.keys() == seen.keys()


def _plain(cells: Cells) -> dict[tuple[str, str], str]:
    return {key: cell for key, (cell, _) in cells.items()}
