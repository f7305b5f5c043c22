"""Text files: sizes that agree with bytes, snapshots, what cannot be read."""

from __future__ import annotations

import pytest
from fake_os import Life, fake_machine
from tree import at, open_at, read, read_all

from cloudfs.nodes import kept
from cloudfs.nodes.contexts import InstanceContext
from cloudfs.nodes.files import text as text_files
from cloudfs.nodes.files.text import TextFile
from cloudfs.nodes.kept import Kept
from cloudfs.nodes.root import build_root
from engine.chain import Spec
from engine.errors import AccessDeniedError, ConnectorClosedError, ProcessExitedError
from engine.machine import Instance


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    fresh = Kept(clock=clock)
    monkeypatch.setattr(kept, "KEPT", fresh)
    monkeypatch.setattr(text_files, "KEPT", fresh)
    return clock


@pytest.fixture
def context():
    instance = Instance("oslayer", "x", Spec("x"), None, opened_live=True)
    instance.current_layer = object()
    return InstanceContext.of(instance)


def counting(context, **options):
    made = []

    def make():
        made.append(len(made))
        return "x" * len(made) + "\n"

    return TextFile(context, "file", make, **options), made


def test_the_size_that_stat_tells_is_that_of_the_bytes_that_the_next_open_reads(clock, context):
    file, _ = counting(context)
    size = file.attributes().size
    clock.now += 0.9
    assert len(read_all(file)) == size


def test_whoever_opens_while_the_kernel_believes_a_size_gets_bytes_of_that_size(clock, context):
    # stat at any moment; the kernel believes it for `timeout`; open at any moment in between
    file, _ = counting(context)
    for step in range(200):
        size = file.attributes().size
        clock.now += file.timeout * (step % 10) / 10
        assert len(read_all(file)) == size
        clock.now += 0.07


def test_a_rendering_is_never_older_than_a_second(clock, context):
    file, made = counting(context)
    file.attributes()
    clock.now += 1.01
    assert read_all(file) == b"xx\n"
    clock.now += 0.46
    assert file.attributes().size == 4
    assert len(made) == 3


def test_two_nodes_of_one_identity_share_a_rendering(clock, context):
    one, made = counting(context)
    two, made_too = counting(context)
    assert one.identity == two.identity
    one.attributes()
    read_all(two)
    assert made == [0]
    assert made_too == []


def test_an_open_file_is_a_snapshot(clock, context):
    file, _ = counting(context)
    opened = file.open(0)
    clock.now += 5
    read_all(file)
    assert read(opened, 0, 1) == b"x"
    assert read(opened, 1, 10) == b"\n"
    assert read(opened, 2, 10) == b""


def test_an_unsized_file_is_rendered_for_nobody_but_readers(clock, context):
    file, made = counting(context, sized=False)
    assert file.attributes().size == 0
    assert made == []
    assert read_all(file) == b"x\n"
    assert read_all(file) == b"xx\n"


def test_text_files_are_direct_so_that_snapshots_never_mix(clock, context):
    assert TextFile(context, "file", lambda: "x").open(0).direct_io


def test_bytes_that_are_no_text_are_kept(clock, context):
    assert read_all(TextFile(context, "a", lambda: b"\xff\0\n")) == b"\xff\0\n"
    assert read_all(TextFile(context, "b", lambda: "\udcff\n")) == b"\xff\n"


@pytest.mark.parametrize("error", [AccessDeniedError("no"), OSError(5, "broken")])
def test_what_cannot_be_read_is_there_and_says_why_when_opened(clock, context, error):
    def make():
        raise error

    file = TextFile(context, "file", make)
    assert file.attributes().size == 0
    with pytest.raises(type(error)):
        file.open(0)


@pytest.mark.parametrize("error", [ProcessExitedError(1), ConnectorClosedError("gone")])
def test_what_is_gone_has_no_attributes(clock, context, error):
    def make():
        raise error

    with pytest.raises(type(error)):
        TextFile(context, "file", make).attributes()


def test_a_file_of_a_removed_instance_is_gone(monkeypatch):
    with fake_machine(monkeypatch) as (machine, layer):
        layer.table[1] = Life()
        root = build_root(machine)
        node, info = at(root, "os/fake/info"), at(root, "os/fake/processes/1/info")
        assert read_all(node)
        machine.remove("oslayer", "fake")
        for gone in (node, info):
            with pytest.raises(ConnectorClosedError):
                gone.attributes() if gone is node else gone.open(0)


# -- what is kept ----------------------------------------------------------------------------------------


def test_what_was_dear_is_kept_longer_than_what_was_cheap(context):
    clock = Clock()
    store = Kept(clock=clock)
    made = []

    def make(cost):
        clock.now += cost
        made.append(cost)
        return cost

    def ask(key, cost):
        return store.get(context.instance, key, lambda: make(cost))

    ask("cheap", 0.001), ask("dear", 0.01)
    clock.now += 0.1
    ask("cheap", 0.001), ask("dear", 0.01)
    assert made == [0.001, 0.01, 0.001]


def test_nothing_over_a_live_target_is_kept_longer_than_a_second(context):
    clock = Clock()
    store = Kept(clock=clock)

    def make():
        clock.now += 3600
        return clock.now

    first = store.get(context.instance, "key", make)
    clock.now += 0.99
    assert store.get(context.instance, "key", make) == first
    clock.now += 0.02
    assert store.get(context.instance, "key", make) != first


def test_what_cannot_change_is_kept_for_good(context):
    clock = Clock()
    store = Kept(clock=clock)
    context.instance.opened_live = False
    first = store.get(context.instance, "key", object)
    clock.now += 1e6
    assert store.get(context.instance, "key", object) is first


def test_what_is_kept_is_bounded_and_the_oldest_goes_first(context):
    store = Kept(budget=100_000)
    for number in range(1000):
        store.store(context.instance, number, number, 1000)
    there = [number for number in range(1000) if store.find(context.instance, number)]
    assert there == list(range(1000 - len(there), 1000))
    assert 50 < len(there) < 100


def test_one_huge_thing_is_not_kept(context):
    store = Kept(budget=100_000)
    assert store.store(context.instance, "key", "value", 99_000) == "value"
    assert store.find(context.instance, "key") is None


def test_of_two_made_at_one_time_the_first_is_kept(context):
    store = Kept()
    assert store.store(context.instance, "key", "first", lifetime=1) == "first"
    assert store.store(context.instance, "key", "second", lifetime=1) == "first"


def test_nothing_is_kept_of_what_was_removed(context):
    store = Kept()
    store.store(context.instance, "key", "value")
    context.instance.current_layer = None
    store.store(None, "other", "value")
    assert store.find(context.instance, "key") is None
    store.store(context.instance, "key", "value")
    assert store.find(context.instance, "key") is None


def test_info_and_its_twin_agree(monkeypatch):
    with fake_machine(monkeypatch) as (machine, layer):
        layer.table[1] = Life(name="one\n")
        root = build_root(machine)
        assert "name:          one\\012\n" in read_all(at(root, "os/fake/processes/1/info")).decode()
        assert b'"name": "one\\n"' in read_all(at(root, "os/fake/processes/1/info.json"))
        assert read(open_at(root, "os/fake/info"), 0, 20).startswith(b"name:")
