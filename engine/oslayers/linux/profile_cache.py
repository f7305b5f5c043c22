"""Profiles that were read before, kept in the user's cache folder: opening an image of the same kernel build again.

What is kept is what took time to find: where the tables lie, where each type begins, the names written out. It is
taken again only where the memory holds, in the same places, the very bytes that it was made of: they are read, and
their digest compared, since a dump may carry any build-id. Where the kernel's own VMCOREINFO gives addresses, those
that agreed then must agree now. Nothing that is kept depends on where KASLR has put the kernel.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import field
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.errors import BadDataError, FaultError
from engine.formats import kallsyms, ksymtab
from engine.formats.btf import Btf
from engine.formats.kallsyms import Kallsyms
from engine.formats.ksymtab import Ksymtab
from engine.kept_columns import Entry, KeptColumns
from engine.memory import Memory
from engine.oslayers.linux.finding import Found
from engine.records import dataclass
from engine.types import Extent

VERSION = 1
"""Of what is kept: entries of another one are none."""
TRIED_LIMIT = 4
"""Entries of one build-id that are looked at: beside the true one those of dumps that only claim to be of it."""
DIGEST_SIZE = 20
SIZE_LIMIT = 64 << 20
"""Bytes of an image that may be digested; a kernel's tables have four to ten million."""

Columns = Mapping[str, npt.NDArray[Any]]
_STORE = KeptColumns("profiles")


@dataclass(slots=True)
class Parts:
    """What a profile consists of, as far as it is there and sound."""

    symbols: Kallsyms | None = None
    exports: Ksymtab | None = None
    types: Btf | None = None
    types_place: Extent | None = None
    """Where the types lie in the image."""
    notes: list[str] = field(default_factory=list)
    whole: bool = True
    """Of what was kept: whether none of it is missing."""


def built_without_types(symbols: Kallsyms) -> bool:
    """Whether its own symbols say that it carries no BTF: what shows it in /sys is missing (kernel/bpf/Makefile)."""
    return not symbols.skipped and symbols.first("btf_vmlinux_init") is None


def recall(found: Found, image: Memory, word: int) -> Parts | None:
    """The parts kept of a kernel that has the same bytes as this one; None where there are none.

    Without types, and not `whole`, where the symbols are the same and the bytes of the types are not.
    """
    partial: Parts | None = None
    for count, entry in enumerate(_STORE.entries(_prefix(found))):
        if count == TRIED_LIMIT:
            break
        try:
            parts = _restored(entry, found, image, word)
        except (BadDataError, FaultError, KeyError, TypeError, ValueError, IndexError):
            continue
        if parts is not None and parts.whole:
            return parts
        partial = partial or parts
    return partial


def keep(found: Found, image: Memory, parts: Parts) -> bool:
    """Keep the parts for the next time; whether that was possible.

    Not of a kernel of which something is missing that it was built with: a whole image may come after a damaged one.
    """
    symbols = parts.symbols
    if symbols is None or not (symbols.has_data or parts.exports is not None):
        return False
    if parts.types is None and not built_without_types(symbols):
        return False
    facts: dict[str, Any] = {"version": VERSION, "parts": {}, "notes": parts.notes}
    columns: dict[str, npt.NDArray[Any]] = {}
    whole = hashlib.blake2b(digest_size=DIGEST_SIZE)
    for name, (made_of, more, own) in _forms(parts).items():
        digest = _digest([image.read_padded(each.start, each.size) for each in made_of])
        whole.update(name.encode() + digest.encode())
        extents = [(each.start, each.size) for each in made_of]
        facts["parts"][name] = {"extents": extents, "digest": digest, "facts": more}
        columns |= {f"{name}.{column}": values for column, values in own.items()}
    facts["references"] = [name for name, address in found.vmcoreinfo.symbols.items() if symbols.has(name, address)]
    if not facts["parts"] or not facts["references"]:
        return False  # without references nothing would tell whether addresses are read in the right way
    return _STORE.put(_prefix(found) + whole.hexdigest(), facts, columns)


def _prefix(found: Found) -> str:
    return f"{found.vmcoreinfo.build_id or 'unknown'}-"


def _forms(parts: Parts) -> dict[str, tuple[list[Extent], dict[str, Any], Columns]]:
    """The parts that can be kept: what they were made of, facts, columns."""
    found: dict[str, tuple[list[Extent], dict[str, Any], Columns] | None] = {}
    if parts.symbols is not None:
        found["symbols"] = kallsyms.kept_form(parts.symbols)
    if parts.exports is not None:
        found["exports"] = ksymtab.kept_form(parts.exports)
    if parts.types is not None and parts.types_place is not None:
        sizes = {"pointer_size": parts.types.pointer_size}
        found["types"] = [parts.types_place], sizes, {"starts": parts.types.index}
    if any(form is None for form in found.values()):
        return {}
    return {name: form for name, form in found.items() if form is not None}


def _digest(pieces: Sequence[bytes]) -> str:
    whole = hashlib.blake2b(digest_size=DIGEST_SIZE)
    for piece in pieces:
        whole.update(len(piece).to_bytes(8, "little"))
        whole.update(piece)
    return whole.hexdigest()


def _restored(entry: Entry, found: Found, image: Memory, word: int) -> Parts | None:
    """The parts of an entry, if the image has the bytes that they were made of."""
    facts = entry.facts
    if facts["version"] != VERSION:
        return None
    pieces: dict[str, list[bytes]] = {}
    for name, part in facts["parts"].items():
        pieces[name] = [_piece(image, *extent) for extent in part["extents"]]
        if _digest(pieces[name]) != part["digest"]:
            if name != "types" or "symbols" not in pieces:
                return None
            del pieces[name]
    columns = entry.columns()
    if columns is None:
        return None
    parts = Parts(notes=[str(note) for note in facts["notes"]], whole=pieces.keys() == facts["parts"].keys())
    base = found.image.start
    for name, part in facts["parts"].items():
        own = {column.partition(".")[2]: values for column, values in columns.items() if column.startswith(f"{name}.")}
        if name == "symbols":
            parts.symbols = kallsyms.from_kept(image, base, part["facts"], own)
        elif name == "exports":
            parts.exports = ksymtab.from_kept(image, base, word, part["facts"], own)
        elif name == "types" and name in pieces:
            parts.types = _types(pieces[name][0], int(part["facts"]["pointer_size"]), own["starts"])
    if parts.symbols is not None:
        given = found.vmcoreinfo.symbols
        if not all(name in given and parts.symbols.has(name, given[name]) for name in facts["references"]):
            return None
    return parts


def _piece(image: Memory, start: int, size: int) -> bytes:
    if not (start >= 0 and 0 < size <= SIZE_LIMIT and start + size <= image.size):
        raise BadDataError(start, detail="what was kept lies outside of this kernel's image")
    return image.read_padded(start, size)


def _types(data: bytes, pointer_size: int, starts: npt.NDArray[Any]) -> Btf:
    if not len(starts) or starts[0] or (np.diff(starts) <= 0).any() or 4 * int(starts[-1]) >= len(data):
        raise BadDataError(0, detail="a kept index does not fit these types")
    if pointer_size not in (4, 8):
        raise BadDataError(0, detail=f"pointers of {pointer_size} bytes")
    return Btf(data, pointer_size=pointer_size, starts=starts.astype(np.int32, copy=False))
