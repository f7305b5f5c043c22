"""Which errno an error becomes."""

from __future__ import annotations

import errno
import importlib
import os
import pkgutil
from collections.abc import Iterator

import pytest

import engine
from cloudfs import errno_table
from cloudfs.errno_table import errno_of, is_bug, sentence
from engine.errors import (
    EngineError,
    FaultError,
    NotFoundError,
    PagedOutError,
    PluginError,
    ProcessExitedError,
    ReadOnlyError,
    UnsupportedError,
)


def engine_errors() -> list[type[EngineError]]:
    """All classes below EngineError that modules of `engine` define."""
    for module in pkgutil.walk_packages(engine.__path__, "engine."):
        importlib.import_module(module.name)

    def below(kind: type[EngineError]) -> Iterator[type[EngineError]]:
        for child in kind.__subclasses__():
            yield child
            yield from below(child)

    return sorted({kind for kind in below(EngineError) if kind.__module__.startswith("engine")}, key=str)


@pytest.mark.parametrize("kind", engine_errors(), ids=lambda kind: kind.__name__)
def test_every_error_of_the_engine_has_a_row_below_engine_error(kind: type[EngineError]) -> None:
    assert any(above in errno_table.ERRNO for above in kind.__mro__[: kind.__mro__.index(EngineError)])


def test_all_rows_are_errors_that_the_kernel_takes() -> None:
    assert all(0 < number <= errno_table.MAX_ERRNO for number in errno_table.ERRNO.values())
    assert errno.ENOSYS not in errno_table.ERRNO.values()


@pytest.mark.parametrize(
    ("error", "number"),
    [
        (FaultError(0x1000), errno.EIO),
        (PagedOutError(0x1000), errno.EIO),
        (NotFoundError("x"), errno.ENOENT),
        (ProcessExitedError(7), errno.ESRCH),
        (ReadOnlyError(), errno.EROFS),
        (UnsupportedError("x"), errno.EOPNOTSUPP),
        (PluginError("x", "y"), errno.ENXIO),
        (PermissionError("x"), errno.EPERM),
        (OSError(errno.EMFILE, "too many"), errno.EMFILE),
        (PermissionError(errno.EACCES, "no"), errno.EACCES),
        (TimeoutError("late"), errno.ETIMEDOUT),
        (OSError("no number"), errno.EIO),
        (RuntimeError("x"), errno.EIO),
        (EngineError("x"), errno.EIO),
        (SystemExit(3), errno.EIO),
    ],
    ids=repr,
)
def test_the_errno_of(error: BaseException, number: int) -> None:
    assert errno_of(error) == number


@pytest.mark.parametrize("number", [0, -5, 512, 9999, 1 << 40])
def test_an_errno_that_the_kernel_would_not_take_is_eio(number: int) -> None:
    assert errno_of(OSError(number, "x")) == errno.EIO


def test_enosys_never_leaves_since_the_kernel_would_stop_asking() -> None:
    assert errno_of(OSError(errno.ENOSYS, "x")) == errno.EOPNOTSUPP


def test_a_subclass_without_a_row_has_its_parents() -> None:
    class SpecialError(NotFoundError):
        pass

    assert errno_of(SpecialError("x")) == errno.ENOENT


def test_only_what_nobody_raises_on_purpose_is_a_bug() -> None:
    assert is_bug(KeyError("x"))
    assert is_bug(SystemExit(1))
    assert not is_bug(FaultError(1))
    assert not is_bug(OSError(errno.EIO, "x"))


def test_a_sentence_is_one_line_that_names_the_file() -> None:
    with pytest.raises(OSError) as caught:
        os.stat("/nonexistent/\n/x")
    assert sentence(caught.value) == "/nonexistent/ /x: No such file or directory"
    assert sentence(NotFoundError("no\nsuch")) == "no such"
    assert sentence(KeyError("x")) == "a bug, KeyError: 'x'"
    assert sentence(RuntimeError()) == "a bug, RuntimeError"
    assert sentence(NotFoundError()) == "NotFoundError"
