"""`engine.records.dataclass`: classes that are made at once and completed on first use, as the standard makes them."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import inspect
import pickle
import pkgutil
import threading
from dataclasses import field
from typing import ClassVar, Generic, TypeVar

import pytest

import cloudfs
import engine
from engine.records import _Later, dataclass

T = TypeVar("T")


@dataclass(frozen=True, slots=True, order=True)
class Point:
    """Two numbers, and what is not compared."""

    x: int
    y: int = 0
    words: list[str] = field(default_factory=list, hash=False, compare=False)
    origin: ClassVar[str] = "here"

    @property
    def sum(self) -> int:
        return self.x + self.y


@dataclass(frozen=True, slots=True)
class Named(Point):
    """Derived."""

    name: str = ""


@dataclass(slots=True)
class Open(Generic[T]):
    """May be changed."""

    value: T
    count: int = 0

    def __post_init__(self) -> None:
        self.count += 1


def is_complete(kind: type) -> bool:
    return not any(isinstance(value, _Later) for value in vars(kind).values())


def test_methods_are_made_when_one_is_first_used():
    @dataclass(frozen=True, slots=True)
    class Fresh:
        x: int

    assert not is_complete(Fresh)
    assert Fresh(1).x == 1
    assert is_complete(Fresh)


@pytest.mark.parametrize(
    "use",
    [dataclasses.fields, inspect.signature, lambda kind: kind.__match_args__, dataclasses.is_dataclass,
     lambda kind: kind(1), lambda kind: kind.__eq__],
)  # fmt: skip
def test_whatever_is_asked_first_is_answered(use):
    @dataclass(frozen=True, slots=True)
    class Fresh:
        x: int

    assert use(Fresh)
    assert is_complete(Fresh)


def test_it_prints_compares_orders_and_hashes_as_the_standard_s():
    assert repr(Point(1, 2)) == "Point(x=1, y=2, words=[])"
    assert Point(1, 2, ["a"]) == Point(1, 2)
    assert Point(1) < Point(1, 1) < Point(2)
    assert hash(Point(1, 2)) == hash(Point(1, 2, ["a"]))
    assert Point(1) != Named(1)
    assert {Point(1): "one"}[Point(1)] == "one"


def test_the_signature_is_that_of_the_fields():
    assert str(inspect.signature(Named)).startswith("(x: 'int', y: 'int' = 0, words: 'list[str]' = ")


def test_a_frozen_one_cannot_be_changed():
    point = Point(1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        point.x = 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        del point.y
    with pytest.raises(AttributeError):
        point.z = 3
    assert point == Point(1)


def test_one_that_may_be_changed_is_and_has_no_hash():
    one = Open(5)
    one.value = 6
    assert (one.value, one.count, one.sum if hasattr(one, "sum") else None) == (6, 1, None)
    assert Open.__hash__ is None
    with pytest.raises(AttributeError):
        one.other = 1


def test_fields_may_be_replaced_matched_copied_and_pickled():
    point = Named(1, 2, ["a"], "n")
    assert dataclasses.replace(point, y=3) == Named(1, 3, ["a"], "n")
    assert dataclasses.asdict(point) == {"x": 1, "y": 2, "words": ["a"], "name": "n"}
    match point:
        case Named(x, y):
            assert (x, y) == (1, 2)
    assert copy.deepcopy(point) == pickle.loads(pickle.dumps(point)) == point


def test_defaults_are_made_anew_and_class_variables_are_no_fields():
    assert Point(1).words is not Point(1).words
    assert Point.origin == "here"
    assert [one.name for one in dataclasses.fields(Point)] == ["x", "y", "words"]


def test_threads_that_come_at_once_find_it_whole():
    for _ in range(20):

        @dataclass(frozen=True, slots=True)
        class Fresh:
            x: int
            y: int = 1

        made: list[object] = []
        start = threading.Barrier(8)

        def make(kind=Fresh, made=made, start=start):
            start.wait(10)
            made.append(kind(1))

        threads = [threading.Thread(target=make) for _ in range(8)]
        for one in threads:
            one.start()
        for one in threads:
            one.join(10)
        assert made == [Fresh(1)] * 8


def kinds() -> list[type]:
    """Every class of ours that waits to be completed, or was."""
    found: dict[type, None] = {}
    for package in (engine, cloudfs):
        for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if info.name.endswith("__main__"):
                continue
            module = importlib.import_module(info.name)
            found |= dict.fromkeys(
                kind for kind in vars(module).values()
                if isinstance(kind, type) and kind.__module__ == info.name and hasattr(kind, "__dataclass_fields__")
            )  # fmt: skip
    return list(found)


def test_every_record_of_ours_is_one_that_the_standard_makes():
    """What is wrong in a declaration would be said at its first use alone."""
    found = kinds()
    assert len(found) > 100
    for kind in found:
        assert is_complete(kind), kind
        names = [one.name for one in dataclasses.fields(kind) if one.init]
        assert list(inspect.signature(kind).parameters) == names, kind
