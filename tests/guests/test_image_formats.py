"""A recorded guest's RAM in the formats of dumps: each opens by its content alone, and shows the same processes."""

from __future__ import annotations

import os
import re
import struct
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import pytest
from dump_samples import AVML_BLOCK, lime_header, vmss_file, vmss_memory, vmss_tag
from guests.recording import Recording
from support import require

from engine.targets import open_target

PAGE = 4096
STEP = 1 << 20


def system_ram(recording: Recording) -> list[tuple[int, int]]:
    """(start, stop) of what LiME and AVML copy, by the guest's /proc/iomem."""
    found = re.findall(r"^([0-9a-f]+)-([0-9a-f]+) : System RAM$", recording.truth.iomem, re.MULTILINE)
    return [(int(start, 16), int(last, 16) + 1) for start, last in found]


def pieces(recording: Recording, start: int, stop: int, step: int = STEP) -> Iterator[tuple[int, bytes]]:
    """(physical address, bytes) of a range, in steps; what is all zeros is left out."""
    with recording.image.open("rb") as image:
        for base, length, offset in recording.extents:
            for at in range(max(start, base), min(stop, base + length), step):
                place, size = offset + at - base, min(step, stop - at, base + length - at)
                if data_from(image, place) < place + size:
                    data = os.pread(image.fileno(), size, place)
                    if data.count(0) < len(data):
                        yield at, data


def data_from(file: BinaryIO, offset: int) -> int:
    """Where the next data of a sparse file begin; behind everything where there are none."""
    try:
        return os.lseek(file.fileno(), offset, os.SEEK_DATA)
    except OSError:
        return 1 << 62


def copy(recording: Recording, start: int, stop: int, file: BinaryIO) -> None:
    """Append a range, sparsely."""
    begin = file.tell()
    for at, data in pieces(recording, start, stop):
        for part in range(0, len(data), PAGE):
            page = data[part : part + PAGE]
            if page.count(0) < len(page):
                file.seek(begin + at - start + part)
                file.write(page)
    file.seek(begin + stop - start)
    file.truncate()


def lime(recording: Recording, folder: Path) -> Path:
    path = folder / "memory.lime"
    with path.open("wb") as file:
        for start, stop in system_ram(recording):
            file.write(lime_header(b"EMiL", 1, start, stop - start))
            copy(recording, start, stop, file)
    return path


def concatenated(recording: Recording, folder: Path) -> Path:
    """LiME's format raw."""
    path = folder / "memory.raw"
    with path.open("wb") as file:
        for start, stop in system_ram(recording):
            copy(recording, start, stop, file)
    return path


def padded(recording: Recording, folder: Path) -> Path:
    path = folder / "memory.raw"
    with path.open("wb") as file:
        for start, stop in system_ram(recording):
            file.seek(start)
            copy(recording, start, stop, file)
    return path


def avml(recording: Recording, folder: Path) -> Path:
    """Packed by the library's own encoder."""
    snappy = library().snappy
    path = folder / "memory.avml"
    with path.open("wb") as file:
        for start, stop in system_ram(recording):
            for at, data in pieces(recording, start, stop, AVML_BLOCK):
                packed = bytes(snappy.compress(data))
                file.write(lime_header(b"AVML", 2, at, len(data)) + packed + struct.pack("<Q", len(packed)))
    return path


def frames(recording: Recording, folder: Path) -> Path:
    zstd = library().zstd
    path = folder / "memory.zst"
    with recording.image.open("rb") as image, path.open("wb") as file:
        while data := image.read(STEP):
            file.write(bytes(zstd.compress(data)))
    return path


def zipped(recording: Recording, folder: Path) -> Path:
    subprocess.run(["zip", "-q", "-0", "memory.zip", avml(recording, folder)], cwd=folder, timeout=120, check=True)
    return folder / "memory.zip"


def split(recording: Recording, folder: Path) -> Path:
    whole = lime(recording, folder)
    with whole.open("rb") as file:
        size = whole.stat().st_size
        for number, start in enumerate(range(0, size, 200 << 20), 1):
            with (folder / f"part.{number:03}").open("wb") as part:
                length = min(200 << 20, size - start)
                os.truncate(part.fileno(), length)
                at = start
                while (at := data_from(file, at)) < start + length:
                    data = os.pread(file.fileno(), min(PAGE, start + length - at), at)
                    os.pwrite(part.fileno(), data, at - start)
                    at += len(data)
    return folder / "part.001"


def vmem(recording: Recording, folder: Path) -> Path:
    """The recorded image itself beside a state file that says how it is laid out."""
    path = folder / "machine.vmem"
    path.symlink_to(recording.image)
    regions = [(start // PAGE, offset // PAGE, length // PAGE) for start, length, offset in recording.extents]
    cr3 = [vmss_tag("CR64", (0, 3), struct.pack("<Q", recording.registers["CR3"]))]
    (folder / "machine.vmss").write_bytes(vmss_file({"cpu": cr3, "memory": vmss_memory(regions)}))
    return path


def library():
    try:
        import cramjam
    except ImportError:
        require(False, "the library cramjam is not installed")
        raise
    return cramjam


def processes(target: Path) -> list[tuple[int, str, tuple[str, ...] | None, int | None]]:
    with open_target(str(target), need_os=True) as machine:
        assert machine.default_os is not None
        assert machine.default_os.layer.kind == "linux"
        found = []
        for process in machine.default_os.layer.processes():
            info = process.info
            found.append((info.pid, info.name, info.command_line, info.start_ticks))
        return sorted(found)


FORMATS = [lime, avml, padded, concatenated, frames, zipped, split, vmem]


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.__name__)
def test_a_guest_shows_the_same_processes_in_every_format(guest, tmp_path, form: Callable[[Recording, Path], Path]):
    recording = guest("amd64-6.1-4level")
    assert processes(form(recording, tmp_path)) == processes(recording.image)


@pytest.mark.parametrize("form", [lime, concatenated, vmem], ids=lambda form: form.__name__)
def test_a_guest_with_ram_above_4_gib_does_so_too(guest, tmp_path, form):
    recording = guest("amd64-6.1-5gib")
    assert processes(form(recording, tmp_path)) == processes(recording.image)


def test_it_is_said_where_the_ranges_of_a_concatenated_image_lie(guest, tmp_path):
    recording = guest("amd64-6.1-4level")
    with open_target(str(concatenated(recording, tmp_path)), need_os=True) as machine:
        layer = machine.default_os.layer
        for start, stop in system_ram(recording):
            assert f"{start:#x}-{stop:#x}" in layer.info.notes[0]
            with recording.image.open("rb") as image:
                assert layer.physical_memory.read(stop - PAGE, PAGE) == os.pread(image.fileno(), PAGE, stop - PAGE)
