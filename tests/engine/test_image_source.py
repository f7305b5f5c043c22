"""Images that are split or packed, made by the programs that people make them with."""

from __future__ import annotations

import lzma
import os
import random
import shlex
import struct
import subprocess
import zipfile
from contextlib import closing, suppress
from pathlib import Path

import pytest
from dump_samples import avml_image, lime_image
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import require

from engine import image_source
from engine.errors import EngineError, FaultError, NotRecognisedError, SourceFaultError, UnusableTargetError
from engine.image_source import ImageSource, open_source
from engine.targets import chain_of, open_target
from engine.testing import Truth, check_memory

DATA = random.Random(3).randbytes(300_000) + bytes(200_000) + b"memory" * 50_000
"""What is in the images: some of it does not shrink."""
LIME = [(0x1000, os.urandom(70_000)), (0x100000, b"lime" * 30_000)]


def run(*command: object, cwd: Path | None = None) -> bytes:
    try:
        return subprocess.run(
            [str(word) for word in command], capture_output=True, timeout=120, check=True, cwd=cwd
        ).stdout
    except FileNotFoundError:
        require(False, f"{command[0]} is not installed")
        raise


def opened(path: Path, **options: bool) -> closing[ImageSource]:
    return closing(open_source(str(path), {}, writable=options.get("writable", False)))


def frames(data: bytes, folder: Path, size: int = 100_000) -> bytes:
    """Several frames of zstd, one behind the other, as pzstd makes them."""
    found = []
    for at in range(0, len(data), size):
        (folder / "frame").write_bytes(data[at : at + size])
        found.append(run("zstd", "-q", "-c", folder / "frame"))
    return b"".join(found)


def seekable(packed: bytes, sizes: list[int]) -> bytes:
    """A table of frames behind them, as the seekable format has it; the frames' own sizes are not needed then."""
    walked, at = [], 0
    while at < len(packed):
        stop = packed.find(b"\x28\xb5\x2f\xfd", at + 4)
        stop = len(packed) if stop < 0 else stop
        walked.append(stop - at)
        at = stop
    assert len(walked) == len(sizes)
    table = b"".join(struct.pack("<II", *pair) for pair in zip(walked, sizes, strict=True))
    table += struct.pack("<IBI", len(sizes), 0, 0x8F92EAB1)
    return packed + struct.pack("<II", 0x184D2A5E, len(table)) + table


def packed(kind: str, data: bytes, folder: Path) -> Path:
    path = folder / f"image.{kind}"
    plain = folder / "plain"
    plain.write_bytes(data)
    match kind:
        case "zip":
            run("zip", "-q", "-0", path.name, plain.name, cwd=folder)
        case "xz":
            path.write_bytes(run("xz", "-T2", "--block-size=64KiB", "-c", plain))
        case "two.xz":
            path.write_bytes(run("xz", "-c", plain) + bytes(8) + lzma.compress(data, check=lzma.CHECK_CRC64))
        case "zst":
            path.write_bytes(frames(data, folder))
        case "lz4":
            path.write_bytes(run("lz4", "-B4", "-BX", "-c", plain))
        case "seekable.zst":
            sizes = [len(data[at : at + 100_000]) for at in range(0, len(data), 100_000)]
            path.write_bytes(seekable(frames(data, folder), sizes))
        case "split":
            run("split", "-b", "123457", "-d", "-a", "3", "--numeric-suffixes=1", plain, folder / "image.split.")
            path = folder / "image.split.001"
        case "split.aa":
            run("split", "-b", "60000", plain, folder / "image.")
            path = folder / "image.aa"
        case "split.zst":
            whole = packed("zst", data, folder)
            run("split", "-b", "100000", "-d", whole, folder / "image.zst.")
            path = folder / "image.zst.00"
    plain.unlink(missing_ok=True)
    return path


KINDS = ["zip", "xz", "zst", "lz4", "seekable.zst", "split", "split.aa", "split.zst"]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_packed_or_split_is_read_in_place(tmp_path, kind):
    with opened(packed(kind, DATA, tmp_path)) as source:
        assert source.memory.size == len(DATA)
        assert source.memory.read(0, len(DATA)) == DATA
        assert source.notes


@pytest.mark.parametrize("kind", KINDS)
def test_it_holds_the_contract_of_memories(tmp_path, kind):
    with opened(packed(kind, DATA, tmp_path)) as source:
        check_memory(lambda: source.memory, Truth(known=[(0, DATA)]))


def test_streams_of_xz_one_behind_the_other_are_one_image(tmp_path):
    with opened(packed("two.xz", DATA, tmp_path)) as source:
        assert source.memory.read(0, 2 * len(DATA)) == DATA * 2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", [lime_image, avml_image])
def test_what_is_inside_is_recognised_by_its_content(tmp_path, kind, make):
    path = packed(kind, make(LIME), tmp_path)
    with open_target(str(path)) as machine:
        connector = machine.instances("connector")[0].connector
        assert connector.kind == "lime"
        for address, data in LIME:
            assert connector.memory.read(address, len(data)) == data
        assert len(connector.info.notes) >= 2


@pytest.mark.parametrize("kind", KINDS)
def test_memory_inside_is_opened_as_such_and_the_file_itself_can_be_seen(tmp_path, kind):
    path = packed(kind, DATA, tmp_path)
    assert chain_of(str(path)).links[0][1].options == {"inside": "yes"}
    with open_target(str(path)) as machine:
        connector = machine.instances("connector")[0].connector
        assert connector.info.size == len(DATA)
        assert connector.memory_map.real_size == len(DATA)
        assert connector.memory.read(1000, 5) == DATA[1000:1005]
    with open_target(f"raw:{path}") as machine:
        assert machine.instances("connector")[0].memory.read(0, 100) == path.read_bytes()[:100]


# ---- what is not opened in place ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "unpack"),
    [
        (["gzip"], "gzip -dk"),
        (["bzip2"], "bzip2 -dk"),
        (["lz4", "-B4", "-BD"], "lz4 -d"),
        (["zstd", "-q"], "zstd -d"),
        (["xz", "-T1"], "xz -dk"),
    ],
)
def test_what_cannot_be_read_in_parts_names_the_command_that_unpacks_it(tmp_path, monkeypatch, command, unpack):
    monkeypatch.setattr(image_source, "BLOCK_LIMIT", 100_000)
    monkeypatch.setattr(image_source, "XZ_BLOCK_LIMIT", 100_000)
    plain = tmp_path / "me mory"
    plain.write_bytes(DATA)
    path = tmp_path / "me mory.packed"
    path.write_bytes(run(*command, "-c", plain))
    with pytest.raises(NotRecognisedError) as caught:
        chain_of(str(path))
    assert f"{unpack} {shlex.quote(str(path))}" in str(caught.value)


def test_a_member_that_is_deflated_is_unpacked_by_unzip(tmp_path):
    path = tmp_path / "image.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("memory.lime", lime_image(LIME))
    with pytest.raises(NotRecognisedError, match=f"memory.lime in it is deflated; unpack it: unzip {path}"):
        chain_of(str(path))


def test_an_archive_with_a_note_beside_the_image_is_opened(tmp_path):
    path = tmp_path / "image.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("README", "taken at noon")
        archive.writestr("folder/memory.raw", DATA)
    with opened(path) as source:
        assert source.memory.read(0, len(DATA)) == DATA
        assert "folder/memory.raw in a ZIP file" in source.notes[0]


def test_an_archive_of_zip64_is_read(tmp_path):
    path = tmp_path / "image.zip"
    with zipfile.ZipFile(path, "w") as archive, archive.open("memory.raw", "w", force_zip64=True) as member:
        member.write(DATA)
    with opened(path) as source:
        assert source.memory.read(0, len(DATA)) == DATA


def test_an_archive_larger_than_4_gib_is_read(tmp_path):
    """A sparse file, as Python's zipfile lays it out: the central directory speaks ZIP64."""
    path = tmp_path / "image.zip"
    size = (4 << 30) + 123
    with open(path, "wb") as file, zipfile.ZipFile(file, "w") as archive:
        with archive.open("memory.raw", "w", force_zip64=True) as member:
            member.write(DATA)
        info = archive.infolist()[0]
        data = file.tell() - len(DATA)
        info.file_size = info.compress_size = size
        file.seek(data + size - 4)
        file.write(b"last")
        archive.start_dir = file.tell()
    with opened(path) as source:
        assert source.memory.size == size
        assert source.memory.read(size - 4, 4) == b"last"
        assert source.memory.read(0, 100) == DATA[:100]


def test_an_archive_of_several_images_says_so(tmp_path):
    path = tmp_path / "image.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("one", DATA)
        archive.writestr("two", DATA)
    with pytest.raises(NotRecognisedError, match="holds 2 files"):
        chain_of(str(path))


def test_an_encrypted_member_says_so(tmp_path):
    plain = tmp_path / "plain"
    plain.write_bytes(DATA)
    run("zip", "-q", "-0", "-P", "secret", "image.zip", "plain", cwd=tmp_path)
    with pytest.raises(NotRecognisedError, match="plain in it is encrypted"):
        chain_of(str(tmp_path / "image.zip"))


def test_a_packed_image_is_never_written(tmp_path):
    for kind in ("zip", "xz"):
        with opened(packed(kind, DATA, tmp_path), writable=True) as source:
            assert not source.memory.writable


# ---- damage ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "block"), [("xz", 65536), ("zst", 100_000), ("lz4", 65536)])
def test_a_damaged_block_faults_and_the_others_are_read(tmp_path, kind, block):
    path = packed(kind, DATA, tmp_path)
    data = bytearray(path.read_bytes())
    data[block + 40_000] ^= 1
    path.write_bytes(bytes(data))
    with opened(path) as source:
        assert source.memory.read(0, block) == DATA[:block]
        assert source.memory.read(2 * block, len(DATA) - 2 * block) == DATA[2 * block :]
        with pytest.raises(SourceFaultError, match="of the file is damaged") as caught:
            source.memory.read(0, len(DATA))
        assert caught.value.address == block


@pytest.mark.parametrize("kind", ["xz", "zip", "zst"])
def test_what_was_cut_off_says_so(tmp_path, kind):
    path = packed(kind, DATA, tmp_path)
    path.write_bytes(path.read_bytes()[: len(DATA) // 4 - 3])
    with suppress(NotRecognisedError), opened(path) as source:  # frames of zstd that are whole can be read
        assert kind == "zst"
        assert source.memory.read(0, 100_000) == DATA[:100_000]


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(["zip", "xz", "zst", "seekable.zst", "lz4"]),
    st.lists(st.tuples(st.integers(-200, 100), st.integers(0, 255)), max_size=5),
    st.integers(0, 60),
)
def test_no_damage_raises_anything_but_the_errors_of_the_engine(tmp_path, kind, changes, cut):
    kept = tmp_path / f"kept.{kind}"
    if not kept.exists():
        kept.write_bytes(packed(kind, DATA[:250_000], tmp_path).read_bytes())
    data = bytearray(kept.read_bytes())
    for at, value in changes:
        data[at] = value
    path = tmp_path / "hostile"
    path.write_bytes(bytes(data[: len(data) - cut]))
    with suppress(EngineError), opened(path) as source:
        assert source.memory.size <= 64 << 20
        with suppress(FaultError):
            source.memory.read(0, source.memory.size)


# ---- split images ------------------------------------------------------------------------------------------------


def split(folder: Path, *sizes: int, names: str = "{:03}", first: int = 1) -> Path:
    at = 0
    for number, size in enumerate(sizes, first):
        (folder / ("image." + names.format(number))).write_bytes(DATA[at : at + size])
        at += size
    return folder / ("image." + names.format(first))


def test_a_part_that_is_missing_is_a_hole_with_a_warning(tmp_path):
    path = split(tmp_path, 40_960, 40_960, 40_960, 777)
    (tmp_path / "image.003").unlink()
    with opened(path) as source:
        assert source.memory.read(0, 81_920) == DATA[:81_920]
        assert source.memory.read(122_880, 777) == DATA[122_880:123_657]
        with pytest.raises(FaultError) as caught:
            source.memory.read(81_000, 50_000)
        assert caught.value.address == 81_920
        assert "1 parts of 40960 bytes are missing" in source.notes[1]


def test_a_missing_part_among_parts_of_different_sizes_is_an_error(tmp_path):
    path = split(tmp_path, 1000, 2000, 3000, 4000)
    (tmp_path / "image.003").unlink()
    with pytest.raises(UnusableTargetError, match="1 parts are missing"):
        open_source(str(path), {}, writable=False)


def test_a_later_part_names_the_first(tmp_path):
    split(tmp_path, 1000, 1000, 1000)
    with pytest.raises(NotRecognisedError, match=r"later part of a split image: name the first, .*image\.001"):
        chain_of(str(tmp_path / "image.002"))
    with open_target(f"raw:{tmp_path / 'image.002'}") as machine:
        assert machine.instances("connector")[0].memory.read(0, 1000) == DATA[1000:2000]


@pytest.mark.parametrize(
    "names",
    [["image.001"], ["image.002"], ["image.002", "image.003"], ["image.001", "image.999"], ["image.raw", "image.rax"],
     ["image.001", "image.0002"], ["image.1", "image.2"], ["image.ab", "image.ac"]],
)  # fmt: skip
def test_a_file_that_is_no_part_is_opened_alone(tmp_path, names):
    for name in names:
        (tmp_path / name).write_bytes(DATA[:1000])
    with opened(tmp_path / names[0]) as source:
        assert source.memory.size == 1000
        assert not source.notes


@pytest.mark.parametrize(("names", "first"), [("{:03}", 0), ("{:02}", 0), ("{:02}", 1), ("{:04}", 1)])
def test_numbers_begin_with_0_or_1(tmp_path, names, first):
    with opened(split(tmp_path, 1000, 1000, 500, names=names, first=first)) as source:
        assert source.memory.read(0, 2500) == DATA[:2500]


def test_a_split_image_that_may_be_written_is(tmp_path):
    with opened(split(tmp_path, 1000, 1000), writable=True) as source:
        source.memory.write(998, b"over")
    assert (tmp_path / "image.001").read_bytes().endswith(b"ov")
    assert (tmp_path / "image.002").read_bytes().startswith(b"er")


def test_it_is_immutable_for_as_long_as_nobody_writes_to_any_part(tmp_path):
    path = split(tmp_path, 1000, 1000, 1000)
    with open_target(str(path)) as machine:
        instance = machine.instances("connector")[0]
        if instance.live:
            require(False, f"there are no leases here: {instance.connector.info.freshness}")
        told = []
        assert instance.lease is not None
        instance.lease.on_break(lambda: told.append(instance.live))
        run("sh", "-c", f"echo >> {shlex.quote(str(tmp_path / 'image.002'))}")
        assert told == [True], "it was live before the writer came"
        assert instance.live
        assert "another program" in instance.connector.info.freshness


def test_a_part_that_others_write_to_makes_it_live(tmp_path):
    path = split(tmp_path, 1000, 1000)
    with open(tmp_path / "image.002", "r+b"), opened(path) as source:
        assert not source.immutable
        assert source.freshness.startswith("live")


def test_leases_of_all_parts_end_when_it_is_closed(tmp_path):
    path = split(tmp_path, 1000, 1000)
    with opened(path) as source:
        lease = source.lease
    assert lease is None or not lease.held


def test_what_a_connector_cannot_open_packed_is_to_be_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr("engine.connectors.lime.LimeConnector.opens_packed", False)
    path = packed("xz", lime_image(LIME), tmp_path)
    with pytest.raises(NotRecognisedError, match=f"with a LiME image in it, .*; unpack it: xz -dk {path}"):
        chain_of(str(path))
