"""Nothing in BTF is believed: mutated and cut blobs give answers or BadDataError, soon."""

from __future__ import annotations

import contextlib
import struct

import pytest
from btf_samples import Maker, compiled
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.bytes_memory import BytesMemory
from engine.errors import BadDataError, EngineError, NotRecognisedError
from engine.formats.btf import Btf, load_btf
from engine.formats.btf.mending import mend

NASTY = st.sampled_from([0, 1, 2, 0x7F, 0xFFFF, 0x00FFFFFF, 0x7FFFFFFF, 0x80000000, 0x0400FFFF, 0x8400FFFF, 0xFFFFFFFF])
MUTATIONS = st.lists(st.tuples(st.integers(0, 1 << 16), NASTY | st.integers(0, (1 << 32) - 1)), min_size=1, max_size=12)


def ask_everything(data: bytes, base: Btf | None = None) -> None:
    try:
        btf = Btf(data, base)
    except (BadDataError, NotRecognisedError):
        return
    with contextlib.suppress(BadDataError):
        btf.check()
    for number in range(btf.count + 2):
        for question in (btf.type, btf.name, btf.kind, btf.resolve):
            with contextlib.suppress(BadDataError):
                question(number)
    for _, name in btf.names():
        with contextlib.suppress(BadDataError):
            layout = btf.struct(name)
            for field in layout or ():
                assert 0 <= field.offset <= field.stop <= layout.size
                with contextlib.suppress(BadDataError):
                    _ = field.type.target.target, field.type.layout, field.type.values and field.type.values()
    with contextlib.suppress(BadDataError):
        list(btf.variables())
        btf.enum("colour")


@pytest.fixture(scope="module")
def blob() -> bytes:
    return compiled("gcc", "gcc").btf


def mutated(data: bytes, mutations: list[tuple[int, int]]) -> bytes:
    out = bytearray(data)
    for place, value in mutations:
        at = place % (len(out) // 4) * 4 if place & 1 else place % max(1, len(out) // 2)
        out[at : at + 4] = struct.pack("<I", value)[: len(out) - at]
    return bytes(out)


@settings(max_examples=200)
@given(mutations=MUTATIONS)
def test_a_mutated_blob_gives_answers_or_bad_data(blob, mutations):
    ask_everything(mutated(blob, mutations))


@settings(max_examples=60)
@given(mutations=MUTATIONS)
def test_a_mutated_split_blob_gives_answers_or_bad_data(blob, mutations):
    base = Btf(blob)
    maker = Maker(first=base.count, strings_start=base.strings_stop)
    for number in range(1, 30):
        maker.struct(f"own{number}", 64, ("a", number, 0), ("", base.count + number, 0), ("b", base.count, 64))
    ask_everything(mutated(maker.blob(), mutations), base)


@settings(max_examples=60)
@given(cut=st.integers(0, 1 << 14))
def test_a_cut_blob_is_refused(blob, cut):
    if cut < len(blob):
        with pytest.raises((BadDataError, NotRecognisedError)):
            Btf(blob[:cut])


@settings(max_examples=100)
@given(junk=st.binary(max_size=2048), sizes=st.tuples(*[st.integers(0, 3000)] * 4))
def test_junk_behind_a_header_gives_answers_or_bad_data(junk, sizes):
    ask_everything(struct.pack("<HBB5I", 0xEB9F, 1, 0, 24, *sizes) + junk)


@settings(max_examples=40)
@given(mutations=MUTATIONS, gap=st.integers(0, 64))
def test_loading_from_a_mutated_memory_gives_types_or_an_engine_error(blob, mutations, gap):
    memory = BytesMemory(bytes(gap) + mutated(blob, mutations) + bytes(gap) + blob[: len(blob) // 2])
    with contextlib.suppress(EngineError):
        btf, _ = load_btf(memory, member="outer.comm")
        assert btf.require("outer")["comm"].size >= 0


@settings(max_examples=100)
@given(mutations=MUTATIONS, gap=st.integers(0, 300))
def test_mending_a_mutated_blob_gives_types_or_bad_data(blob, mutations, gap):
    damaged = bytearray(mutated(blob, mutations))
    damaged[200 : 200 + gap] = bytes(gap)
    try:
        mended = mend(bytes(damaged))
    except (BadDataError, NotRecognisedError):
        return
    ask_everything(mended.data)
    with contextlib.suppress(BadDataError):
        btf = Btf(mended.data, starts=mended.starts)
        for _, name in btf.names():
            with contextlib.suppress(BadDataError):
                btf.struct(name)
