"""The words of `new`, -c and -o."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.chain import Command, Spec, parse_command, parse_spec
from engine.errors import InvalidArgumentError


@pytest.mark.parametrize(
    ("word", "spec"),
    [
        ("native", Spec("native")),
        ("qemu:web-01", Spec("qemu", "web-01")),
        ("raw:/data/a.raw", Spec("raw", "/data/a.raw")),
        ("raw:/data/a:b.raw", Spec("raw", "/data/a:b.raw")),
        ("raw:/data/a.raw:base=0x1000,map=/x.toml", Spec("raw", "/data/a.raw", {"base": "0x1000", "map": "/x.toml"})),
        ("dummy:size=5G", Spec("dummy", "", {"size": "5G"})),
        ("dummy::size=5G", Spec("dummy", "", {"size": "5G"})),
        ("raw:./a=b", Spec("raw", "./a=b")),
        ("raw:'a=b'", Spec("raw", "a=b")),
        ('raw:"/a b:c,d"', Spec("raw", "/a b:c,d")),
        ('raw:x:map="/a,b:c"', Spec("raw", "x", {"map": "/a,b:c"})),
        ("raw:/a\\:base=1", Spec("raw", "/a:base=1")),
        ("raw:x:base=", Spec("raw", "x", {"base": ""})),
        ("raw:", Spec("raw")),
        ("raw:it\\'s", Spec("raw", "it's")),
    ],
)
def test_a_word_is_a_plugin_a_target_and_options(word, spec):
    assert parse_spec(word) == spec


@given(
    st.text(st.characters(exclude_characters="\0\n", exclude_categories=["Cs"]), max_size=30),
    st.dictionaries(
        st.from_regex(r"[a-z][a-z0-9_-]{0,8}", fullmatch=True),
        st.text(st.characters(exclude_characters="\0\n", exclude_categories=["Cs"]), max_size=20),
        max_size=3,
    ),
)
def test_what_is_written_out_is_read_back(target, options):
    spec = Spec("raw", target, options)
    assert parse_spec(str(spec)) == spec
    assert parse_command(f"name -c parent {spec}") == Command("name", spec, "parent")


@pytest.mark.parametrize(
    ("line", "command"),
    [
        ("vm qemu:web-01", Command("vm", Spec("qemu", "web-01"))),
        ("web -c vm linux", Command("web", Spec("linux"), "vm")),
        ("  host\tnative ", Command("host", Spec("native"))),
        ("m raw:'/my images/a.raw'", Command("m", Spec("raw", "/my images/a.raw"))),
    ],
)
def test_a_line_names_an_instance(line, command):
    assert parse_command(line) == command


@pytest.mark.parametrize(
    "line",
    ["", "vm", "vm -c", "vm -c x", "vm qemu extra", "vm -x y qemu", "a/b native", "-x native", ".x native", "x" * 65
     + " native", "vm 'qemu", "vm qemu\\", "vm :target", "vm raw:x:base=1,base=2", "vm raw:x:base=1,nonsense",
     "vm raw:\0", "new\n native", "ü native"],
)  # fmt: skip
def test_a_wrong_line_is_an_error_that_says_so(line):
    with pytest.raises(InvalidArgumentError) as caught:
        parse_command(line)
    assert str(caught.value)
