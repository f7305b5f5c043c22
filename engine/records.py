"""`dataclass`, which makes a class's methods when one of them is first used.

    from engine.records import dataclass        # in place of that from dataclasses; `field`, `replace` stay there

    @dataclass(frozen=True, slots=True)
    class Extent: ...

The standard one writes and compiles six functions for each class, which takes 0.3 to 0.6 ms: as long as importing a
small module. A command imports some 130 of these classes and uses a quarter of them. Here a class with slots is made
at once, without those functions; whoever first looks for one of them (makes an object, prints or compares it, asks for
its fields) has the standard `dataclass` make them all, word for word what it would have made.
"""

from __future__ import annotations

import dataclasses
from threading import RLock
from typing import TYPE_CHECKING, Any

_ORDER = ("__lt__", "__le__", "__gt__", "__ge__")
_ALWAYS = ("__init__", "__repr__", "__match_args__", "__dataclass_fields__", "__dataclass_params__", "__signature__")
_OWN_WAY = ("__init__", "__repr__", "__eq__", "__hash__", "__setattr__", "__delattr__", "__getstate__", "__slots__")
"""A class that says one of these itself is left to the standard."""
_LOCK = RLock()
"""Reentrant: making a class makes what it is derived from."""


class _Later:
    """Stands for what is made of a class when it is first asked for."""

    __slots__ = ("made", "name")

    def __init__(self, name: str, made: _Made) -> None:
        self.name = name
        self.made = made

    def __get__(self, instance: object, owner: type) -> Any:
        self.made.complete()
        return getattr(owner if instance is None else instance, self.name)


class _Made:
    """A class with slots, and what its methods are made from."""

    __slots__ = ("options", "plain", "slotted")

    def __init__(self, plain: type, options: dict[str, Any]) -> None:
        self.plain: type | None = plain
        self.options = options
        body = dict(plain.__dict__)
        kinds = {name: str(kind).partition("[")[0] for name, kind in body.get("__annotations__", {}).items()}
        own = [name for name, kind in kinds.items() if "ClassVar" not in kind]
        inherited = {name for base in plain.__mro__[1:-1] for name in getattr(base, "__slots__", ())}
        for name in (*own, "__dict__", "__weakref__"):
            body.pop(name, None)
        body["__slots__"] = tuple(name for name in own if name not in inherited)
        body |= {name: _Later(name, self) for name in self._names()}
        if options.get("frozen"):
            body |= {"__setattr__": _refuse, "__delattr__": _refuse}
        elif options.get("eq", True):
            body["__hash__"] = None
        self.slotted: type = type(plain)(plain.__name__, plain.__bases__, body)
        self.slotted.__qualname__ = plain.__qualname__

    def _names(self) -> tuple[str, ...]:
        equal, frozen = self.options.get("eq", True), self.options.get("frozen")
        return (
            *_ALWAYS,
            *(_ORDER if self.options.get("order") else ()),
            *(("__eq__",) if equal else ()),
            *(("__hash__",) if equal and frozen else ()),
            *(("__getstate__", "__setstate__") if frozen else ()),
        )

    def complete(self) -> None:
        """Put into the class what the standard makes of it."""
        with _LOCK:
            if self.plain is None:
                return
            made: type = dataclasses.dataclass(**self.options)(self.plain)
            for name in self._names():
                if name in made.__dict__:
                    setattr(self.slotted, name, made.__dict__[name])
                else:
                    delattr(self.slotted, name)
            self.plain = None


def _refuse(self: object, name: str, *_: object) -> None:
    raise dataclasses.FrozenInstanceError(f"{name!r} of a {type(self).__name__} cannot be set: it is a record")


if TYPE_CHECKING:
    from dataclasses import dataclass as dataclass
else:

    def dataclass(**options: Any) -> Any:
        """As `dataclasses.dataclass`, which says what the options mean; with `slots`, methods are made on first use."""

        def decorated(plain: type) -> type:
            if not options.get("slots") or any(name in plain.__dict__ for name in _OWN_WAY):
                return dataclasses.dataclass(**options)(plain)
            return _Made(plain, options).slotted

        return decorated
