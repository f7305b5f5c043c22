"""Checks over a whole BTF blob at once: what a damaged or stale copy does not pass."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from engine.errors import BadDataError
from engine.formats.btf.records import ROW_WORDS, TYPE_WORDS, Kind, Words, kinds_of

_REFERRING = (
    Kind.PTR, Kind.TYPEDEF, Kind.VOLATILE, Kind.CONST, Kind.RESTRICT, Kind.FUNC, Kind.FUNC_PROTO, Kind.VAR,
    Kind.DECL_TAG, Kind.TYPE_TAG,
)  # fmt: skip
"""Kinds whose third word is a type."""
# In a row of a type of that kind: which word is a name, which a type (None: none is).
_ROW_ROLES: dict[Kind, tuple[int | None, int | None]] = {
    Kind.STRUCT: (0, 1), Kind.UNION: (0, 1), Kind.ENUM: (0, None), Kind.ENUM64: (0, None),
    Kind.FUNC_PROTO: (0, 1), Kind.DATASEC: (None, 0),
}  # fmt: skip
_BLOCK = 1 << 13
"""Types whose rows are looked at together."""

Column = npt.NDArray[Any]


class Checker:
    """Looks at every word of a blob that names a string or a type."""

    def __init__(
        self, words: Words, starts: Column, count: int, strings: bytes, strings_start: int, section: int
    ) -> None:
        """`count` types there are in all; `strings` begin at offset `strings_start`, the base's lie before."""
        self.words = words
        self.starts = starts
        self.count = count
        self.strings_start = strings_start
        self.section = section
        self._bytes = np.frombuffer(strings, np.uint8)

    def run(self) -> None:
        """Raise BadDataError, with the offset in the blob, for the first thing that cannot be."""
        self._check_strings()
        self._check_names(self.starts)
        kinds = kinds_of(self.words[self.starts + 1])
        referring = self.starts[np.isin(kinds, np.array(_REFERRING, np.uint32))]
        self._check_types(referring + 2)
        arrays = self.starts[kinds == Kind.ARRAY]
        self._check_types(arrays + TYPE_WORDS)
        self._check_types(arrays + TYPE_WORDS + 1)
        for kind, (name, reference) in _ROW_ROLES.items():
            self._check_rows(self.starts[kinds == kind], kind, name, reference)

    def _check_rows(self, starts: Column, kind: Kind, name: int | None, reference: int | None) -> None:
        for first in range(0, len(starts), _BLOCK):
            owners = starts[first : first + _BLOCK]
            counts = (self.words[owners + 1] & np.uint32(0xFFFF)).astype(np.intp)
            number = np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)
            rows = np.repeat(owners + TYPE_WORDS, counts) + number * ROW_WORDS[kind]
            if name is not None:
                self._check_names(rows + name)
            if reference is not None:
                self._check_types(rows + reference)
            if kind in (Kind.STRUCT, Kind.UNION):
                self._check_offsets(owners, counts, rows)

    def _check_offsets(self, owners: Column, counts: Column, rows: Column) -> None:
        """No member begins behind the end of its structure."""
        offsets = self.words[rows + 2].astype(np.int64)
        packed = np.repeat(self.words[owners + 1] >> np.uint32(31), counts)
        offsets = np.where(packed != 0, offsets & 0xFFFFFF, offsets)
        limits = np.repeat(self.words[owners + 2].astype(np.int64) * 8, counts)
        self._refuse(rows + 2, offsets > limits, "a member begins outside of its structure")

    def _check_types(self, places: Column) -> None:
        self._refuse(places, self.words[places] >= self.count, f"a type number beyond {self.count - 1}")

    def _check_names(self, places: Column) -> None:
        names = self.words[places].astype(np.int64)
        stop = self.strings_start + len(self._bytes)
        self._refuse(places, names >= stop, "a name outside of the strings")
        ours = (names >= self.strings_start) & (names > 0)
        empty = self._bytes[np.where(ours, names - self.strings_start, 0)] == 0
        self._refuse(places, ours & empty, "a name that is empty")

    def _check_strings(self) -> None:
        """Names are text: a page of zeros shows in the names, one of anything else here."""
        bad = np.flatnonzero(((self._bytes < 0x20) & (self._bytes != 0)) | (self._bytes == 0x7F))
        if len(bad):
            raise BadDataError(self.section, detail=f"a control character at {int(bad[0])} of the strings")

    def _refuse(self, places: Column, bad: Column, detail: str) -> None:
        if bad.any():
            word = int(places[int(np.argmax(bad))])
            raise BadDataError(self.section + 4 * word, detail=detail)
