"""The command line on a terminal: widths, titles, colours, hexdump, escapes."""

from __future__ import annotations

import os
import re
import subprocess

import pytest
from commandline import on_terminal
from targets import running_target

from cloudfs.commands._output import clip
from cloudfs.commands.ps import _row
from engine.types import ProcessInfo

ESCAPE = re.compile(rb"\x1b\[[0-9;]*[A-Za-z]")


def shown(*words: str, columns: int = 80, **extra: str) -> tuple[int, bytes]:
    """The exit code, and all that a terminal of so many columns gets."""
    with on_terminal(words, columns, **extra) as terminal:
        code = terminal.finish()
        return code, bytes(terminal.shown)


def lines_of(screen: bytes) -> list[str]:
    return ESCAPE.sub(b"", screen).decode().replace("\r", "").splitlines()


def test_a_table_has_a_bold_title_and_no_line_is_wider_than_the_terminal():
    process = subprocess.Popen(["sh", "-c", "read x # " + "x" * 500], stdin=subprocess.PIPE)
    try:
        code, screen = shown("ps", columns=60)
    finally:
        process.communicate()
    lines = lines_of(screen)
    assert code == 0
    assert screen.startswith(b"\x1b[1m")
    assert lines[0].split()[:3] == ["PID", "PPID", "USER"]
    assert max(map(len, lines)) <= 60
    row = next(line for line in lines if line.split()[0] == str(process.pid))
    assert row.endswith("…")


def test_a_long_name_leaves_the_command_its_room():
    long_name = "n" * 40
    info = ProcessInfo(pid=1, name=long_name)
    assert len(_row(info, local=False, terminal=True)["name"]) == 15
    assert _row(info, local=False, terminal=False)["name"] == long_name


def test_a_terminal_gets_twelve_digits_of_a_build_id_and_the_path():
    _, screen = shown("modules", str(os.getpid()), columns=300)
    rows = [line.split() for line in lines_of(screen)[1:]]
    assert rows
    assert all(len(row[3]) <= 12 for row in rows)
    assert any(re.fullmatch("[0-9a-f]{12}", row[3]) for row in rows)


@pytest.mark.parametrize(
    ("words", "extra"), [(["--no-color"], {}), ([], {"NO_COLOR": "1"}), ([], {"TERM": "dumb"})]
)
def test_without_colour_there_is_no_escape_sequence(words, extra):
    for command in (["ps"], ["ps", "nosuch"]):
        _, screen = shown(*command, *words, **extra)
        assert b"\x1b" not in screen


def test_an_empty_no_color_means_colours():
    assert b"\x1b[1m" in shown("ps", NO_COLOR="")[1]


def test_an_error_is_red():
    code, screen = shown("ps", "nosuch")
    assert code == 1
    assert screen.startswith(b"\x1b[31mcloudfs ps:\x1b[0m there is no file 'nosuch'")


def test_read_prints_lines_as_hexdump_does():
    with running_target(b"ABCDEFGHIJKLMNOPQRSTUVWXYZ") as target:
        code, screen = shown("read", str(target.pid), hex(target.secret), "48", columns=100)
    assert code == 0
    assert lines_of(screen) == [
        f"{target.secret:08x}  41 42 43 44 45 46 47 48  49 4a 4b 4c 4d 4e 4f 50  |ABCDEFGHIJKLMNOP|",
        f"{target.secret + 16:08x}  51 52 53 54 55 56 57 58  59 5a 00 00 00 00 00 00  |QRSTUVWXYZ......|",
        f"{target.secret + 32:08x}  00 00 00 00 00 00 00 00  00 00 00 00 00 00 00 00  |................|",
        f"{target.secret + 48:08x}",
    ]


def test_a_hole_is_said_between_the_lines_around_it():
    code, screen = shown("read", "dummy:size=1M,holes=yes", "physical", "0xeff0", "0x1020", columns=200)
    lines = lines_of(screen)
    assert code == 4
    assert [line.split()[0] for line in lines] == ["0000eff0", "cloudfs", "00010000", "00010010"]


def test_raw_bytes_go_to_a_terminal_where_that_is_asked_for():
    with running_target(b"ABCDEFGH") as target:
        assert shown("read", "--raw", str(target.pid), hex(target.secret), "8")[1] == b"ABCDEFGH"


def test_maps_on_a_terminal_escape_what_could_move_its_cursor(tmp_path):
    hostile = tmp_path / "a\x1b[2Jb"
    hostile.write_bytes(bytes(4096))
    code = (
        "import mmap, sys; f = open(sys.argv[1], 'rb'); m = mmap.mmap(f.fileno(), 0, prot=mmap.PROT_READ);"
        "print('mapped', flush=True); sys.stdin.read()"
    )
    process = subprocess.Popen(
        ["python3", "-c", code, str(hostile)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"mapped\n"
        code, screen = shown("maps", str(process.pid), columns=200)
    finally:
        process.communicate()
    assert code == 0
    assert b"\x1b" not in screen
    assert b"a\\033[2Jb" in screen


def test_ctrl_c_on_a_terminal_is_130():
    with on_terminal(["read", "dummy:size=1T", "physical", "0", "1T"]) as terminal:
        terminal.wait_for(b"00000000")
        terminal.keys(b"\3")
        assert terminal.finish() == 130
        assert b"Traceback" not in terminal.shown


@pytest.mark.parametrize(
    ("line", "width", "cut"),
    [
        ("short", 10, "short"),
        ("exactly 10", 10, "exactly 10"),
        ("eleven char", 10, "eleven ch…"),
        ("漢字漢字漢字", 12, "漢字漢字漢字"),
        ("漢字漢字漢字", 11, "漢字漢字漢…"),
        ("漢字漢字漢字", 10, "漢字漢字…"),
        ("x" * 100_000, 5, "xxxx…"),
    ],
)
def test_a_line_is_cut_at_the_edge(line, width, cut):
    assert clip(line, width) == cut


def test_the_tour_names_the_shell_that_it_runs_in():
    _, screen = shown()
    assert f"cloudfs maps {os.getpid()}" in screen.decode()
