"""What an image file is, told by its content."""

from __future__ import annotations

import subprocess
import zlib

import pytest
from dump_samples import lime_image
from support import require

from engine import recognition
from engine.errors import NotRecognisedError
from engine.recognition import FORMATS, HEAD_SIZE, Format, recognise
from engine.targets import chain_of


@pytest.fixture
def announce(tmp_path, monkeypatch):
    """Entry points of another distribution, by their names."""

    def add(*names: str) -> None:
        about = tmp_path / "toy-1.0.dist-info"
        about.mkdir()
        (about / "METADATA").write_text("Metadata-Version: 2.1\nName: toy\nVersion: 1.0\n")
        lines = "".join(f"{name} = toy_module:Toy\n" for name in names)
        (about / "entry_points.txt").write_text(f"[{recognition.GROUP}]\n{lines}")
        monkeypatch.syspath_prepend(str(tmp_path))

    return add


def head(offset: int, magic: bytes) -> bytes:
    return (bytes(offset) + magic).ljust(HEAD_SIZE, b"\xaa")


@pytest.mark.parametrize("row", FORMATS, ids=lambda row: f"{row.magic.hex()}-{row.offset}")
def test_every_row_is_found_by_its_magic(row):
    found = recognise(head(row.offset, row.magic))
    assert found is not None
    assert found.what == row.what


def test_bytes_of_no_format_are_memory():
    assert recognise(bytes(HEAD_SIZE)) is None
    assert recognise(b"") is None
    assert recognise(b"EMi") is None


def test_the_magic_of_another_distribution_is_known_without_importing_it(announce):
    announce("mine.16.4d494e45")
    found = recognise(head(16, b"MINE"))
    assert found is not None
    assert found.connector == "mine"


def test_another_distribution_opens_what_no_connector_here_does(announce):
    announce("minidump.0.4d444d50")
    found = recognise(head(0, b"MDMP"))
    assert found is not None
    assert found.connector == "minidump"


def test_a_format_that_is_opened_here_is_not_taken_over(announce, monkeypatch):
    monkeypatch.setattr(recognition, "FORMATS", (Format(0, b"OURS", "one of ours", "raw"),))
    announce("theirs.0.4f555253")
    found = recognise(head(0, b"OURS"))
    assert found is not None
    assert found.connector == "raw"


@pytest.mark.parametrize("name", ["mine", "mine.x.4d", "mine.0.4", "mine.0.", "mine.-1.4d", "mine.4096.4d"])
def test_an_entry_point_that_is_written_wrongly_is_left_out(announce, name, caplog):
    announce(name)
    assert recognise(head(0, b"MM")) is None
    assert name in caplog.text


def test_what_no_connector_opens_says_what_to_do(tmp_path):
    path = tmp_path / "me mory.img.gz"
    path.write_bytes(b"\x1f\x8b\x08" + bytes(100))
    with pytest.raises(NotRecognisedError) as caught:
        chain_of(str(path))
    assert f"gzip -dk '{path}'" in str(caught.value)


@pytest.mark.parametrize("bits", [9, 12, 15])
def test_what_lime_itself_has_packed_is_recognised(tmp_path, bits):
    path = tmp_path / "memory.z"
    packer = zlib.compressobj(wbits=bits)
    path.write_bytes(packer.compress(lime_image([(0x1000, bytes(100_000))])) + packer.flush())
    with pytest.raises(NotRecognisedError, match=f"packed by LiME itself.*zlib-flate -uncompress < {path}"):
        chain_of(str(path))


def test_another_stream_of_zlib_is_memory(tmp_path):
    assert recognise(zlib.compress(b"something else")) is None


def test_what_no_connector_opens_can_be_seen_as_it_is(tmp_path):
    path = tmp_path / "me mory.dmp"
    path.write_bytes(b"MDMP" + bytes(100))
    with pytest.raises(NotRecognisedError, match="a Windows minidump, which no installed connector reads") as caught:
        chain_of(str(path))
    assert f'raw:"{path}" shows its bytes' in str(caught.value)


@pytest.mark.parametrize("command", ["gzip", "xz", "zstd", "lz4", "bzip2"])
def test_what_a_program_packs_is_recognised(tmp_path, command):
    path = tmp_path / "image"
    path.write_bytes(bytes(10000))
    try:
        packed = subprocess.run([command, "-c", path], capture_output=True, timeout=60, check=True).stdout
    except FileNotFoundError:
        require(False, f"{command} is not installed")
    found = recognise(packed[:HEAD_SIZE])
    assert found is not None
    assert command in found.advice
