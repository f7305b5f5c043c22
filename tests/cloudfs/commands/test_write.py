"""cloudfs write: what the program itself then sees, and what is refused."""

from __future__ import annotations

import json

import pytest
from commandline import cloudfs, in_process, sentence
from targets import running_target

from engine.connectors.dummy import made_bytes


@pytest.fixture
def target():
    with running_target(b"0123456789abcdef") as found:
        yield found


def test_the_program_sees_what_was_written_and_nothing_else(target):
    done = in_process("write", "--writable", str(target.pid), hex(target.counter), "2a00000000000000")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    number, secret = target.ask()
    assert number == 42
    assert secret.startswith(b"0123456789abcdef\0")


@pytest.mark.parametrize("data", ["414243", "41 42 43", "0x414243", "41\n42\t43"])
def test_data_may_be_written_in_every_way(target, data):
    assert in_process("write", str(target.pid), hex(target.secret + 2), data, "--writable").returncode == 0
    assert target.ask()[1].startswith(b"01ABC56789abcdef\0")


def test_standard_input_is_written(target):
    done = cloudfs(
        "write", "--writable", "--json", str(target.pid), hex(target.pattern), "-", standard_input=b"x" * 1048576
    )
    assert json.loads(done.stdout) == {"address": hex(target.pattern), "written": 1048576}
    read = in_process("read", str(target.pid), hex(target.pattern), "1M")
    assert read.stdout == b"x" * 1048576


def test_without_writable_nothing_is_written(target):
    before = target.ask()
    done = in_process("write", str(target.pid), hex(target.secret), "00")
    assert done.returncode == 2
    assert "--writable" in sentence(done)
    assert target.ask() == before


def test_an_image_is_written_to_in_place(tmp_path):
    image = tmp_path / "image"
    image.write_bytes(made_bytes(0, 8192))
    assert in_process("write", "--writable", str(image), "physical", "4K", "00112233").returncode == 0
    assert image.read_bytes() == made_bytes(0, 4096) + bytes.fromhex("00112233") + made_bytes(4100, 8192 - 4100)


@pytest.mark.parametrize(("address", "written"), [(8190, 2), (8192, 0), (1 << 40, 0)])
def test_a_write_that_stops_early_says_how_much_was_written(tmp_path, address, written):
    image = tmp_path / "image"
    image.write_bytes(bytes(8192))
    done = in_process("write", "--writable", "--json", str(image), "physical", str(address), "ffffffff")
    assert done.returncode == 1
    assert json.loads(done.stdout)["written"] == written
    assert (f"only {written} bytes were" if written else "nothing was") in done.stderr.decode()
    assert image.stat().st_size == 8192
    assert image.read_bytes().count(b"\xff") == written


def test_nothing_to_write_is_no_error(target):
    before = target.ask()
    assert in_process("write", "--writable", str(target.pid), hex(target.secret), "").returncode == 0
    assert target.ask() == before


def test_an_address_where_nothing_is_mapped_is_refused(target):
    done = in_process("write", "--writable", str(target.pid), "0x10", "00")
    assert done.returncode == 1
    assert "nothing was written" in sentence(done)
