"""Connector `lime`: images of LiME and of AVML, ranges of physical memory behind headers.

    lime:memory.lime      LiME version 1: the bytes as they are, mapped in place
    lime:memory.avml      AVML version 2: packed by snappy, unpacked where it is read (needs the library cramjam)

LiME's formats `raw` and `padded` have no headers: those are files for the connector `raw`.

A file that was cut off or damaged opens as far as it is sound, and `info` says where it is not. AVML writes no block
of 16 MiB that holds nothing but zeros: a gap of whole such blocks behind a whole one reads as zeros.
"""

from __future__ import annotations

from typing import Self

from engine.block_memory import STORE_LIMIT, BlockMemory
from engine.decoders import decoder
from engine.errors import InvalidArgumentError, NotRecognisedError
from engine.file_memory import FRESHNESS_HELP
from engine.formats.avml import AvmlBlocks, avml_records
from engine.formats.lime import AVML, Records, lime_records, version_of
from engine.image_connector import ImageConnector
from engine.image_source import ImageSource, open_source
from engine.memory import Memory
from engine.memory_map import MappedMemory, MapRange, MemoryMap
from engine.oslayer import Options, OsLayer
from engine.zero_gaps import ZeroGaps

LIVE_STORE = 1
"""Bytes of unpacked blocks that are kept of a file that may change: one block, for words that follow one another."""


class LimeConnector(ImageConnector):
    """A LiME or AVML image as physical memory."""

    kind = "lime"
    summary = "an image of LiME or AVML: ranges of physical memory behind headers"
    options_help = FRESHNESS_HELP
    @classmethod
    def open(cls, target: str, options: Options, *, parent: OsLayer | None, writable: bool) -> Self:
        """Open the file. Raises NotRecognisedError where it holds no sound range, PluginError without the library."""
        if parent is not None:
            raise InvalidArgumentError("lime stands on a file of this host, not on an OS layer: leave -c out")
        if not target:
            raise InvalidArgumentError("lime wants a file: lime:PATH")
        source = open_source(target, options, writable=writable)
        try:
            packed = version_of(source.memory) == AVML
            if packed and writable:
                source.close()
                source = open_source(target, options, writable=False)
            records = avml_records(source.memory) if packed else lime_records(source.memory)
            memory, memory_map = _packed(source, records) if packed else _plain(source, records)
        except NotRecognisedError as error:
            source.close()
            raise NotRecognisedError(f"{target} cannot be opened as a LiME or AVML image: {error}") from None
        except BaseException:
            source.close()
            raise
        zeros = records.zeros if packed or records.by_avml else ()
        name = "AVML version 2, packed by snappy" if packed else "LiME version 1"
        notes = [f"{name}: {len(records.records)} ranges", *source.notes, *records.notes]
        if zeros:
            size = sum(gap.size for gap in zeros)
            notes.append(f"{size >> 20} MiB that AVML left out as blocks of zeros read as zeros")
            memory = ZeroGaps(memory, zeros)
        return cls(source, memory, memory_map, notes)


def _plain(source: ImageSource, records: Records) -> tuple[Memory, MemoryMap]:
    ranges = MemoryMap(MapRange(record.start, record.size, record.offset) for record in records.records)
    memory = MappedMemory(source.memory, ranges)
    edges = source.memory.page_size
    for one in ranges.ranges:
        edges |= one.base | one.length
    memory.page_size = edges & -edges  # wherever in the file they lie, behind headers of 32 bytes: it has no holes
    return memory, ranges


def _packed(source: ImageSource, records: Records) -> tuple[Memory, MemoryMap]:
    blocks = AvmlBlocks(source.memory, records.records, decoder("snappy", "lime"))
    ranges = MemoryMap(MapRange(record.start, record.size, record.start) for record in records.records)
    limit = STORE_LIMIT if source.immutable else LIVE_STORE
    may_block = source.memory.may_block
    memory = BlockMemory(blocks.starts, blocks.lengths, blocks.decode, limit=limit, may_block=may_block)
    return memory, MemoryMap(ranges.coalesced())
