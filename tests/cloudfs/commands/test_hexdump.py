"""Lines as hexdump -C makes them, against hexdump itself."""

from __future__ import annotations

import itertools
import random
import shutil
import subprocess

import pytest
from support import require

from cloudfs.commands._hexdump import HexDump


def dump(*pieces: tuple[int, bytes]) -> bytes:
    dumper = HexDump()
    blocks = [block for address, data in pieces for block in dumper.feed(address, data)]
    return b"".join([*blocks, *dumper.finish()])


def hexdump(data: bytes) -> bytes:
    program = shutil.which("hexdump")
    require(program, "there is no hexdump(1)")
    return subprocess.run([program, "-C"], input=data, capture_output=True, timeout=60, check=True).stdout


def random_data(seed: int, size: int) -> bytes:
    """Lines that repeat, lines that nearly do, and noise."""
    generator = random.Random(seed)
    row = generator.randbytes(16)
    rows = [bytes(16), row, row, row[:15] + b"!", b"A" * 16]
    return b"".join(generator.choice([*rows, generator.randbytes(16)]) for _ in range(size // 16 + 1))[:size]


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 15, 16, 17, 31, 32, 33, 48, 1000, 65536, 65537, 200_000])
@pytest.mark.parametrize("seed", [1, 2])
def test_it_is_what_hexdump_prints(seed, size):
    data = random_data(seed, size)
    assert dump((0, data)) == hexdump(data)


def test_every_byte_is_shown_as_hexdump_shows_it():
    assert dump((0, bytes(range(256)))) == hexdump(bytes(range(256)))


@pytest.mark.parametrize("size", [1 << 20, (1 << 20) + 5])
def test_a_long_run_of_one_line_is_one_star(size):
    assert dump((0, bytes(size))) == hexdump(bytes(size))


@pytest.mark.parametrize("seed", range(10))
def test_how_the_bytes_are_cut_into_pieces_does_not_matter(seed):
    generator = random.Random(seed)
    data = random_data(seed, 5000)
    cuts = sorted({0, len(data), *(generator.randrange(len(data)) for _ in range(30))})
    pieces = [(start, data[start:stop]) for start, stop in itertools.pairwise(cuts)]
    assert dump(*pieces) == dump((0, data))


def test_lines_begin_at_the_address_asked_for():
    assert dump((0x7FFD00001234, b"0123456789abcdefXYZ")).splitlines() == [
        b"7ffd00001234  30 31 32 33 34 35 36 37  38 39 61 62 63 64 65 66  |0123456789abcdef|",
        b"7ffd00001244  58 59 5a                                          |XYZ|",
        b"7ffd00001247",
    ]


#   data      hole      data
# |AAAA…A..|         |AAAA…A|       a gap ends a line early, and the line behind it is shown although it repeats
def test_behind_a_gap_everything_is_shown_again():
    assert dump((0, b"A" * 20), (0x1000, b"A" * 16)).splitlines() == [
        b"00000000  41 41 41 41 41 41 41 41  41 41 41 41 41 41 41 41  |AAAAAAAAAAAAAAAA|",
        b"00000010  41 41 41 41                                       |AAAA|",
        b"00001000  41 41 41 41 41 41 41 41  41 41 41 41 41 41 41 41  |AAAAAAAAAAAAAAAA|",
        b"00001010",
    ]


@pytest.mark.parametrize("start", [0xFFFF_FFF0 - 32, 0xFFFF_FFF7, 0xF_FFFF_FFE0])
def test_addresses_grow_in_width_where_they_must(start):
    data = bytes(range(200))
    lines = dump((start, data)).decode().splitlines()
    addresses = [line.split()[0] for line in lines]
    assert addresses == [f"{start + 16 * index:08x}" for index in range(13)] + [f"{start + 200:08x}"]


def test_the_last_address_of_all_can_be_shown():
    lines = dump(((1 << 64) - 16, bytes(16))).splitlines()
    assert lines[0].startswith(b"fffffffffffffff0  00")
    assert lines[1] == b"10000000000000000"
