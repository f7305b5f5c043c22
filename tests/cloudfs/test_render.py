"""The rendering that the mount and the command line share."""

from __future__ import annotations

import gc
import json
import os
import re
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloudfs import render
from engine.chain import Spec
from engine.machine import Instance
from engine.types import PAGE_TABLES, ConnectorInfo, ModuleInfo, OsInfo, ProcessInfo, Region, Rights


def parse_maps(text: str) -> list[Region]:
    """Regions of the kernel's text, read by splitting alone."""
    regions = []
    for line in text.splitlines():
        span, permissions, offset, device, inode, *rest = line.split(None, 5)
        start, stop = (int(word, 16) for word in span.split("-"))
        rights = Rights.NONE
        for letter, right in zip(permissions, (Rights.READ, Rights.WRITE, Rights.EXECUTE), strict=False):
            rights |= right if letter != "-" else Rights.NONE
        major, minor = (int(word, 16) for word in device.split(":"))
        path, shared = rest[0] if rest else "", permissions[3] == "s"
        regions.append(Region(start, stop - start, rights, shared, int(offset, 16), (major, minor), int(inode), path))
    return regions


def test_maps_text_is_the_kernels_byte_for_byte() -> None:
    with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as file:
        text = file.read()
    assert "[stack]" in text
    assert render.maps_text(parse_maps(text)) == text


def test_a_newline_in_a_mapped_path_is_octal_as_the_kernel_prints_it(tmp_path: object) -> None:
    path = f"{tmp_path}/a\nb c\\d"
    program = (
        "import mmap,sys\n"
        "with open(sys.argv[1], 'w+b') as file:\n"
        "    file.truncate(4096); mapping = mmap.mmap(file.fileno(), 4096)\n"
        "    sys.stdout.write(open('/proc/self/maps').read())"
    )
    text = subprocess.run([sys.executable, "-c", program, path], capture_output=True, text=True, timeout=60).stdout
    line = next(line for line in text.splitlines(True) if "/a" in line and "b c" in line)
    region = parse_maps(line)[0]
    real = Region(region.start, region.size, region.rights, True, 0, region.device, region.inode, path)
    assert render.maps_line(real) == line


def test_a_path_that_is_no_text_survives_maps() -> None:
    region = Region(0x1000, 0x1000, Rights.READ, path=os.fsdecode(b"/\xff\xfe"))
    assert os.fsencode(render.maps_text([region])).endswith(b" /\xff\xfe\n")


def test_an_address_of_more_than_eight_digits_moves_no_column() -> None:
    line = render.maps_line(Region(0xFFFFFFFFFF600000, 0x1000, Rights.EXECUTE, path="[vsyscall]"))
    assert line == "ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0                  [vsyscall]\n"


PS_KEYS = (
    "pid ppid name state uid gid threads start_time command_line executable architecture kernel_thread dtb object"
).split()


def test_a_process_of_which_nothing_is_known_has_every_key() -> None:
    record = render.process_record(ProcessInfo(7, "x"))
    assert list(record) == PS_KEYS
    assert [record[key] for key in PS_KEYS if record[key] is not None] == [7, "x"]


def test_what_only_some_layers_know_follows_the_common_keys() -> None:
    extra = {"namespaces": {"pid": 4026531836}, "pid": 99, "sources": ("list", "scan")}
    record = render.process_record(ProcessInfo(7, "x", extra=extra))
    assert record["pid"] == 7
    assert record["namespaces"] == {"pid": 4026531836}
    assert record["sources"] == ["list", "scan"]


def test_addresses_are_hexadecimal_strings() -> None:
    record = render.process_record(ProcessInfo(1, "x", dtb=0x1000, object=0xFFFF888000001000))
    assert (record["dtb"], record["object"]) == ("0x1000", "0xffff888000001000")
    module = render.module_record(ModuleInfo("m", None, 0xFFFFFFFFC0000000, 10))
    assert module == {
        "name": "m", "path": None, "base": "0xffffffffc0000000", "size": 10, "architecture": None, "build_id": None,
    }


def test_a_region_has_the_keys_of_maps() -> None:
    region = Region(0x1000, 0x2000, Rights.READ | Rights.WRITE, False, 0x3000, (8, 1), 12, "/a")
    assert render.region_record(region) == {
        "start": "0x1000", "stop": "0x3000", "permissions": "rw-p", "offset": "0x3000",
        "device": "08:01", "inode": 12, "path": "/a", "source": None,
    }


def test_what_page_tables_do_not_tell_of_a_region_is_null() -> None:
    region = Region(0x1000, 0x2000, Rights.READ, None, source=PAGE_TABLES)
    assert render.region_record(region) == {
        "start": "0x1000", "stop": "0x3000", "permissions": "r--?", "offset": None,
        "device": None, "inode": None, "path": None, "source": "page tables",
    }
    assert render.maps_line(region).split()[-1] == "tables]"


def test_times_are_iso_8601_in_utc() -> None:
    assert render.time_text(0) == "1970-01-01T00:00:00.000Z"
    assert render.time_text(1700000000.25) == "2023-11-14T22:13:20.250Z"


@pytest.mark.parametrize("seconds", [1e30, -1e30, float("nan"), float("inf")])
def test_a_time_of_no_calendar_is_unknown(seconds: float) -> None:
    assert render.time_text(seconds) is None


def test_an_os_counts_what_it_skipped() -> None:
    record = render.os_record(OsInfo("native", skipped={"process": 2}), 5)
    assert record["skipped"] == {"process": 2}
    assert record["processes"] == 5
    wanted = "kind version architecture page_size kernel_base dtb boot_time processes skipped".split()
    assert set(wanted) <= set(record)


# -- JSON ----------------------------------------------------------------------------------------------


CHARACTERS = st.text(st.characters(exclude_categories=["Cs"]))
LEAVES = st.none() | st.booleans() | st.integers() | CHARACTERS


@given(st.recursive(LEAVES, lambda inner: st.lists(inner) | st.dictionaries(CHARACTERS, inner)))
def test_json_is_ascii_and_reads_back(value: object) -> None:
    text = render.to_json(value)
    assert text.isascii()
    assert text == json.dumps(value, indent=2) + "\n"
    assert json.loads(text) == value


def test_json_leaves_no_rubbish_for_the_collector_of_cycles() -> None:
    gc.collect()
    render.to_json({"a": [1, {"b": None}, ()], "c": {}})
    assert gc.collect() == 0


def test_json_never_holds_half_a_character() -> None:
    assert json.loads(render.to_json([os.fsdecode(b"a\xffb"), "\ud800"])) == ["a\\377b", "\\355\\240\\200"]


# -- what people read ----------------------------------------------------------------------------------

CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\u2028\u2029\ud800-\udfff]")


@given(st.text())
def test_nothing_that_moves_a_cursor_passes(text: str) -> None:
    assert not CONTROLS.search(render.escape_terminal(text))


def test_an_escape_sequence_is_shown_instead_of_done() -> None:
    assert render.escape_terminal("\x1b]0;owned\x07é\u202e") == r"\033]0;owned\007é\342\200\256"


COLUMNS = (render.Column("pid", "PID", right=True), render.Column("name", "NAME"))


def test_a_table_for_people_is_aligned() -> None:
    text = render.table([{"pid": 1, "name": "init"}, {"pid": 12345, "name": None}], COLUMNS, terminal=True)
    assert text == "  PID  NAME\n    1  init\n12345  -\n"


def test_a_table_for_programs_is_tab_separated_without_titles() -> None:
    assert render.table([{"pid": 1, "name": "a\tb\nc"}], COLUMNS, terminal=False) == "1\ta\\011b\\012c\n"


def test_wide_characters_keep_the_columns_straight() -> None:
    columns = (render.Column("name", "NAME"), render.Column("pid", "PID"))
    text = render.table([{"pid": 1, "name": "日本"}, {"pid": 2, "name": "abcde"}], columns, terminal=True)
    assert text == "NAME   PID\n日本   1\nabcde  2\n"


def test_a_table_without_rows_has_its_titles() -> None:
    assert render.table([], COLUMNS, terminal=True) == "PID  NAME\n"
    assert render.table([], COLUMNS, terminal=False) == ""


def test_info_is_aligned_and_says_sizes_for_people() -> None:
    text = render.info_text({"name": "a\nb", "size": 4096, "live": True, "dtb": None, "counters": {"reads": 1, "n": 2}})
    assert text == (
        "name:     a\\012b\nsize:     4096 (4.0 KiB)\nlive:     yes\ndtb:      -\ncounters:\n  reads: 1\n  n:     2\n"
    )


# -- instances -----------------------------------------------------------------------------------------


class FakeConnector:
    info = ConnectorInfo("raw", "/a", 10, 10, live=False, writable=False, notes=("one", "two"))


def test_an_instance_says_what_it_is_and_what_was_done_with_it() -> None:
    instance = Instance("connector", "vm", Spec("raw", "/a", {"base": "1M"}), None)
    instance.current_connector = FakeConnector()
    instance.counters.reads = 3
    record = render.instance_record(instance)
    assert record["name"] == "vm"
    assert record["kind"] == "raw"
    assert record["options"] == {"base": "1M"}
    assert record["counters"]["reads"] == 3
    assert json.loads(render.to_json(record)) == record
    assert "notes:      one\n            two\n" in render.info_text(record)


# -- names ---------------------------------------------------------------------------------------------


def is_a_name(name: str) -> bool:
    raw = name.encode()
    return 0 < len(raw) <= 255 and b"/" not in raw and b"\0" not in raw and raw not in (b".", b"..")


@given(st.binary(max_size=400) | st.text(max_size=400))
def test_every_name_is_one_that_a_file_can_have(raw: str | bytes) -> None:
    assert is_a_name(render.file_name(raw))
    assert is_a_name(render.file_name(raw, "#4294967295"))
    assert not CONTROLS.search(render.file_name(raw))


@given(st.binary(max_size=60))
def test_names_are_reversible(raw: bytes) -> None:
    assert render.unescape_file_name(render.file_name(raw)) == raw


@given(st.binary(max_size=60))
def test_names_from_text_are_those_of_its_bytes(raw: bytes) -> None:
    assert render.file_name(os.fsdecode(raw)) == render.file_name(raw)


@pytest.mark.parametrize(
    ("raw", "name"),
    [
        ("kworker/0:1", "kworker%2F0:1"),
        (".", "%2E"),
        ("..", "%2E%2E"),
        ("...", "..."),
        ("", "%"),
        ("100%", "100%25"),
        (b"\xff", "%FF"),
        ("a\nb", "a%0Ab"),
        ("ls -l", "ls -l"),
        ("é日", "é日"),
        ("\x1b[2J", "%1B[2J"),
    ],
)
def test_names_are_escaped_as_documented(raw: str | bytes, name: str) -> None:
    assert render.file_name(raw) == name


def test_a_long_name_is_cut_and_its_hash_tells_it_from_its_like() -> None:
    one, two = render.file_name("é" * 200 + "a"), render.file_name("é" * 200 + "b")
    assert one != two
    assert max(len(one.encode()), len(two.encode())) <= 255
    assert re.fullmatch(r"é+~[0-9a-f]{16}", one)


def test_a_cut_leaves_no_half_escape() -> None:
    for length in range(230, 245):
        name = render.file_name("x" * length + "\n" * 40)
        assert is_a_name(name)
        render.unescape_file_name(name)
        assert re.fullmatch(r"x+(%0A)*~[0-9a-f]{16}", name)
