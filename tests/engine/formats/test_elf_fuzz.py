"""Nothing in an image is believed: mutated images end in an answer or an EngineError, soon."""

from __future__ import annotations

import contextlib
import struct
from datetime import timedelta

import pytest
from elf_samples import VERSIONED, VERSIONS, MadeSymbol, compiled, load, make_elf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.bytes_memory import BytesMemory
from engine.errors import EngineError
from engine.formats.elf import Elf, ElfFile, ElfImage, loaded_images
from engine.types import Region, Rights

SYMBOLS = [MadeSymbol(b"wanted", section=0), *(MadeSymbol(b"name%d" % n, 16 * n, 4) for n in range(40))]
BASES = {
    "gnu hash": lambda: compiled("fuzz-gnu.so", "-shared", "-Wl,--hash-style=gnu", "-Wl,--build-id=sha1"),
    "versions": lambda: compiled("fuzz-versions.so", "-shared", "-Wl,--hash-style=gnu", source=VERSIONED,
                                 script=VERSIONS),
}  # fmt: skip
NASTY = st.sampled_from([0, 1, 2, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 1 << 63, (1 << 64) - 1])
# (where as a fraction, width, value): most of what matters stands at the front
MUTATION = st.tuples(st.integers(0, 1 << 16), st.sampled_from([1, 2, 4, 8]), NASTY | st.integers(0, (1 << 64) - 1))
MUTATIONS = st.lists(MUTATION, min_size=1, max_size=12)
FUZZ = settings(
    max_examples=250, deadline=timedelta(seconds=3), suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def mutated(data: bytes, mutations: list[tuple[int, int, int]], focus: list[tuple[int, int]]) -> bytearray:
    """`data` with values written into the ranges of `focus` (start, size), each as likely as the others."""
    out = bytearray(data)
    for place, width, value in mutations:
        start, size = focus[place % len(focus)]
        at = start + (place // len(focus)) % max(1, size)
        chunk = struct.pack("<Q", value)[:width]
        out[at : at + width] = chunk[: max(0, len(out) - at)]
    return out


def focus_of(elf: Elf, data_size: int) -> list[tuple[int, int]]:
    """What a reader looks at: headers, dynamic section, symbols, hash tables, versions; and all the rest."""
    assert elf.dynamic is not None
    found = [(0, 64), (64, 56 * len(elf.segments)), (elf.dynamic.address, 0x180), (0, data_size)]
    for tag in (4, 5, 6, 0x6FFFFEF5, 0x6FFFFFF0, 0x6FFFFFFE):
        address = elf.dynamic.linked(tag)
        if address is not None:
            found.append((elf.locate(address, "a table"), 64))
    return found


def ask_everything(make) -> None:
    elf: Elf | None = None
    with contextlib.suppress(EngineError):
        elf = make()
    if elf is None:
        return
    for question in (
        lambda: elf.header.architecture, lambda: elf.segments, lambda: elf.sections, lambda: elf.load_size,
        lambda: list(elf.exports()), lambda: list(elf.imports()), elf.build_id, elf.soname, elf.needed,
        lambda: list(elf.section_infos(4096)), lambda: list(elf.segment_infos(4096)), lambda: elf.skipped,
    ):  # fmt: skip
        with contextlib.suppress(EngineError):
            question()


@pytest.fixture(params=[*BASES, "made 64", "made 32", "big-endian"], scope="module")
def data(request) -> bytes:
    if request.param in BASES:
        with open(BASES[request.param](), "rb") as file:
            return file.read()
    return make_elf(
        SYMBOLS, bits=32 if request.param == "made 32" else 64, big_endian=request.param == "big-endian",
        build_id=bytes(20),
    )  # fmt: skip


@FUZZ
@given(mutations=MUTATIONS)
def test_a_mutated_file_gives_answers_or_engine_errors(data, mutations):
    bad = mutated(data, mutations, focus_of(ElfFile(BytesMemory(data)), len(data)))
    ask_everything(lambda: ElfFile(BytesMemory(bad)))


@FUZZ
@given(mutations=MUTATIONS, cut=st.integers(0, 1 << 14))
def test_a_mutated_image_gives_answers_or_engine_errors(data, mutations, cut):
    base = 0x70000000
    image = bytes(load(ElfFile(BytesMemory(data)), base))
    bad = mutated(image, mutations, focus_of(ElfImage(BytesMemory(image), base), len(image)))
    ask_everything(lambda: ElfImage(BytesMemory(bad), base))
    ask_everything(lambda: ElfImage(BytesMemory(bad[:cut]), base))


@FUZZ
@given(junk=st.binary(max_size=4096), head=st.sampled_from([b"\x7fELF\x02\x01\x01", b"\x7fELF\x01\x02\x01"]))
def test_junk_behind_a_magic_number_gives_answers_or_engine_errors(junk, head):
    ask_everything(lambda: ElfFile(BytesMemory(head + junk)))
    ask_everything(lambda: ElfImage(BytesMemory(head + junk), 4096))


@FUZZ
@given(mutations=MUTATIONS, sizes=st.lists(st.integers(1, 4), min_size=1, max_size=6))
def test_listing_images_of_a_mutated_process_ends_and_stays_inside_of_it(data, mutations, sizes):
    bad = mutated(data, mutations, [(0, 64), (64, 1024)])
    base, regions, at = 1 << 20, [], 1 << 20
    for number, pages in enumerate(sizes):
        regions.append(
            Region(at, pages * 4096, Rights.READ, False, at - base if number % 3 else 0, (8, 1), 7, "/lib/x.so")
        )
        at += pages * 4096 * (1 + number % 2)
    memory = BytesMemory(bytes(base) + bad + bytes(at))
    for image in loaded_images(memory, regions):
        assert image.base in [region.start for region in regions]
        assert 0 < image.size <= regions[-1].stop - base
