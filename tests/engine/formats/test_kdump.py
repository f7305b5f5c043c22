"""The parts of the kdump format: bitmaps, the flattened form, LZO."""

from __future__ import annotations

import contextlib
import ctypes
import ctypes.util
import os

import numpy as np
import pytest
from hand_made_dumps import flattened
from hypothesis import given
from hypothesis import strategies as st
from support import require

from engine.bytes_memory import BytesMemory
from engine.errors import BadDataError
from engine.formats.kdump.bitmap import PageBitmap
from engine.formats.kdump.flattened import is_flattened, pieces_of
from engine.formats.kdump.lzo import compiled, decompress, in_c, in_python
from engine.memory_map import MappedMemory, MemoryMap


@given(st.binary(max_size=60), st.integers(1, 500))
def test_a_bitmap_counts_as_its_bits(data, count):
    bits = [pfn for pfn in range(min(count, 8 * len(data))) if data[pfn >> 3] >> (pfn & 7) & 1]
    bitmap = PageBitmap(data, count)
    count = min(count, 8 * len(data))
    pfns = np.arange(count, dtype=np.uint64)
    assert np.flatnonzero(bitmap.has(pfns)).tolist() == bits
    assert [pfn for pfn in range(count + 70) if bitmap[pfn]] == bits
    assert bitmap.total == len(bits)
    assert bitmap.stop == (bits[-1] + 1 if bits else 0)
    ranks = [sum(bit < pfn for bit in bits) for pfn in range(count)]
    assert bitmap.ranks(pfns).tolist() == ranks
    assert [bitmap.rank(pfn) for pfn in range(count)] == ranks
    assert [pfn for low, high in bitmap.runs(3, count - 1) for pfn in range(low, high)] == [
        pfn for pfn in bits if 3 <= pfn < count - 1
    ]


def test_what_lies_behind_a_bitmap_is_not_set():
    bitmap = PageBitmap(b"\xff" * 8, 60)
    assert bitmap.has(np.array([59, 60, 64, 2**63], np.uint64)).tolist() == [True, False, False, False]


@given(st.lists(st.tuples(st.integers(0, 60), st.binary(min_size=1, max_size=40)), max_size=12))
def test_later_records_of_a_flattened_file_win(pieces):
    truth: dict[int, int] = {}
    for at, data in pieces:
        truth.update(enumerate(data, at))
    file = BytesMemory(flattened(pieces))
    ranges, warning = pieces_of(file)
    memory = MappedMemory(file, MemoryMap(ranges))
    assert warning is None
    assert {at for entry in ranges for at in range(entry.base, entry.stop)} == set(truth)
    assert all(memory.read(at, 1)[0] == byte for at, byte in truth.items())


def test_a_flattened_file_that_is_cut_gives_what_is_left():
    file = BytesMemory(flattened([(0, b"a" * 100), (100, b"b" * 100)], ended=False)[:-50])
    ranges, warning = pieces_of(file)
    assert [(entry.base, entry.length) for entry in ranges] == [(0, 100), (100, 50)]
    assert "cut" in str(warning)


def test_a_damaged_record_ends_what_is_read():
    file = BytesMemory(flattened([(0, b"a" * 100), (200, b"")]))
    ranges, warning = pieces_of(file)
    assert len(ranges) == 1
    assert "damaged" in str(warning)


def test_another_version_of_the_flattened_form_is_refused():
    content = bytearray(flattened([]))
    content[31] = 2
    with pytest.raises(BadDataError, match="version 2"):
        pieces_of(BytesMemory(content))


def test_only_its_magic_makes_a_file_flattened():
    assert is_flattened(BytesMemory(flattened([])))
    assert not is_flattened(BytesMemory(b"KDUMP   "))


# -- LZO: streams by hand after the format's description, and what liblzo2 packs -----------------------------------


@pytest.mark.parametrize(
    ("packed", "expected"),
    [
        (bytes([17 + 4]) + b"abcd" + b"\x11\0\0", b"abcd"),
        (bytes([17 + 6]) + b"abcdef" + bytes([0x40 | 5 << 2, 0]) + b"\x11\0\0", b"abcdefabc"),  # 3 bytes, 6 back
        (bytes([17 + 4]) + b"abcd" + bytes([32 | 8, 3 << 2, 0]) + b"\x11\0\0", b"abcd" + b"abcdabcdab"),
        (bytes([17 + 4]) + b"abcd" + bytes([32, 0, 0, 1, 0, 0]) + b"\x11\0\0", b"abcd" + b"d" * (2 + 31 + 510 + 1)),
        (bytes([17 + 4]) + b"abcd" + bytes([0x40 | 3 << 2 | 2, 0]) + b"xy" + b"\x11\0\0", b"abcdabcxy"),
        (bytes([0, 2]) + b"e" * 20 + b"\x11\0\0", b"e" * 20),
        (
            bytes([17 + 4]) + b"abcd" + bytes([0x40 | 3 << 2 | 1, 0]) + b"x" + bytes([1 << 2, 0]) + b"\x11\0\0",
            b"abcdabcx" + b"cx",  # after one literal a match of two bytes, 2 back
        ),
    ],
    ids=["literals", "short", "overlapping", "long", "literals behind", "long literals", "two bytes"],
)
def test_lzo_instructions_do_what_the_format_says(packed, expected):
    assert decompress(packed, len(expected)) == expected
    assert in_python(packed, len(expected), len(expected) + 1) == expected


def both(packed: bytes, size: int, most: int) -> tuple[object, object]:
    """What C and what Python make of it: the bytes, or the sentence."""
    function = compiled()
    require(function, "there is no C compiler")
    results: list[object] = []
    for unpack in (lambda: in_c(function, packed, size, most), lambda: in_python(packed, size, most)):
        try:
            results.append(unpack())
        except ValueError as error:
            results.append(str(error))
    return results[0], results[1]


@given(st.binary(max_size=60), st.integers(1, 300), st.integers(1, 300))
def test_c_and_python_agree_on_any_bytes(data, size, most):
    one, two = both(data, size, min(size + 1, most))
    assert one == two or "more than" in str(one) or "more than" in str(two)  # both refuse, not for the same reason


_LITERALS = st.builds(lambda data: bytes([len(data) - 3]) + data, st.binary(min_size=4, max_size=18))
_MATCHES = st.builds(lambda first, second: bytes([first, second]), st.integers(64, 255), st.integers(0, 1))
_FAR = st.builds(lambda first, low: bytes([first, low, 0]), st.integers(33, 63), st.integers(0, 255))


@given(st.lists(st.one_of(_LITERALS, _MATCHES, _FAR), max_size=25), st.integers(100, 3000))
def test_c_and_python_agree_on_instructions(parts, size):
    one, two = both(b"\x1dabcdefghijkl" + b"".join(parts) + b"\x11\0\0", size, size + 1)
    assert one == two or (isinstance(one, str) and isinstance(two, str))


def test_lzo_is_unpacked_without_a_compiler(monkeypatch):
    monkeypatch.setattr("engine.formats.kdump.lzo.compiled", lambda: None)
    assert decompress(bytes([17 + 4]) + b"abcd" + b"\x11\0\0", 4) == b"abcd"


def test_lzo_of_another_length_is_refused():
    packed = bytes([17 + 4]) + b"abcd" + b"\x11\0\0"
    for size in (3, 5):
        with pytest.raises(ValueError, match="bytes"):
            decompress(packed, size)


def test_the_first_bytes_of_lzo_come_without_the_rest():
    packed = bytes([17 + 4]) + b"abcd" + bytes([32 | 8, 3 << 2, 0]) + b"damaged"
    assert decompress(packed, 4096, 8)[:8] == b"abcdabcd"


@given(st.binary(max_size=80), st.integers(1, 300))
def test_any_bytes_as_lzo_give_a_page_or_a_value_error(data, size):
    with contextlib.suppress(ValueError):
        assert len(decompress(data, size)) == size


@pytest.fixture(scope="module")
def lzo1x():
    name = ctypes.util.find_library("lzo2")
    require(name, "liblzo2 is not installed")
    library = ctypes.CDLL(name)
    work = ctypes.create_string_buffer(1 << 20)

    def pack(data: bytes, function: str) -> bytes:
        out = ctypes.create_string_buffer(2 * len(data) + 4096)
        size = ctypes.c_size_t()
        assert getattr(library, function)(data, ctypes.c_size_t(len(data)), out, ctypes.byref(size), work) == 0
        return out.raw[: size.value]

    return pack


@pytest.mark.parametrize("function", ["lzo1x_1_compress", "lzo1x_1_15_compress", "lzo1x_999_compress"])
def test_what_liblzo2_packs_is_unpacked(lzo1x, function):
    generator = np.random.default_rng(5)
    pages = [os.urandom(4096), bytes(4096), b"abc" * 1365 + b"d", os.urandom(64) * 64, os.urandom(40000) * 3]
    pages += [generator.integers(0, high, 8192).astype(np.uint8).tobytes() for high in (2, 4, 20, 200)]
    pages += [np.cumsum(generator.integers(0, 3, 1024), dtype="<u4").tobytes()]
    for page in pages:
        packed = lzo1x(page, function)
        assert decompress(packed, len(page)) == page
        assert in_python(packed, len(page), len(page) + 1) == page


@given(st.lists(st.tuples(st.binary(max_size=20), st.integers(1, 400)), min_size=1, max_size=10))
def test_any_page_that_liblzo2_packs_is_unpacked(lzo1x, parts):
    page = b"".join(data * count for data, count in parts) or b"x"
    assert decompress(lzo1x(page, "lzo1x_1_compress"), len(page)) == page
