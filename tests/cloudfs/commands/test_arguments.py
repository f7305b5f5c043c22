"""What each word of a command line means: the table of the rules."""

from __future__ import annotations

import pytest

from cloudfs.commands._arguments import (
    Parser,
    Shape,
    UsageError,
    Words,
    add_chain_options,
    add_common_options,
    assign,
    parse,
    split_command,
)

PS = Shape(process="optional")
MAPS = Shape(process="required")
READ = Shape(process="required", rest=("ADDRESS", "LENGTH"), process_word="SPACE")
MOUNT = Shape(rest=("MOUNTPOINT",))

# shape, words, -f, -p → target, process, rest
TABLE = [
    # nothing said: this machine
    (PS, "", None, None, None, None, ""),
    # one bare word of digits is a PID, else a TARGET
    (PS, "1234", None, None, None, "1234", ""),
    (PS, "./1234", None, None, "./1234", None, ""),
    (PS, "0x10", None, None, "0x10", None, ""),
    (PS, "memory.raw", None, None, "memory.raw", None, ""),
    (PS, "raw:1234", None, None, "raw:1234", None, ""),
    (PS, "١٢٣", None, None, "١٢٣", None, ""),  # digits, but none of a PID
    # two words: TARGET, then the process, whatever they look like
    (PS, "memory.raw 12", None, None, "memory.raw", "12", ""),
    (PS, "1234 12", None, None, "1234", "12", ""),
    (PS, "memory.raw sshd", None, None, "memory.raw", "sshd", ""),
    # -f takes the place of TARGET, -p that of the process
    (PS, "", "raw", None, "./raw", None, ""),
    (PS, "", "/x/raw", None, "/x/raw", None, ""),
    (PS, "sshd", "raw", None, "./raw", "sshd", ""),
    (PS, "", None, "sshd", None, "sshd", ""),
    (PS, "1234", None, "sshd", "1234", "sshd", ""),
    (PS, "", "a:b", "12", "./a:b", "12", ""),
    # a process that cannot be left out comes first
    (MAPS, "12", None, None, None, "12", ""),
    (MAPS, "sshd", None, None, None, "sshd", ""),
    (MAPS, "memory.raw", None, "12", "memory.raw", "12", ""),
    (MAPS, "memory.raw 12", None, None, "memory.raw", "12", ""),
    (MAPS, "12", "1234", None, "./1234", "12", ""),
    # words at the end are given out before all others
    (READ, "12 0 16", None, None, None, "12", "0 16"),
    (READ, "kernel 0 16", None, None, None, "kernel", "0 16"),
    (READ, "memory.raw physical 0 16", None, None, "memory.raw", "physical", "0 16"),
    (READ, "physical 0 16", "memory.raw", None, "./memory.raw", "physical", "0 16"),
    (READ, "0 16", None, "12", None, "12", "0 16"),
    (READ, "memory.raw 0 16", None, "12", "memory.raw", "12", "0 16"),
    (MOUNT, "/mnt", None, None, None, None, "/mnt"),
    (MOUNT, "1234 /mnt", None, None, "1234", None, "/mnt"),
    (MOUNT, "/mnt", "x", None, "./x", None, "/mnt"),
]


@pytest.mark.parametrize(("shape", "words", "file", "process", "target", "found", "rest"), TABLE)
def test_words_mean(shape, words, file, process, target, found, rest):
    assert assign(words.split(), shape, file=file, process=process) == Words(target, found, tuple(rest.split()))


@pytest.mark.parametrize(
    ("shape", "words", "file", "process", "says"),
    [
        (PS, "a b c", None, None, r"3 words are too many: want \[TARGET\] \[PID\]"),
        (PS, "a b", "image", None, "-f image is the TARGET"),
        (PS, "a b", None, "12", "-p 12 is the process"),
        (MAPS, "", None, None, "PID is missing: want .*, or -p PID|NAME"),
        (MAPS, "", "image", None, "PID is missing"),
        (READ, "", None, None, "SPACE, ADDRESS and LENGTH are missing"),
        (READ, "12", None, None, "1 word came, at least 3 are wanted: .* SPACE ADDRESS LENGTH"),
        (READ, "0 16", None, None, "2 words came, at least 3 are wanted"),
        (READ, "0", None, "12", r"1 word came, at least 2 are wanted: \[TARGET\] ADDRESS LENGTH$"),
        (PS, "1 nosuch.raw", None, None, "PID comes behind TARGET, .*: write nosuch.raw 1"),
        (READ, "1 nosuch.raw 0 16", None, None, "SPACE comes behind TARGET"),
        (READ, "a b c 0 16", None, None, "too many"),
        (MOUNT, "", None, None, "MOUNTPOINT is missing"),
        (MOUNT, "a b c", None, None, "too many"),
    ],
)
def test_words_that_cannot_be_meant_are_refused(shape, words, file, process, says):
    with pytest.raises(UsageError, match=says):
        assign(words.split(), shape, file=file, process=process)


@pytest.mark.parametrize(
    ("line", "command", "rest"),
    [
        ("ps", "ps", ""),
        ("ps --json", "ps", "--json"),
        ("--json -vv ps x", "ps", "--json -vv x"),
        ("--log-file /tmp/x ps", "ps", "--log-file /tmp/x"),
        ("--log-file=/tmp/x ps", "ps", "--log-file=/tmp/x"),
        ("-f ps maps 3", "maps", "-f ps 3"),
        ("-c dummy -o auto info", "info", "-c dummy -o auto"),
        ("--json", None, "--json"),
        ("", None, ""),
        ("-- ps", None, "-- ps"),
    ],
)
def test_the_command_word_is_the_first_that_is_no_option(line, command, rest):
    assert split_command(line.split()) == (command, rest.split())


def parsed(line: str):
    parser = Parser(prog="cloudfs test")
    add_common_options(parser)
    add_chain_options(parser, process=True)
    return parse(parser, line.split())


def test_c_and_o_keep_their_order():
    chain = parsed("a -c qemu:web-01 -o linux b -c qemu --os auto").chain
    assert chain == [("connector", "qemu:web-01"), ("oslayer", "linux"), ("connector", "qemu"), ("oslayer", "auto")]


def test_a_chain_does_not_outlive_its_command_line():
    parsed("-c a")
    assert parsed("").chain == []


def test_options_may_stand_between_words():
    arguments = parsed("a --json b -vv c")
    assert arguments.words == ["a", "b", "c"]
    assert arguments.json
    assert arguments.verbose == 2


def test_behind_two_dashes_nothing_is_an_option():
    assert parsed("a -- --json -x").words == ["a", "--json", "-x"]
    assert not parsed("a -- --json").json


def test_a_lone_dash_is_a_word():
    assert parsed("a -").words == ["a", "-"]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("--nosuch", "no option --nosuch"),
        ("-x", "no option -x"),
        ("--js", "no option --js"),  # no abbreviations: tomorrow's options must not change today's scripts
        ("-p", "wants a value"),
        ("--json=3", "takes no value"),
    ],
)
def test_a_wrong_option_is_refused(line, says):
    with pytest.raises(UsageError, match=says):
        parsed(line)
