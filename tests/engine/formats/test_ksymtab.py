"""Exported symbols: every form of __ksymtab, by an encoder that knows only the format's description; damage."""

from __future__ import annotations

import contextlib
import random
import struct
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.bytes_memory import BytesMemory
from engine.errors import EngineError, NotFoundError
from engine.formats.ksymtab import Form, Ksymtab, load_ksymtab
from engine.memory import Memory
from engine.memory_map import MappedMemory, MapRange, MemoryMap

SIZE = 1 << 18
SEEDS = ("init_task", "iomem_resource", "jiffies", "kfree")
NAMES = sorted([*SEEDS, *(f"exported_{number * 7919 % 99_991}" for number in range(900))])


@dataclass(frozen=True)
class Made:
    """An image, the virtual address of its first byte, and what it exports."""

    data: bytes
    base: int
    exports: dict[str, int]
    table: int
    strings: int


def make(form: str, fields: int = 3, order: str = "<", base: int = 0xFFFFFFFF81000000, seed: int = 3) -> Made:
    """Two tables, each sorted by name and one behind the other, checksums behind them, then the names."""
    chance = random.Random(seed)
    data = bytearray(chance.randbytes(SIZE))
    data[1::3] = bytes(len(data[1::3]))
    size = 8 if form == "u64" else 4
    mask = (1 << (64 if base >> 32 else 32)) - 1
    table = 0x8000
    strings = table + len(NAMES) * fields * size + 4 * len(NAMES)
    halves = [NAMES[::2], NAMES[1::2]]
    blob = bytearray(b"\0")
    at: dict[str, int] = {"": strings}
    for name in sorted(NAMES, key=lambda each: chance.random()):
        at[name] = strings + len(blob)
        if name == "kfree":  # linkers let a name be the end of a longer one
            blob += b"devm_"
            at[name] += 5
        blob += name.encode() + b"\0"
    exports = {name: (base + 16 * chance.randrange(SIZE // 16)) & mask for name in NAMES}
    place = table
    for name in [*halves[0], *halves[1]]:
        for target in (exports[name] - base, at[name], at[""])[:fields]:
            value = target - place if form == "prel32" else target + base
            data[place : place + size] = (value % (1 << 8 * size)).to_bytes(size, "little" if order == "<" else "big")
            place += size
    data[strings : strings + len(blob)] = blob
    return Made(bytes(data), base, exports, table, strings)


SHAPES = {
    "x86-64": ("prel32", 3, "<", 0xFFFFFFFF81000000),
    "x86-64 5.3": ("prel32", 2, "<", 0xFFFFFFFF81000000),
    "arm64": ("prel32", 3, "<", 0xFFFF800008000000),
    "i386": ("prel32", 3, "<", 0xC1000000),
    "arm": ("u32", 3, "<", 0xC0008000),
    "arm 5.3": ("u32", 2, "<", 0xC0008000),
    "riscv64": ("u64", 3, "<", 0xFFFFFFFF80000000),
    "ppc64le 5.3": ("u64", 2, "<", 0xC000000000000000),
    "s390x": ("prel32", 3, ">", 0x3FFE0000000),
    "ppc64": ("u64", 3, ">", 0xC000000000000000),
    "ppc": ("u32", 3, ">", 0xC0000000),
}


@pytest.fixture(params=SHAPES, scope="module")
def made(request) -> Made:
    return make(*SHAPES[request.param])


@pytest.fixture(scope="module")
def plain() -> Made:
    return make("prel32")


def load(made: Made, **options) -> Ksymtab:
    return load_ksymtab(BytesMemory(made.data), made.base, **options)


def test_every_export_comes_out_in_every_form(made):
    found = load(made)
    assert {each.name: each.address for each in found} == made.exports
    assert (len(found), found.address) == (len(NAMES), made.table)


def test_the_form_is_told(made, request):
    form, fields, _, _ = SHAPES[request.node.callspec.params["made"]]
    assert (load(made).form, load(made).fields) == (Form(form), fields)


def test_a_name_gives_its_address(plain):
    found = load(plain)
    assert found.find("init_task") == [plain.exports["init_task"]]
    assert found.first("nothing", "kfree") == plain.exports["kfree"]
    assert found.find("devm_kfree") == found.find("init_tas") == found.find("") == []
    assert found.first("nothing") is None


def test_a_known_byte_order_and_word_size_are_not_guessed(made, request):
    _, _, order, base = SHAPES[request.node.callspec.params["made"]]
    assert len(load(made, order=order, word_size=8 if base >> 32 else 4)) == len(NAMES)
    with pytest.raises(NotFoundError):
        load(made, order="<" if order == ">" else ">")


def test_places_of_distances_need_no_virtual_address(plain):
    found = load_ksymtab(BytesMemory(plain.data))
    assert found.find("init_task") == [plain.exports["init_task"] - plain.base]


def test_names_far_from_the_table_are_found():
    made = make("prel32")
    far = bytes(6 << 20)
    data = bytearray(made.data[: made.strings] + far + made.data[made.strings :])
    for place in range(made.table, made.strings - 4 * len(NAMES), 12):
        for field in (4, 8):
            (value,) = struct.unpack_from("<i", data, place + field)
            struct.pack_into("<i", data, place + field, value + len(far))
    assert len(load_ksymtab(BytesMemory(bytes(data)), made.base)) == len(NAMES)


def test_other_pointers_to_a_name_are_no_table(plain):
    data = bytearray(plain.data)
    target = data.index(b"\0init_task\0") + 1
    for place in (0x100, 0x200, plain.strings + 0x9000):
        struct.pack_into("<i", data, place, target - place)
        struct.pack_into("<Q", data, place + 8, plain.base + target)
    assert len(load_ksymtab(BytesMemory(bytes(data)), plain.base)) == len(NAMES)


def test_a_table_in_pieces_of_physical_memory_comes_out(plain):
    half = plain.table + 0x1000
    flat = BytesMemory(plain.data[half:] + plain.data[:half])
    memory: Memory = MappedMemory(
        flat, MemoryMap([MapRange(0, half, SIZE - half), MapRange(half, SIZE - half, 0)])
    )
    assert len(load_ksymtab(memory, plain.base)) == len(NAMES)


def test_a_memory_without_a_table_says_what_was_tried():
    with pytest.raises(NotFoundError, match="0 strings end with iomem_resource"):
        load_ksymtab(BytesMemory(bytes(1 << 16)))
    with pytest.raises(NotFoundError, match="2 strings"):
        load_ksymtab(BytesMemory(bytes(99) + b"init_task\0kfree\0" + bytes(1 << 16)))


def test_a_damaged_page_of_names_leaves_the_part_before_it_or_behind_it(plain):
    data = bytearray(plain.data)
    at = data.index(b"exported_", plain.strings + 0x800)
    data[at : at + 4096] = bytes(4096)
    with contextlib.suppress(NotFoundError):
        found = {each.name: each.address for each in load_ksymtab(BytesMemory(bytes(data)), plain.base)}
        assert found.items() <= plain.exports.items()


@settings(max_examples=40)
@given(
    shape=st.sampled_from(sorted(SHAPES)),
    changes=st.lists(st.tuples(st.integers(0, 1 << 15), st.binary(min_size=1, max_size=16)), min_size=1, max_size=8),
    cut=st.integers(0, SIZE),
)
def test_mutated_and_cut_images_give_exports_or_an_engine_error(shape, changes, cut):
    made = CACHE.setdefault(shape, make(*SHAPES[shape]))
    data = bytearray(made.data)
    for offset, value in changes:
        data[made.table + offset : made.table + offset + len(value)] = value
    for image in (data, data[:cut]):
        with contextlib.suppress(EngineError):
            found = load_ksymtab(BytesMemory(bytes(image)), made.base)
            assert len(list(found)) == len(found)


CACHE: dict[str, Made] = {}
