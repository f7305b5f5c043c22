"""kallsyms: every layout, by an encoder that knows only the format's description; look-ups; damage."""

from __future__ import annotations

import contextlib
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kallsyms_samples import LAYOUTS, Image, image, symbols_of

from engine.bytes_memory import BytesMemory
from engine.errors import BadDataError, EngineError, NotFoundError
from engine.formats.kallsyms import AddressMode, Kallsyms, find_tables, load_kallsyms
from engine.formats.kallsyms.names import expand, symbol_starts
from engine.memory import Memory
from engine.memory_map import MappedMemory, MapRange, MemoryMap

MODES = {each.value: each for each in AddressMode}


def load(made: Image, **options) -> Kallsyms:
    return load_kallsyms(BytesMemory(bytes(made.data)), made.shape.base, **options)


@pytest.fixture(params=LAYOUTS, scope="module")
def made(request) -> Image:
    return image(request.param)


@pytest.fixture(scope="module")
def plain() -> Image:
    return image("x86-64 6.12")


def test_every_symbol_comes_out_in_every_layout(made):
    symbols = load(made)
    assert [(each.address, each.kind, each.name) for each in symbols] == made.symbols
    assert (symbols.mode, symbols.word_size) == (MODES[made.shape.mode], made.shape.word)


def test_the_tables_are_found_where_they_were_written(made):
    (tables,) = find_tables(BytesMemory(bytes(made.data)))
    assert (tables.order, tables.count) == (made.shape.order, len(made.symbols))
    assert {name: getattr(tables, name) for name in ("names", "markers", "token_table", "token_index")} == {
        name: made.at[name] for name in ("names", "markers", "token_table", "token_index")
    }


def test_references_that_agree_change_nothing(made):
    references = {name: address for address, _, name in made.symbols[15::100]}
    assert [each.address for each in load(made, references=references)] == [address for address, _, _ in made.symbols]


def test_references_that_do_not_agree_refuse_the_tables(made):
    references = {name: address + 64 for address, _, name in made.symbols[100::100]}
    with pytest.raises(NotFoundError, match=f"{len(made.symbols)} symbols"):
        load(made, references=references)


def test_a_few_references_may_be_wrong(plain):
    references = {name: address for address, _, name in plain.symbols[15::100]}
    references |= {"vmemmap": 1, plain.symbols[700][2]: 5}
    assert load(plain, references=references).find("_text") == [plain.shape.base]


@pytest.mark.parametrize("count", [513, 600, 768, 769, 1024, 3000])
def test_any_number_of_symbols_comes_out(count):
    made = image("x86-64 5.10", count)
    assert [each.name for each in load(made)] == [name for _, _, name in made.symbols]


@pytest.mark.parametrize("start", [0x4000, 0x4008, 0x7FF8, 0x10010])
def test_tables_at_any_place_come_out(start):
    made = image("x86-64 6.18", table_start=start)
    assert [each.address for each in load(made)] == [address for address, _, _ in made.symbols]


def test_a_word_size_that_is_known_is_not_guessed(made):
    assert load(made, word_size=made.shape.word).word_size == made.shape.word


# -- look-ups ------------------------------------------------------------------------------------------------------


def test_a_name_gives_all_of_its_addresses(plain):
    symbols = load(plain)
    wanted: dict[str, list[int]] = {}
    for address, _, name in plain.symbols:
        wanted.setdefault(name, []).append(address)
    assert max(map(len, wanted.values())) > 3
    assert {name: symbols.find(name) for name in wanted} == wanted


@pytest.mark.parametrize("name", ["", "nothing", "_tex", "_textt", "text", "_text\0", "\udcff", "x" * 5000])
def test_a_name_that_is_not_there_gives_nothing(plain, name):
    assert load(plain).find(name) == []


def test_the_first_of_names_that_is_there_counts(plain):
    symbols = load(plain)
    assert symbols.first("nothing", "_text") == plain.shape.base
    assert symbols.first("nothing") is None


def test_an_address_gives_the_symbol_at_or_below_it(plain):
    symbols = load(plain)
    addresses = [address for address, _, _ in plain.symbols]
    for row in range(20, len(addresses), 37):
        for delta in (0, 1):
            below = [each for each in plain.symbols if each[0] <= addresses[row] + delta]
            first = next(each for each in plain.symbols if each[0] == below[-1][0])
            found = symbols.at(addresses[row] + delta)
            assert (found.address, found.kind, found.name) == first


def test_an_address_below_all_symbols_or_outside_of_all_has_none():
    symbols = load(image("x86-64 6.18"))
    assert symbols.at(0) is None
    assert symbols.at(-1) is None
    assert symbols.at(1 << 64) is None


def test_data_symbols_are_there_or_not(plain):
    assert not load(plain).has_data
    shape = LAYOUTS["x86-64 6.12"]
    whole = [*symbols_of(shape), (shape.base + (1 << 20), "T", "init_mm"), (shape.base + (2 << 20), "T", "init_task")]
    assert load(Image(whole, shape)).has_data


# -- other memories ------------------------------------------------------------------------------------------------


def test_a_place_relative_table_follows_the_address_it_lies_at():
    made = image("x86-64 7.3")
    memory = BytesMemory(bytes(made.data))
    moved = load_kallsyms(memory, made.shape.base + 0x2000000)
    assert moved.find("_text") == [made.shape.base + 0x2000000]
    assert moved.agreement({"_text": made.shape.base + 0x2000000, "nothing": 1}) == (1, 1)


def test_tables_in_pieces_of_physical_memory_come_out(plain):
    data = bytes(plain.data)
    half = len(data) // 2
    flat = BytesMemory(data[half:] + data[:half])
    memory: Memory = MappedMemory(flat, MemoryMap([MapRange(0, half, half), MapRange(half, half, 0)]))
    assert len(load_kallsyms(memory, plain.shape.base)) == len(plain.symbols)


def test_dead_token_tables_are_passed_over(plain):
    at, stop = plain.at["token_table"], plain.at["token_index"] + 512
    dead = bytes(plain.data[at:stop]) + bytes(-(stop - at) % 8)
    symbols = load_kallsyms(BytesMemory(dead + bytes(64) + dead + bytes(plain.data)))
    assert len(symbols) == len(plain.symbols)


def test_only_the_part_asked_for_is_searched(plain):
    memory = BytesMemory(bytes(plain.data))
    with pytest.raises(NotFoundError, match="no token table"):
        load_kallsyms(memory, stop=plain.at["token_table"])
    assert len(load_kallsyms(memory, start=plain.shape.table_start)) == len(plain.symbols)


# -- damage --------------------------------------------------------------------------------------------------------


TABLES = ["num_syms", "names", "markers", "token_table", "token_index", "addresses"]


@pytest.mark.parametrize(
    ("layout", "table"),
    [(layout, table) for layout in LAYOUTS for table in TABLES]
    + [(layout, "base") for layout, shape in LAYOUTS.items() if shape.mode == "percpu"],
)
def test_a_table_of_zeros_is_refused(layout, table):
    made = image(layout)
    data = bytearray(made.data)
    size = {"addresses": 4 * len(made.symbols), "names": made.at["markers"] - made.at["names"]}.get(table, 512)
    data[made.at[table] : made.at[table] + size] = bytes(size)
    references = {name: address for address, _, name in made.symbols[300::50]}
    with pytest.raises(NotFoundError):
        load_kallsyms(BytesMemory(bytes(data)), made.shape.base, references=references)


def damaged(made: Image, table: str, offset: int, content: bytes) -> tuple[Kallsyms, list[tuple[int, str, str]]]:
    data = bytearray(made.data)
    at = made.at[table] + offset
    data[at : at + len(content)] = content
    symbols = load_kallsyms(BytesMemory(bytes(data)), made.shape.base)
    return symbols, [(each.address, each.kind, each.name) for each in symbols]


JUNK = random.Random(9).randbytes(600)


@pytest.mark.parametrize("content", [bytes(600), JUNK, b"\xff" * 600], ids=["zeros", "junk", "ones"])
@pytest.mark.parametrize("offset", [0, 3000, 12_000, 20_000])
def test_damaged_names_cost_the_symbols_between_two_markers_and_no_other(content, offset):
    made = image("x86-64 6.18", 3000)
    assert made.at["markers"] - made.at["names"] > 20_600
    symbols, found = damaged(made, "names", offset, content)
    assert symbols.skipped in (256, 512)
    assert len(found) == 3000 - symbols.skipped
    assert set(found) < set(made.symbols)
    assert found == [each for each in made.symbols if each in set(found)]


@pytest.mark.parametrize("layout", ["x86-64 5.10", "x86-64 6.18", "x86-64 7.3", "i386 6.1", "s390x 6.1"])
def test_a_wiped_page_of_addresses_costs_its_symbols_and_no_other(layout):
    made = image(layout, 3000)
    start = 4096 - made.at["addresses"] % 4096
    symbols, found = damaged(made, "addresses", start, bytes(4096))
    assert symbols.skipped == 1024
    assert set(found) <= set(made.symbols)


def test_junk_among_addresses_costs_its_symbols_and_few_others():
    made = image("x86-64 6.18", 3000)
    symbols, found = damaged(made, "addresses", 4000, JUNK[:160])
    assert 30 <= symbols.skipped <= 50
    assert len(set(found) - set(made.symbols)) <= 10  # what by chance ascends among its neighbours
    assert (np.diff(symbols.addresses.astype(np.int64)) >= 0).all()


def test_a_memory_without_tables_says_so():
    with pytest.raises(NotFoundError, match="no kallsyms tables"):
        load_kallsyms(BytesMemory(bytes(1 << 16)))
    with pytest.raises(NotFoundError):
        load_kallsyms(BytesMemory(b"".join(b"%d\0" % digit for digit in range(10)) * 500))


SMALL = {name: image(name, 520) for name in ("x86-64 6.12", "i386 6.1", "s390x 7.3")}
MUTATION = st.tuples(
    st.sampled_from(["num_syms", "names", "markers", "token_table", "token_index", "addresses"]),
    st.integers(0, 600), st.binary(min_size=1, max_size=8),
)  # fmt: skip


@settings(max_examples=120)
@given(name=st.sampled_from(sorted(SMALL)), mutations=st.lists(MUTATION, min_size=1, max_size=6))
def test_mutated_tables_give_symbols_or_an_engine_error(name, mutations):
    made = SMALL[name]
    data = bytearray(made.data)
    for table, offset, value in mutations:
        at = made.at[table] + offset
        data[at : at + len(value)] = value
    with contextlib.suppress(EngineError):
        symbols = load_kallsyms(BytesMemory(bytes(data)), made.shape.base)
        assert len(list(symbols)) == len(symbols)
        assert symbols.at((1 << 64) - 1) is not None


@settings(max_examples=60)
@given(cut=st.integers(0, 1 << 17), name=st.sampled_from(sorted(SMALL)))
def test_cut_images_give_symbols_or_an_engine_error(cut, name):
    with contextlib.suppress(EngineError):
        load_kallsyms(BytesMemory(bytes(SMALL[name].data[:cut])), SMALL[name].shape.base)


def test_names_that_would_fill_memory_are_refused():
    data = np.frombuffer(bytes([127, *[65] * 127]) * 512, np.uint8)
    starts = symbol_starts(data, np.array([0, 128 * 256]), 512)
    with pytest.raises(BadDataError, match="longer than names can be"):
        expand(data, starts, [b"x" * 4000] * 256)
    block, begins = expand(data, starts, [b"x"] * 256)
    assert (len(block), begins.tolist()[:2]) == (512 * 128 + 1, [1, 129])


@pytest.mark.parametrize("markers", [[0, 5], [0, 2 * 256 + 1], [0, 1 << 40], [0]])
def test_markers_that_do_not_fit_the_names_are_refused(markers):
    data = np.frombuffer(bytes([1, 65]) * 512, np.uint8)
    with pytest.raises(BadDataError):
        symbol_starts(data, np.array(markers), 512)
