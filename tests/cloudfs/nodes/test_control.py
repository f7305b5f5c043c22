"""The files `new`, byte by byte as programs write to them."""

from __future__ import annotations

import threading

import pytest
from tree import SCRATCH, at, names, open_at, read, text

from cloudfs.nodes.files.control import OpenControl
from cloudfs.nodes.results import Results
from cloudfs.nodes.root import build_root
from engine.errors import (
    AlreadyExistsError,
    InvalidArgumentError,
    PluginError,
    TargetTimeoutError,
)
from engine.machine import Machine


@pytest.fixture
def tree():
    with Machine() as machine:
        yield build_root(machine)


def content(file, size=1 << 20):
    return bytes(file.read(0, size, SCRATCH)).decode()


def test_echo_opens_an_instance(tree):
    # bash: open, dup2 and close of the first descriptor (a flush), write, close
    file = open_at(tree, "connector/new")
    file.flush()
    line = b"vm dummy:size=1M\n"
    assert file.write(0, line) == len(line)
    file.flush()
    file.release()
    assert "vm" in names(tree, "connector")


def test_where_the_write_lands_does_not_matter(tree):
    # echo >> new arrives at the offset of st_size
    assert open_at(tree, "connector/new").write(12345, b"vm dummy\n") == 9
    assert "vm" in names(tree, "connector")


def test_the_write_that_brings_the_newline_runs_the_command(tree):
    file = open_at(tree, "connector/new")
    for part in (b"vm", b" du", b"mmy"):
        assert file.write(0, part) == len(part)
        assert "vm" not in names(tree, "connector")
    assert file.write(0, b"\n") == 1
    assert "vm" in names(tree, "connector")


def test_a_rest_without_newline_runs_when_the_descriptor_is_closed(tree):
    file = open_at(tree, "connector/new")
    file.write(0, b"vm dummy")
    assert "vm" not in names(tree, "connector")
    file.flush()
    assert "vm" in names(tree, "connector")
    file.flush()


def test_a_failing_rest_fails_the_close_once(tree):
    file = open_at(tree, "connector/new")
    file.write(0, b"vm nosuchplugin")
    with pytest.raises(PluginError):
        file.flush()
    file.flush()


def test_a_failing_command_fails_the_write_with_its_own_error(tree):
    file = open_at(tree, "connector/new")
    with pytest.raises(PluginError, match="nosuch"):
        file.write(0, b"vm nosuch\n")


def test_a_line_written_twice_after_it_failed_runs_once(tree):
    # Python writes a failed line again when the file is closed
    runs = []

    def run(line):
        runs.append(line)
        raise InvalidArgumentError("no")

    file = OpenControl(run, lambda: iter(()), Results())
    for _ in range(3):
        with pytest.raises(InvalidArgumentError):
            file.write(0, b"vm x\n")
    file.flush()
    assert runs == ["vm x"]


def test_of_several_lines_those_before_the_failing_one_count_as_written(tree):
    file = open_at(tree, "connector/new")
    first = b"one dummy\n"
    assert file.write(0, first + b"one dummy\n" + b"three dummy\n") == len(first)
    with pytest.raises(AlreadyExistsError):
        file.write(len(first), b"one dummy\nthree dummy\n")
    assert names(tree, "connector") == ["new", "one"]


def test_a_comment_before_the_failing_line_counts_too(tree):
    file = open_at(tree, "connector/new")
    assert file.write(0, b"# hello\n\nvm nosuch\n") == len(b"# hello\n\n")
    with pytest.raises(PluginError):
        file.write(0, b"vm nosuch\n")


def test_a_failing_line_that_an_earlier_write_began_gives_its_error(tree):
    file = open_at(tree, "connector/new")
    file.write(0, b"vm no")
    with pytest.raises(PluginError, match="nosuch"):
        file.write(0, b"such\nb dummy\n")
    assert names(tree, "connector") == ["new"]


def test_after_a_failure_good_lines_do_not_run_on_that_descriptor_and_do_on_another(tree):
    file = open_at(tree, "connector/new")
    with pytest.raises(PluginError):
        file.write(0, b"vm nosuch\n")
    with pytest.raises(PluginError):
        file.write(0, b"vm dummy\n")
    assert names(tree, "connector") == ["new"]
    open_at(tree, "connector/new").write(0, b"vm dummy\n")
    assert names(tree, "connector") == ["new", "vm"]


def test_descriptors_do_not_share_a_buffer(tree):
    one, two = open_at(tree, "connector/new"), open_at(tree, "connector/new")
    one.write(0, b"a du")
    two.write(0, b"b du")
    one.write(0, b"mmy\n")
    two.write(0, b"mmy\n")
    assert names(tree, "connector") == ["new", "a", "b"]


def test_an_editor_may_write_back_what_it_has_read(tree):
    open_at(tree, "connector/new").write(0, b"vm dummy\n")
    for path in ("connector/new", "os/new"):
        file = open_at(tree, path)
        shown = text(tree, path).encode()
        assert file.write(0, shown) == len(shown)
        file.flush()
    assert names(tree, "connector") == ["new", "vm"]


def test_everything_printed_is_a_comment_also_what_a_hostile_line_says(tree):
    file = open_at(tree, "connector/new")
    with pytest.raises(InvalidArgumentError):
        file.write(0, b"x dummy:\x1b]0;evil\x07\r\xff\n")
    for line in content(file).splitlines():
        assert line.startswith("#")
        assert line.isprintable()


def test_the_text_says_how_what_there_is_and_what_is_open(tree):
    open_at(tree, "connector/new").write(0, b"vm dummy:size=2M\n")
    shown = text(tree, "connector/new")
    for word in ("NAME [-c PARENT] PLUGIN", "dummy", "made memory", "raw", "vm", "dummy:size=2M", "rmdir"):
        assert word in shown
    assert "auto" in text(tree, "os/new")
    assert "native" in text(tree, "os/new")


def test_a_descriptor_that_has_written_reads_its_own_result_and_a_fresh_one_the_last(tree):
    one, two = open_at(tree, "connector/new"), open_at(tree, "connector/new")
    one.write(0, b"a dummy\n")
    with pytest.raises(PluginError):
        two.write(0, b"b nosuch\n")
    assert "connector/a is open" in content(one)
    assert "failed: b nosuch" in content(two)
    assert "failed: b nosuch" in text(tree, "connector/new")


def test_a_text_read_in_pieces_is_one_text(tree):
    file = open_at(tree, "connector/new")
    whole = content(file)
    file = open_at(tree, "connector/new")
    pieces = b"".join(bytes(file.read(at, 7, SCRATCH)) for at in range(0, len(whole.encode()) + 7, 7))
    assert pieces.decode() == whole


def test_who_begins_to_read_further_back_reads_what_stands_there(tree):
    whole = content(open_at(tree, "connector/new")).encode()
    assert bytes(open_at(tree, "connector/new").read(10, 50, SCRATCH)) == whole[10:60]


def test_reading_shows_a_command_that_runs():
    begun, go_on = threading.Event(), threading.Event()

    def run(line):
        begun.set()
        assert go_on.wait(10)
        return "done at last"

    results = Results()
    writer = OpenControl(run, lambda: iter(()), results)
    thread = threading.Thread(target=writer.write, args=(0, b"vm slow\n"))
    thread.start()
    assert begun.wait(10)
    assert "running for 0 s: vm slow" in content(writer)
    assert "running for 0 s: vm slow" in content(OpenControl(run, lambda: iter(()), results))
    with pytest.raises(TargetTimeoutError):
        writer.write(0, b"x dummy\n")
    writer.flush()
    go_on.set()
    thread.join(10)
    assert "done at last" in content(writer)


def test_a_bug_in_a_plugin_is_told_and_raised():
    def run(line):
        raise ZeroDivisionError("oops")

    results = Results()
    file = OpenControl(run, lambda: iter(()), results)
    with pytest.raises(ZeroDivisionError):
        file.write(0, b"vm x\n")
    assert "a bug, ZeroDivisionError: oops" in content(file)
    assert results.running() == []


def test_a_line_without_end_is_refused(tree):
    file = open_at(tree, "connector/new")
    for _ in range(16):
        file.write(0, b"x" * 4096)
    with pytest.raises(InvalidArgumentError, match="64 KiB"):
        file.write(0, b"x")


@pytest.mark.parametrize(
    ("path", "line", "error"),
    [
        ("connector/new", b"new dummy\n", InvalidArgumentError),
        ("os/new", b"processes native\n", InvalidArgumentError),
        ("os/new", b"proc native\n", InvalidArgumentError),
        ("connector/new", b"a/b dummy\n", InvalidArgumentError),
        ("connector/new", b".. dummy\n", InvalidArgumentError),
        ("connector/new", b"dummy\n", InvalidArgumentError),
        ("connector/new", b"vm dummy:size=\n", InvalidArgumentError),
        ("connector/new", b"vm native\n", PluginError),
        ("connector/new", b"v\0m dummy\n", InvalidArgumentError),
    ],
)
def test_lines_that_make_no_sense_are_refused_with_a_sentence(tree, path, line, error):
    file = open_at(tree, path)
    with pytest.raises(error):
        file.write(0, line)
    assert "failed: " in content(file)


def test_it_takes_commands_may_wait_and_is_writable_by_its_owner(tree):
    node = at(tree, "connector/new")
    assert node.takes_commands
    assert node.attributes().mode & 0o777 == 0o644
    assert node.open(0).may_block
    assert node.open(0).read_nowait(0, 10, SCRATCH) is None
    assert read(node.open(0), 0, 10)


def test_windows_line_ends_are_taken(tree):
    open_at(tree, "connector/new").write(0, b"vm dummy\r\n")
    assert "vm" in names(tree, "connector")
