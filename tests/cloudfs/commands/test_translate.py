"""cloudfs translate, pagetree, and the file phys_maps, on an image whose page tables are written by hand."""

from __future__ import annotations

import json

import pytest
from commandline import cloudfs, in_process, sentence
from hand_made_tables import DTB, LARGE, LAST, USER, image
from tree import names, text

from cloudfs.nodes.root import build_root
from engine.machine import Machine
from engine.targets import chain_of, open_chain


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    path = tmp_path_factory.mktemp("images") / "memory.raw"
    path.write_bytes(image())
    return ["-c", f"raw:{path}", "-o", f"raw-dtb:dtb={DTB:#x},arch=x86-64"]


def test_an_address_is_printed_with_frame_page_and_permissions(chain):
    done = cloudfs("translate", *chain, "1", hex(USER + 0x1234))
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode().split("\t")[:4] == [hex(USER + 0x1234), "0x36234", "4096", "rwxu-"]


def test_several_addresses_come_as_json(chain):
    done = in_process("translate", *chain, "kernel", f"{LARGE + 5:#x},{LAST:#x}", "--json")
    one, two = json.loads(done.stdout)
    assert (one["physical"], one["page_size"], one["level"]) == ("0x400005", 1 << 21, 2)
    assert (two["physical"], two["permissions"], two["flags"]) == ("0x41000", "rwx-g", ["global"])
    assert one.keys() == two.keys() >= {"address", "entry", "entry_address", "fault", "module"}


def test_addresses_come_from_standard_input(chain):
    done = cloudfs("translate", *chain, "1", "-", standard_input=f"{USER:#x}\n\n{LARGE:#x}\n".encode())
    assert len(done.stdout.splitlines()) == 2


def test_an_absent_address_is_said_and_exits_with_4(chain):
    done = in_process("translate", *chain, "1", hex(USER + 0x8000), "--json")
    assert done.returncode == 4
    assert "nothing is mapped" in json.loads(done.stdout)[0]["fault"]
    assert b"1 of 1 addresses lie nowhere" in done.stderr


def test_a_walk_shows_each_entry(chain):
    done = in_process("translate", *chain, "1", "--walk", hex(USER), "--json")
    rows = json.loads(done.stdout)
    assert [row["entry"] for row in rows] == ["0x2007", "0x3007", "0x4007", "0x37007"]
    assert [row["kind"] for row in rows] == ["table", "table", "table", "4K"]


def test_the_reverse_finds_who_maps_a_frame(chain):
    done = in_process("translate", *chain, "1", "--reverse", "0x36007", "--json")
    assert json.loads(done.stdout) == [{"physical": "0x36007", "address": hex(USER + 0x1007)}]
    assert in_process("translate", *chain, "1", "--reverse", "0x1000").returncode == 4


def test_a_process_of_this_machine_has_no_page_tables_to_show():
    done = in_process("translate", "1", "0x1000")
    assert done.returncode == 1
    assert "page tables" in sentence(done)


def test_info_of_an_image_that_nobody_writes_says_that_its_system_is_not_live(chain):
    record = json.loads(in_process("info", *chain, "--json").stdout)
    assert record["connector"]["live"] is record["os"]["live"] is False


@pytest.mark.parametrize("command", ["dmesg", "lsof", "netstat"])
def test_what_a_system_does_not_show_is_said_with_where_the_reason_stands(chain, command):
    done = in_process(command, *chain)
    assert done.returncode == 1
    assert sentence(done).endswith("; the notes of `cloudfs info` say why")


def test_pagetree_counts_pages_by_size_and_permission(chain):
    done = in_process("pagetree", *chain, "1", "--json")
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    found = {(row["page_size"], row["permissions"]): (row["pages"], row["bytes"]) for row in summary["pages"]}
    assert found == {
        (4096, "rwxu-"): (8, 0x8000),
        (4096, "r--u-"): (1, 0x1000),
        (1 << 21, "rwxu-"): (1, 1 << 21),
        (4096, "rwx-g"): (1, 0x1000),
    }
    assert summary["mapped"] == 0xA000 + (1 << 21)
    assert summary["tables"]["read"] >= 7
    assert summary["tables"]["unreadable"] == []
    assert summary["largest"][0]["start"] == hex(LARGE)


def test_pagetree_prints_tables_for_people(chain):
    done = cloudfs("pagetree", *chain, "kernel", "--top", "1")
    assert done.returncode == 0
    assert f"{1 << 21}\trwxu-\t1\t{1 << 21}" in done.stdout.decode()


def test_phys_maps_stand_in_the_process_s_directory(chain):
    with Machine() as machine:
        open_chain(machine, chain_of(None, [("connector", chain[1]), ("oslayer", chain[3])]))
        root = build_root(machine)
        process = "os/raw-dtb/processes/1"
        assert "phys_maps" in names(root, process)
        lines = text(root, f"{process}/phys_maps").splitlines()
    assert lines[0] == f"{USER:016x}-{USER + 4096:016x} rwxu- 000000037000   4K"
    assert lines[-1] == f"{LAST:016x}-10000000000000000 rwx-g 000000041000   4K"
    assert len(lines) == 11
