"""LZO1X, decompression only, bounded by what must come out.

In C where there is a compiler (`native/lzo.c`, a page in 5 µs), else in Python (150 µs): both do the same.

Source: Linux Documentation/staging/lzo.rst (the format, release 6.12).
"""

from __future__ import annotations

import ctypes
import functools
import logging
from collections.abc import Callable

from engine.accelerator import opened
from engine.compiled import NotCompiledError

log = logging.getLogger(__name__)

_SHORT, _LONG = 2049, 16384
"""What is added to the distance of a match of 3 bytes after literals, and of one with 14 bits of its own."""
_AFTER_LITERALS = 4
"""State: four or more literals were copied last; 0 to 3 is how many came with the last match."""
_SOURCE = "lzo.c"
_ENDS, _MORE = "the LZO data end too early", "the LZO data hold more than {size} bytes"
_BEFORE = "the LZO data refer to bytes before their first"
_WRONG = {-1: _ENDS, -2: _MORE, -3: _BEFORE}

Function = Callable[[bytes, int, "ctypes.Array[ctypes.c_char]", int, int], int]


def decompress(packed: bytes | memoryview, size: int, most: int | None = None) -> bytes:
    """The `size` bytes that `packed` holds; with `most` at least so many of the first.

    Raises ValueError where it is damaged, or holds another number of bytes.
    """
    wanted = size + 1 if most is None else most
    function = compiled()
    made = in_python(packed, size, wanted) if function is None else in_c(function, packed, size, wanted)
    if len(made) != size and most is None:
        raise ValueError(f"the LZO data hold {len(made)} bytes, not {size}")
    return made


@functools.cache
def compiled() -> Function | None:
    """What does it in C; None where there is no compiler, or the environment variable of the accelerator forbids it."""
    try:
        function = opened(_SOURCE, ctypes.CDLL).cloudfs_lzo1x
    except (NotCompiledError, OSError, AttributeError) as error:
        log.info("pages packed by LZO are unpacked in Python: %s", error)
        return None
    function.argtypes = [ctypes.c_char_p, ctypes.c_uint64, ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint64]
    function.restype = ctypes.c_int64
    made: Function = function
    return made


def in_c(function: Function, packed: bytes | memoryview, size: int, most: int) -> bytes:
    """What comes out until there are `most` bytes. Raises ValueError where it is damaged, or has more than `size`."""
    room = ctypes.create_string_buffer(max(size, 1))
    count = function(bytes(packed), len(packed), room, size, most)
    if count < 0:
        raise ValueError(_WRONG[count].format(size=size))
    return room.raw[:count]


def in_python(packed: bytes | memoryview, size: int, most: int) -> bytes:
    """What comes out until there are `most` bytes. Raises ValueError where it is damaged, or has more than `size`."""
    data = bytes(packed)
    if not data or data[0] - 16 > len(data):
        raise ValueError(_ENDS)
    try:
        return bytes(_decompress(data, size, most))
    except IndexError:
        raise ValueError(_ENDS) from None


def _decompress(data: bytes, size: int, most: int) -> bytearray:
    """What comes out until it has `most` bytes. It is one function, since calls cost more than most instructions do."""
    out, at, state = bytearray(), 0, 0
    if data[0] > 17:
        at = data[0] - 16
        out += data[1:at]
        state = min(at - 1, _AFTER_LITERALS)
    while len(out) < most:
        code = data[at]
        at += 1
        if code >= 64:
            length, distance, state = (code >> 5) + 1, (data[at] << 3) + (code >> 2 & 7) + 1, code & 3
            at += 1
        elif code >= 16:
            wide = code >= 32
            length, at = _extended(data, at, code & (31 if wide else 7), 31 if wide else 7)
            word = data[at] | data[at + 1] << 8
            at, length, state = at + 2, length + 2, word & 3
            distance = (word >> 2) + 1
            if not wide:
                distance += ((code & 8) << 11) + _LONG - 1
                if distance == _LONG:
                    return out
        elif state:
            far = state == _AFTER_LITERALS
            length, distance = 3 if far else 2, (code >> 2) + (data[at] << 2) + (_SHORT if far else 1)
            at, state = at + 1, code & 3
        else:
            length, at = _extended(data, at, code, 15)
            stop = at + length + 3
            if stop > len(data):
                raise IndexError
            out += data[at:stop]
            at, state = stop, _AFTER_LITERALS
            continue
        start = len(out) - distance
        if start < 0:
            raise ValueError(_BEFORE)
        if distance >= length:
            out += out[start : start + length]
        else:  # what is copied is what this copy writes
            out += (out[start:] * (length // distance + 1))[:length]
        if state:
            if at + state > len(data):
                raise IndexError
            out += data[at : at + state]
            at += state
    if len(out) > size:
        raise ValueError(_MORE.format(size=size))
    return out


def _extended(data: bytes, at: int, count: int, base: int) -> tuple[int, int]:
    """A length whose bits in the instruction were `count`: 0 says that it follows, 255 for each zero byte."""
    if count:
        return count, at
    start = at
    while not data[at]:
        at += 1
    return base + 255 * (at - start) + data[at], at + 1
