"""BTF against the compilers that wrote it, the kernel of this machine, bpftool, and blobs of every kind."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from btf_samples import BITS, Maker, Sample, compiled, swapped
from support import require

from engine.bytes_memory import BytesMemory
from engine.errors import BadDataError, NotFoundError, NotRecognisedError
from engine.formats.btf import Btf, Kind, find_btf, load_btf
from engine.layout import TypeKind

CROSS = ["aarch64-linux-gnu-gcc", "arm-linux-gnueabihf-gcc", "riscv64-linux-gnu-gcc", "i686-linux-gnu-gcc"]
COMPILERS = [("gcc", "gcc"), *((name, "gcc") for name in CROSS if shutil.which(name))]
if shutil.which("pahole"):
    COMPILERS.append(("gcc", "pahole"))
KERNEL = Path("/sys/kernel/btf/vmlinux")


@pytest.fixture(params=COMPILERS, ids="-".join, scope="module")
def sample(request) -> Sample:
    return compiled(*request.param)


@pytest.fixture
def native() -> Sample:
    return compiled("gcc", "gcc")


# -- what compilers say --------------------------------------------------------------------------------------------


def test_offsets_and_sizes_are_those_the_compiler_computes(sample):
    btf = Btf(sample.btf)
    found = {(name, path): btf.require(name)[path] for name, path in sample.places}
    assert {key: (each.offset, each.size) for key, each in found.items()} == sample.places


def test_sizes_of_structures_are_those_the_compiler_computes(sample):
    btf = Btf(sample.btf)
    assert {name: btf.require(name).size for name in sample.sizes} == sample.sizes


def test_the_size_of_a_pointer_is_found(sample):
    assert Btf(sample.btf).pointer_size == sample.pointer_size


def test_a_blob_of_a_compiler_is_sound(sample):
    Btf(sample.btf).check()


def _extracted(btf: Btf, name: str, field: str, data: bytes) -> int:
    place = btf.require(name)[field]
    assert place.stop <= len(data)
    order = "little" if btf.order == "<" else "big"
    return place.extract(int.from_bytes(data[place.offset : place.stop], order))


@pytest.mark.parametrize(("name", "field"), [(name, field) for name in BITS for field in BITS[name].split()])
def test_a_bit_field_of_ones_is_read_from_where_the_compiler_put_it(sample, name, field):
    btf = Btf(sample.btf)
    place = btf.require(name)[field]
    assert place.bit_size, f"{field} is no bit-field"
    ones = -1 if place.type.signed else (1 << place.bit_size) - 1
    assert _extracted(btf, name, field, sample.bits[name, field]) == ones
    others = [each for each in BITS[name].split() if each != field]
    assert not any(_extracted(btf, name, other, sample.bits[name, field]) for other in others)


def test_the_other_byte_order_gives_the_same_layouts(native):
    little, big = Btf(native.btf), Btf(swapped(native.btf))
    assert (little.order, big.order) == ("<", ">")
    for name, path in native.places:
        a, b = little.require(name)[path], big.require(name)[path]
        assert (a.offset, a.size) == (b.offset, b.size)
    big.check()


def test_types_are_told_through_names_and_const(native):
    outer = Btf(native.btf).require("outer")
    assert outer["state"].type.kind is TypeKind.INTEGER
    assert outer["state"].type.signed
    assert outer["name"].type.target.name == "char"
    assert (outer["row"].type.count, outer["row"].type.target.name) == (4, "inner")
    assert outer["tasks.next"].type.target.layout["previous"].offset == native.places["list", "previous"][0]
    assert outer["call"].type.target.kind is TypeKind.FUNCTION
    assert outer["wide"].dtype() == "<f8"
    assert outer["unknown"].type.target.kind is TypeKind.INCOMPLETE
    assert outer["tail"].type.count == 0
    assert outer["comm"].dtype() == "V16"


def test_enums_give_their_names_and_values(native):
    btf = Btf(native.btf)
    assert btf.enum("colour") == {"RED": 0, "GREEN": 5, "BLUE": 6}
    assert btf.enum("sign") == {"MINUS": -3, "ZERO": -2, "PLUS": 7}
    assert btf.require("outer")["colour"].type.values() == btf.enum("colour")
    assert btf.enum("nonsense") is None


def test_a_name_for_an_anonymous_structure_finds_it(native):
    assert Btf(native.btf).require("atomic")["counter"].offset == 0


def test_an_absent_structure_is_none_and_required_an_error(native):
    btf = Btf(native.btf)
    assert btf.struct("nonsense") is None
    assert btf.struct("unknown") is None  # declared, never defined
    assert btf.struct("nonsense", "list").name == "list"
    with pytest.raises(NotFoundError, match="nonsense or trash"):
        btf.require("nonsense", "trash")


# -- a whole kernel ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def kernel() -> bytes:
    require(KERNEL.exists(), "this machine's kernel has no BTF")
    return KERNEL.read_bytes()


def test_this_kernel_is_sound_to_its_last_byte(kernel):
    btf = Btf(kernel)
    btf.check()
    assert btf.header.size == len(kernel)
    assert btf.require("task_struct").first("__state", "state").size in (4, 8)
    assert btf.require("list_head")["prev"].offset == btf.pointer_size


def test_every_structure_of_this_kernel_can_be_laid_out(kernel):
    btf = Btf(kernel)
    laid_out = {name: btf.struct(name) for _, name in list(btf.names())[::7]}
    assert None not in laid_out.values()
    assert len(laid_out) > 500
    assert btf.skipped == 0


def test_this_kernel_has_the_types_that_bpftool_prints(kernel):
    tool = shutil.which("bpftool", path="/usr/sbin:/usr/bin:/sbin:/bin")
    require(tool, "bpftool is not installed")
    done = subprocess.run([tool, "btf", "dump", "file", str(KERNEL), "-j"], capture_output=True, timeout=60, check=True)
    types = json.loads(done.stdout)["types"]
    btf = Btf(kernel)
    assert btf.count == len(types) + 1
    named = {"(anon)": ""}
    for each in types[::5]:
        number = each["id"]
        assert (btf.kind(number).name, btf.name(number)) == (each["kind"], named.get(each["name"], each["name"]))
        if each["kind"] in ("STRUCT", "UNION"):
            assert btf.size(number) == each["size"]
            assert list(btf.members(number)) == [
                (named.get(m["name"], m["name"]), m["type_id"], m["bits_offset"], m.get("bitfield_size", 0))
                for m in each["members"]
            ]


def test_the_variables_of_this_kernel_lie_in_its_per_cpu_section(kernel):
    found = {each.name: each for each in Btf(kernel).variables()}
    require(found, "this kernel's BTF tells no variables")
    assert {each.section for each in found.values()} >= {".data..percpu"}
    assert found["runqueues"].type.name == "rq"
    assert found["runqueues"].size == found["runqueues"].type.size


# -- kinds that compilers of C do not write ------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["<", ">"])
def test_every_kind_is_stepped_over(order):
    maker = Maker(order)
    number = maker.integer()
    maker.add(2, "", number)
    maker.add(3, "", 0, number, number, 4)
    maker.add(6, "few", 4, maker.text("ONE"), 1, rows=1)
    maker.add(7, "later", 0)
    for kind in (8, 9, 10, 11):
        maker.add(kind, "alias" if kind == 8 else "", number)
    proto = maker.add(13, "", number, maker.text("x"), number, 0, 0, rows=2)
    maker.add(12, "function", proto)
    variable = maker.add(14, "variable", number, 1)
    maker.add(15, ".data", 4, variable, 0, 4, rows=1)
    maker.add(16, "double", 8)
    maker.add(17, "tag", number, -1)
    tagged = maker.add(18, "user", number)
    maker.add(19, "many", 8, maker.text("HUGE"), 5, 6, maker.text("LEAST"), 0, 1 << 31, rows=2, flag=True)
    maker.struct("last", 4, ("member", tagged, 0))
    btf = Btf(maker.blob())
    btf.check()
    assert btf.require("last")["member"].type.name == "int"
    assert btf.enum("many") == {"HUGE": 6 << 32 | 5, "LEAST": -(1 << 63)}
    assert [each.name for each in btf.variables()] == ["variable"]
    assert {btf.kind(each) for each in range(1, btf.count)} == set(Kind) - {Kind.UNION}


def test_a_bit_field_that_stands_in_its_number_type_is_read(native):
    maker = Maker()
    three = maker.add(1, "int", 4, 2 << 16 | 3)  # the encoding before Linux 4.20: 3 bits, 2 bits in
    maker.struct("old", 4, ("field", three, 4))
    field = Btf(maker.blob()).require("old")["field"]
    assert (field.bit_size, field.shift) == (3, 6)


def test_values_of_enums_are_signed_where_a_kernel_is_too_old_to_say():
    maker = Maker()
    maker.add(6, "old", 4, maker.text("MINUS"), 0xFFFFFFFF, rows=1)
    assert Btf(maker.blob()).enum("old") == {"MINUS": -1}


def test_split_btf_continues_the_numbers_and_names_of_its_base():
    base_maker = Maker()
    number = base_maker.integer()
    base_maker.struct("common", 8, ("a", number, 0), ("b", number, 32))
    base = Btf(base_maker.blob())
    maker = Maker(first=base.count, strings_start=base.strings_stop)
    maker.struct("module_own", 12, ("shared", number + 1, 0), ("count", number, 64))
    named = maker.struct("", 8, ("x", number, 0))
    maker.types[-24:-20] = base_maker.strings.index(b"common").to_bytes(4, "little")  # a name of the base
    split = Btf(maker.blob(), base)
    split.check()
    assert split.require("module_own")["shared.b"].offset == 4
    assert split.require("common")["b"].offset == 4
    assert split.numbers("common") == [number + 1, named]
    assert base.struct("module_own") is None


# -- finding -------------------------------------------------------------------------------------------------------


def _task_blob(extra: int = 0) -> bytes:
    maker = Maker()
    char = maker.integer("char", 1)
    comm = maker.add(3, "", 0, char, char, 16)
    maker.struct("task_struct", 64, ("comm", comm, 128))
    for number in range(extra):
        maker.integer(f"int{number}")
    return maker.blob()


def test_blobs_are_found_wherever_they_lie():
    blob = _task_blob()
    memory = BytesMemory(bytes(4 * 1000) + blob + bytes(-len(blob) % 4) + bytes(1 << 20) + blob)
    assert [each.address for each in find_btf(memory)] == [4000, 4000 + len(blob) + -len(blob) % 4 + (1 << 20)]


def test_a_blob_across_the_pieces_of_a_search_is_found():
    blob = _task_blob()
    memory = BytesMemory(bytes((1 << 20) - 4) + blob + bytes(99))
    assert [each.address for each in find_btf(memory)] == [(1 << 20) - 4]


def test_the_largest_sound_blob_is_loaded_and_not_a_larger_damaged_one():
    good, stale = _task_blob(), bytearray(_task_blob(2000))
    stale[8192:12288] = bytes(4096)
    memory = BytesMemory(bytes(stale) + bytes(-len(stale) % 4) + good)
    btf, candidate = load_btf(memory)
    assert candidate.header.size == len(good)
    assert btf.require("task_struct")["comm"].offset == 16


def test_a_blob_whose_names_are_damaged_is_loaded_where_there_is_no_other_and_says_so():
    stale = bytearray(_task_blob(2000))
    stale[-4096:] = bytes(4096)
    btf, _ = load_btf(BytesMemory(bytes(stale)))
    assert btf.require("task_struct")["comm"].offset == 16
    with pytest.raises(BadDataError, match="empty"):
        btf.check()


def test_a_blob_at_an_odd_address_is_loaded():
    assert load_btf(BytesMemory(b"123" + _task_blob()))[1].address == 3


def test_a_memory_without_btf_says_what_was_tried():
    with pytest.raises(NotFoundError, match=r"task_struct\.comm.*nothing begins like it"):
        load_btf(BytesMemory(bytes(8192)))
    maker = Maker()
    maker.integer()
    with pytest.raises(NotFoundError, match=r"at 0x0: no task_struct\.comm"):
        load_btf(BytesMemory(maker.blob()))


# -- damage --------------------------------------------------------------------------------------------------------


def test_other_data_is_not_recognised():
    for data in (b"", b"\x9f", b"\x7fELF" + bytes(64), bytes(64)):
        with pytest.raises(NotRecognisedError):
            Btf(data)


@pytest.mark.parametrize("where", ["types", "strings", "end"])
def test_a_blob_cut_anywhere_is_refused(native, where):
    cut = {"types": 100, "strings": len(native.btf) - 100, "end": len(native.btf) - 1}[where]
    with pytest.raises(BadDataError, match="cut"):
        Btf(native.btf[:cut])


def test_a_zeroed_page_is_refused_wherever_it_lies(kernel):
    step = len(kernel) // 40
    for start in range(4096, len(kernel) - 4096, step):
        bad = bytearray(kernel)
        bad[start : start + 4096] = bytes(4096)
        with pytest.raises(BadDataError):
            Btf(bytes(bad)).check()


def _sound_until_checked(maker: Maker) -> Btf:
    btf = Btf(maker.blob())
    with pytest.raises(BadDataError):
        btf.check()
    return btf


@pytest.mark.parametrize("kind", [8, 9, 10, 11, 18])
def test_names_that_mean_themselves_end_in_an_error(kind):
    maker = Maker()
    number = maker.add(kind, "loop", 1)
    maker.struct("holder", 4, ("bad", number, 0), ("good", maker.next + 1, 0))
    maker.integer()
    btf = Btf(maker.blob())
    with pytest.raises(BadDataError, match="itself"):
        btf.type(number)
    assert [each.name for each in btf.require("holder")] == ["good"]
    assert btf.skipped == 1


def test_an_array_of_itself_ends_in_an_error():
    maker = Maker()
    number = maker.add(3, "", 0, 1, 1, 2)
    with pytest.raises(BadDataError, match="itself"):
        Btf(maker.blob()).type(number)


def test_a_structure_inside_itself_is_laid_out_without_end_only_on_demand():
    maker = Maker()
    maker.struct("self", 8, ("", 1, 0), ("again", 1, 0), ("x", maker.next + 1, 0))
    maker.integer()
    btf = Btf(maker.blob())
    layout = btf.require("self")
    assert btf.skipped == 1  # the anonymous one, at the limit of depth
    assert layout["again.again.again.x"].offset == 0
    assert layout.get(".".join(["again"] * 1000)) is None


def test_anonymous_structures_that_multiply_are_bounded():
    maker = Maker()
    for level in range(30):
        maker.struct(f"level{level}", 8, ("", level + 2, 0), ("", level + 2, 0))
    maker.integer()
    with pytest.raises(BadDataError, match="members"):
        Btf(maker.blob()).struct("level0")


def test_type_numbers_out_of_range_are_found_by_the_check_and_skipped_otherwise():
    maker = Maker()
    maker.struct("holder", 8, ("bad", 99, 0), ("good", 2, 32))
    maker.integer()
    btf = _sound_until_checked(maker)
    assert [each.name for each in btf.require("holder")] == ["good"]
    with pytest.raises(BadDataError, match="no type 99"):
        btf.type(99)


def test_names_out_of_range_are_found_by_the_check_and_empty_otherwise():
    maker = Maker()
    maker.integer()
    maker.types[0:4] = b"\xff\xff\xff\x7f"
    btf = _sound_until_checked(maker)
    assert btf.name(1) == ""
    assert btf.numbers("int") == []


def test_more_rows_than_there_are_bytes_are_refused():
    maker = Maker()
    maker.add(4, "vast", 8, rows=0xFFFF)
    with pytest.raises(BadDataError, match="over the end"):
        Btf(maker.blob())


def test_an_unknown_kind_is_refused_with_its_place():
    maker = Maker()
    maker.integer()
    maker.add(31, "future")
    with pytest.raises(BadDataError, match="kind 31") as caught:
        Btf(maker.blob())
    assert caught.value.address == 24 + 16


def test_a_member_outside_of_its_structure_is_found_by_the_check_and_skipped():
    maker = Maker()
    maker.struct("short", 4, ("inside", 2, 0), ("outside", 2, 64))
    maker.integer()
    btf = _sound_until_checked(maker)
    assert [each.name for each in btf.require("short")] == ["inside"]


def test_an_array_of_absurd_size_is_refused():
    maker = Maker()
    maker.add(3, "", 0, 2, 2, 0xFFFFFFFF)
    maker.add(3, "", 0, 3, 3, 0xFFFFFFFF)
    maker.integer()
    with pytest.raises(BadDataError, match="elements"):
        Btf(maker.blob()).type(1)
