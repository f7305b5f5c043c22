"""LZO1X, decompression only, bounded by what must come out.

Source: Linux Documentation/staging/lzo.rst (the format, release 6.12).
"""

from __future__ import annotations

_SHORT, _LONG = 2049, 16384
"""What is added to the distance of a match of 3 bytes after literals, and of one with 14 bits of its own."""
_AFTER_LITERALS = 4
"""State: four or more literals were copied last; 0 to 3 is how many came with the last match."""


def decompress(packed: bytes | memoryview, size: int, most: int | None = None) -> bytes:
    """The `size` bytes that `packed` holds; with `most` at least so many of the first.

    Raises ValueError where it is damaged, or holds another number of bytes.
    """
    try:
        made = _decompress(bytes(packed), size, size + 1 if most is None else most)
    except IndexError:
        raise ValueError("the LZO data end too early") from None
    if len(made) != size and most is None:
        raise ValueError(f"the LZO data hold {len(made)} bytes, not {size}")
    return bytes(made)


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
            raise ValueError("the LZO data refer to bytes before their first")
        if distance >= length:
            out += out[start : start + length]
        else:  # what is copied is what this copy writes
            out += (out[start:] * (length // distance + 1))[:length]
        if state:
            out += data[at : at + state]
            at += state
    if len(out) > size:
        raise ValueError(f"the LZO data hold more than {size} bytes")
    return out


def _extended(data: bytes, at: int, count: int, base: int) -> tuple[int, int]:
    """A length whose bits in the instruction were `count`: 0 says that it follows, 255 for each zero byte."""
    if count:
        return count, at
    start = at
    while not data[at]:
        at += 1
    return base + 255 * (at - start) + data[at], at + 1
