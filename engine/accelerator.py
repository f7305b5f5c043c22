"""The accelerator: a little C (`native/accelerator.c`) for what numpy is too slow for, or may not touch.

It is compiled on first use; without a compiler, or with the environment variable CLOUDFS_NO_ACCELERATOR=1, all works
without it. Its functions read mappings of files that others may cut meanwhile: what is gone then has failed, and no
signal kills the program. Python itself must not touch such a mapping.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from engine.compiled import NotCompiledError, Source, load
from engine.memory import Addresses, Pieces, Rows

log = logging.getLogger(__name__)

SWITCH = "CLOUDFS_NO_ACCELERATOR"
"""Environment variable: set to anything but 0, no or nothing, it turns the accelerator off."""
SOURCE = "accelerator.c"
_SHARED = b'#include "modes.h"'
"""What several of the files begin with: the compiler is given one text, from no folder."""
OPTIONS = ("-O2", "-pthread")
_from_buffer: Callable[..., ctypes.Array[ctypes.c_char]] = (ctypes.c_char * 1).from_buffer
_POINTER, _NUMBER = ctypes.c_void_p, ctypes.c_uint64
_T = TypeVar("_T")


class Library:
    """The loaded library. Every function takes pieces of memory as (place of their rows, count)."""

    def __init__(self, path: str) -> None:
        library = ctypes.CDLL(path)
        self.gather = library.cloudfs_gather
        """(pieces, count, addresses, count, width, out, failed) → rows that failed."""
        self.gather.argtypes = [_POINTER, _NUMBER, _POINTER, _NUMBER, _NUMBER, _POINTER, _POINTER]
        self.gather.restype = _NUMBER
        self.translate = library.cloudfs_translate
        """(pieces, count, mode, table, addresses, count, physical, page bits, kinds, rights, flags, ask) → others."""
        self.translate.argtypes = [
            _POINTER, _NUMBER, _POINTER, _NUMBER, _POINTER, _NUMBER, *[_POINTER] * 5, ctypes.c_int,
        ]  # fmt: skip
        self.translate.restype = _NUMBER
        self.tree_begin = library.cloudfs_tree_begin
        """(pieces, count, mode, tree, table, start, low, last)."""
        self.tree_begin.argtypes = [_POINTER, _NUMBER, _POINTER, _POINTER, *[_NUMBER] * 4]
        self.tree_begin.restype = None
        self.tree_walk = library.cloudfs_tree_walk
        """(pieces, count, mode, tree, capacity, columns of words, columns of bytes, ask) → rows."""
        self.tree_walk.argtypes = [_POINTER, _NUMBER, _POINTER, _POINTER, _NUMBER, _POINTER, _POINTER, ctypes.c_int]
        self.tree_walk.restype = _NUMBER
        self.tree_size: int = _size(library.cloudfs_tree_size)
        self.mode_size = library.cloudfs_mode_size
        """Bytes of a mode of so many kinds of entries."""
        self.mode_size.argtypes, self.mode_size.restype = [_NUMBER], _NUMBER


def _size(function: ctypes._NamedFuncPointer) -> int:
    function.restype = _NUMBER
    return int(function())


class Packed(threading.local):
    """Room of this thread for the arguments of a call: each costs ctypes 0.2 us, all of them packed 0.3 (measured)."""

    def __init__(self) -> None:
        self.buffer = bytearray(128)
        self.address = ctypes.addressof(_from_buffer(self.buffer))


class _Loaded:
    """What looking for it came to, once in a process."""

    lock = threading.Lock()
    tried = False
    library: Library | None = None
    reason: str | None = "nothing has asked for it yet"


def library() -> Library | None:
    """The accelerator; None where it cannot be had, which one line in the log says. Compiles it the first time."""
    if not _Loaded.tried:
        with _Loaded.lock:
            if not _Loaded.tried:
                _find()
                _Loaded.tried = True
    return _Loaded.library


def why_not() -> str | None:
    """Why there is none, or None."""
    return _Loaded.reason


def _find() -> None:
    try:
        _Loaded.library, _Loaded.reason = opened(SOURCE, Library), None
    except (NotCompiledError, OSError, AttributeError) as error:
        _Loaded.reason = str(error)
        log.info("page tables are walked without the accelerator: %s", error)


def opened(name: str, make: Callable[[str], _T]) -> _T:
    """What `make` makes of the path of one of the files in `native/`, compiled.

    Raises NotCompiledError where that is not wanted or cannot be, OSError, AttributeError.
    """
    if os.environ.get(SWITCH, "").lower() not in ("", "0", "no"):
        raise NotCompiledError(f"{SWITCH} turns it off")
    text = _text(name).replace(_SHARED, _text("modes.h"))
    return load(Source(name.removesuffix(".c"), text, OPTIONS), make)


def _text(name: str) -> bytes:
    # Not by importlib.resources, which takes 7 ms to import: numpy cannot be used out of an archive either.
    with open(os.path.join(os.path.dirname(__file__), "native", name), "rb") as file:
        return file.read()


@contextlib.contextmanager
def without() -> Iterator[None]:
    """Do without it meanwhile, in all threads: for tests and comparisons."""
    library()
    kept, _Loaded.library = _Loaded.library, None
    try:
        yield
    finally:
        _Loaded.library = kept


def place(column: npt.NDArray[np.uint64] | npt.NDArray[np.uint8]) -> int:
    """Where a column lies; keep the column for as long as the number is used."""
    try:
        return ctypes.addressof(_from_buffer(column))  # half of what the other way costs
    except (TypeError, ValueError):  # read-only, or empty
        return int(column.__array_interface__["data"][0])


def gather(found: Library, pieces: Pieces, addresses: Addresses, out: Rows) -> npt.NDArray[np.uint64]:
    """Fill row i of `out` from `addresses[i]`; gives the numbers of the rows that could not be read as a whole."""
    count, width = out.shape
    failed = np.empty(count, np.uint64)
    if not pieces.parts:
        return np.arange(count, dtype=np.uint64)
    number = found.gather(*pieces.where(), place(addresses), count, width, place(out), place(failed))
    return failed[: int(number)]
