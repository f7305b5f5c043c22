"""An image of memory as it lies on a disk: one file, several parts of one, or packed.

    source = open_source("memory.lime.zst", options, writable=False)
    source.memory          # the bytes of the image, whatever they are kept in

- A split image, NAME.001 NAME.002 … (also .000, .00, .01, .aa), is joined where its first part is named.
- ZIP: a member that is stored as it is lies in place.
- xz, Zstandard, lz4: packed in blocks (frames) that are small enough, it is unpacked where it is read.
- A URL is read by ranges; see `engine.remote_file`.
- Anything else that is packed ends in a sentence with the command that unpacks it.

What is inside is for others to recognise; a connector over files opens them here and hands on what the source says of
`lease`, `immutable`, `freshness` and `notes`.
"""

from __future__ import annotations

import os
import re
import shlex
import string
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from engine.block_memory import BlockMemory
from engine.decoders import decoder
from engine.errors import InvalidArgumentError, NotRecognisedError, UnusableTargetError
from engine.file_memory import FileMemory, open_image
from engine.formats.lz4 import lz4_blocks
from engine.formats.xz import xz_blocks
from engine.formats.zip import STORED, image_member, stored_at
from engine.formats.zstd import zstd_frames
from engine.joined_memory import JoinedMemory
from engine.leases import JointLease, Lease
from engine.memory import Memory, MemoryWindow
from engine.recognition import HEAD_SIZE, Format, recognise
from engine.records import dataclass
from engine.remote_file import RemoteFile, is_url

Column = npt.NDArray[np.uint64]

BLOCK_LIMIT = 16 << 20
"""Bytes of a packed block, at the most: it is unpacked whole for each word that is read of it (Zstandard: 1 GB/s)."""
XZ_BLOCK_LIMIT = 8 << 20
"""The same for xz, which unpacks 100 MB/s. Blocks of 24 MiB, as xz -T0 makes them, took minutes to list processes."""
STORE_LIMIT = 128 << 20
"""Unpacked bytes that are kept, at the most."""
PART_LIMIT = 4096
NESTING_LIMIT = 3
_DIGITS = dict(zip(string.ascii_lowercase, string.digits + string.ascii_lowercase, strict=False))
_NUMBERED = re.compile(r"(?P<stem>.+\.)(?P<number>[0-9]{2,5}|[a-z]{2,3})", re.DOTALL)


ImageFile = FileMemory | RemoteFile


@dataclass(frozen=True, slots=True)
class ImageSource:
    """The bytes of an image, and the files that they come from."""

    path: str
    memory: Memory
    files: tuple[ImageFile, ...]
    notes: tuple[str, ...] = ()
    """Sentences for `info`: what it is kept in, what of it is missing."""
    lease: Lease | None = None
    """What its being immutable hangs on: the lease of the file, or of all parts."""
    changed: bool = False
    """Whether the bytes are not those of the file at `path` as they stand."""

    @property
    def immutable(self) -> bool:
        """Whether nobody changes any of its files."""
        return all(file.immutable for file in self.files) and (self.lease is None or self.lease.held)

    @property
    def freshness(self) -> str:
        """Whether it is immutable or live, and why: a clause for a person."""
        return next((file for file in self.files if not file.immutable), self.files[0]).freshness

    def head(self) -> bytes:
        """Its first bytes, by which a format is recognised."""
        return self.memory.read(0, min(HEAD_SIZE, self.memory.size))

    def close(self) -> None:
        """Drop the files; a reader at work keeps its own references."""
        if self.lease is not None:
            self.lease.release()
        for file in self.files:
            file.close()


def open_source(path: str, options: Mapping[str, str], *, writable: bool, as_it_is: bool = False) -> ImageSource:
    """Open an image; with `as_it_is` the file at `path` alone, whatever is in it.

    `options` are those of `FRESHNESS_HELP`. Raises NotRecognisedError for what is packed and cannot be read in place,
    with the command that unpacks it; and what `open_image` raises.
    """
    paths = [(0, path)] if as_it_is or is_url(path) else parts_of(path)
    files: list[ImageFile] = []
    try:
        for _, part in paths:
            files.append(_opened(part, options, writable=writable))
        source = _joined(path, paths, files)
        return source if as_it_is else _unpacked(source)
    except BaseException:
        for file in files:
            file.close()
        raise


def _opened(path: str, options: Mapping[str, str], *, writable: bool) -> ImageFile:
    if is_url(path):
        return RemoteFile(path, options, writable=writable)
    return open_image(path, options, writable=writable)


def is_split(path: str) -> bool:
    """Whether a file is the first part of several, by their names."""
    return not is_url(path) and len(parts_of(path)) > 1


def parts_of(path: str) -> list[tuple[int, str]]:
    """(number, path) of each part of a split image of which `path` is the first; else the path alone.

    Raises NotRecognisedError where it is a later part, whose first one lies beside it.
    """
    folder, name = os.path.split(path)
    match = _NUMBERED.fullmatch(name)
    if match is None:
        return [(0, path)]
    decimal, digits = match["number"].isdigit(), len(match["number"])
    firsts = ["0" * digits, "1".rjust(digits, "0")] if decimal else ["a" * digits]
    if not any(os.path.exists(os.path.join(folder, match["stem"] + first)) for first in firsts):
        return [(0, path)]  # as of most files: the folder, which may be large, is not listed
    number = _number(match["number"], decimal)
    beside = dict(_parts_beside(folder, match["stem"], digits, decimal))
    first = next((one for one in ((0, 1) if decimal else (0,)) if one in beside), None)
    if first is None or max(beside) + 1 - first > 2 * len(beside):
        return [(0, path)]  # no first part, or too few for the numbers to be those of parts
    if number != first:
        if number is None or not set(range(first, number)) <= beside.keys():
            return [(0, path)]
        earlier = shlex.quote(os.path.join(folder, beside[first]))
        raise NotRecognisedError(f"{path} is a later part of a split image: name the first, {earlier}")
    if len(beside) > PART_LIMIT:
        raise InvalidArgumentError(f"{path} has {len(beside)} parts; an image may have {PART_LIMIT}")
    return [(one - first, os.path.join(folder, beside[one])) for one in sorted(beside) if one >= first]


def _parts_beside(folder: str, stem: str, digits: int, decimal: bool) -> Iterator[tuple[int, str]]:
    try:
        names = os.listdir(folder or ".")
    except OSError:
        return  # a folder that may be passed, not listed: the file alone then
    for name in names:
        number = _number(name[len(stem) :], decimal) if name.startswith(stem) else None
        if number is not None and len(name) == len(stem) + digits:
            yield number, name


def _number(text: str, decimal: bool) -> int | None:
    """Which part a suffix names: 001 is 1; aa is 0, ab 1."""
    if decimal:
        return int(text) if text.isascii() and text.isdigit() else None
    if not (text.isascii() and text.islower() and text.isalpha()):
        return None
    return int("".join(_DIGITS[character] for character in text), 26)


def _joined(path: str, paths: Sequence[tuple[int, str]], files: Sequence[ImageFile]) -> ImageSource:
    if len(files) == 1:
        return ImageSource(path, files[0], tuple(files), lease=files[0].lease)
    sizes = [file.size for file in files]
    missing = sorted(set(range(paths[-1][0])) - {number for number, _ in paths})
    notes = [f"{len(files)} parts of a split image, joined, from {path} on"]
    starts, at = [], 0
    if missing:
        if len(set(sizes[:-1])) != 1 or sizes[-1] > sizes[0]:
            raise UnusableTargetError(
                f"{path}: {len(missing)} parts are missing between the others, and as these differ in size nobody can "
                "say where what follows lies: put the missing parts beside them"
            )
        notes.append(f"{len(missing)} parts of {sizes[0]} bytes are missing: what they held faults")
        starts = [number * sizes[0] for number, _ in paths]
    else:
        for size in sizes:
            starts.append(at)
            at += size
    leases = [file.lease for file in files if file.lease is not None]
    lease = JointLease(leases) if leases else None
    memory = JoinedMemory(list(zip(starts, files, strict=True)))
    return ImageSource(path, memory, tuple(files), tuple(notes), lease, changed=True)


def _unpacked(source: ImageSource) -> ImageSource:
    """What is in it, however often it is packed."""
    for _ in range(NESTING_LIMIT):
        if not source.memory.size:
            return source
        found = recognise(source.head())
        if found is None or not found.packing:
            return source
        source = _inside(source, found)
    raise NotRecognisedError(f"{source.path} is packed {NESTING_LIMIT} times over: unpack it")


def _inside(source: ImageSource, found: Format) -> ImageSource:
    try:
        memory, what = _UNPACKERS[found.packing](source)
    except KeyError:
        raise NotRecognisedError(not_opened(source.path, found, "which cannot be read in parts")) from None
    except NotRecognisedError as error:
        raise NotRecognisedError(not_opened(source.path, found, f"which is not opened in place: {error}")) from None
    notes = (*source.notes, f"{what}, read in place")
    return ImageSource(source.path, memory, source.files, notes, source.lease, changed=True)


def not_opened(path: str, found: Format, why: str) -> str:
    """A sentence: what a file is, why it is not opened, what to do."""
    advice = found.advice.replace("{path}", shlex.quote(path))
    return f"{path} is {found.what}, {why}" + (f"; {advice}" if advice else "")


class _ReadOnlyWindow(MemoryWindow):
    """A member of an archive, which has a checksum of it."""

    def __init__(self, memory: Memory, start: int, size: int) -> None:
        super().__init__(memory, start, size)
        self.writable = False


def _from_zip(source: ImageSource) -> tuple[Memory, str]:
    member = image_member(source.memory)
    if member.method != STORED or member.encrypted:
        raise NotRecognisedError(f"{member.name} in it is {member.packing}")
    start = stored_at(source.memory, member)
    if start + member.size > source.memory.size:
        raise NotRecognisedError(f"it is cut off: {member.name} is not whole")
    return _ReadOnlyWindow(source.memory, start, member.size), f"{member.name} in a ZIP file"


def _from_xz(source: ImageSource) -> tuple[Memory, str]:
    found = xz_blocks(source.memory)
    largest = int(found.lengths.max()) if len(found.lengths) else 0
    if largest > XZ_BLOCK_LIMIT:
        raise NotRecognisedError(
            f"it has blocks of {largest >> 20} MiB, and those up to {XZ_BLOCK_LIMIT >> 20} MiB can be read in place "
            "(xz -T0 --block-size=1MiB makes such)"
        )
    return _blocks(source, found.starts, found.lengths, found.decode), f"an xz file of {len(found.starts)} blocks"


def _from_zstd(source: ImageSource) -> tuple[Memory, str]:
    found = zstd_frames(source.memory, decoder("zstd", "raw"), BLOCK_LIMIT)
    return _blocks(source, found.starts, found.lengths, found.decode), f"a Zstandard file of {len(found.starts)} frames"


def _from_lz4(source: ImageSource) -> tuple[Memory, str]:
    found = lz4_blocks(source.memory, decoder("lz4", "raw"))
    return _blocks(source, found.starts, found.lengths, found.decode), f"an lz4 file of {len(found.starts)} blocks"


def _blocks(source: ImageSource, starts: Column, lengths: Column, decode: Callable[[int], bytes]) -> Memory:
    limit = STORE_LIMIT if source.immutable else 1
    return BlockMemory(starts, lengths, decode, limit=limit, may_block=source.memory.may_block)


_UNPACKERS: dict[str, Callable[[ImageSource], tuple[Memory, str]]] = {
    "zip": _from_zip,
    "xz": _from_xz,
    "zstd": _from_zstd,
    "lz4": _from_lz4,
}
