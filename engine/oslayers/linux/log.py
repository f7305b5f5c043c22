"""The kernel's log: the ring buffer of printk, read with what VMCOREINFO says of it.

Needs neither types nor symbols, so it reads on every kernel from 5.10 on, whatever else is missing.

Sources: Linux kernel/printk/printk_ringbuffer.{c,h}, Documentation/admin-guide/kdump/vmcoreinfo.rst, 5.10 to 7.x.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from engine.errors import NotFoundError
from engine.formats.vmcoreinfo import Vmcoreinfo
from engine.memory import Memory
from engine.oslayer import KernelLog
from engine.oslayers.linux.objects import decoded
from engine.records import dataclass
from engine.types import LogRecord

COUNT_LIMIT, SIZE_LIMIT = 22, 28
"""Log2 of descriptors and of bytes of text that a log may have; CONFIG_LOG_BUF_SHIFT ends at 25."""
_COMMITTED, _FINALIZED = 1, 2
"""The top two bits of a descriptor's state (enum desc_state)."""


@dataclass(frozen=True, slots=True)
class _Ring:
    """The rings as they lie in memory."""

    descriptors: bytes
    infos: bytes
    text: bytes
    count_bits: int
    size_bits: int
    first: int
    last: int


class PrintkLog(KernelLog):
    """The records of printk, oldest first."""

    def __init__(self, memory: Memory, info: Vmcoreinfo, word: int) -> None:
        """Raises NotFoundError where VMCOREINFO does not describe the ring (kernels before 5.10)."""
        self._memory = memory
        self._word = word
        self._info = info
        self._pointer = info.symbol("prb")
        if self._pointer is None:
            raise NotFoundError("VMCOREINFO does not say where the kernel's log is")
        self._offset("printk_ringbuffer.desc_ring")

    def _offset(self, path: str) -> int:
        found = self._info.offset(path)
        if found is None:
            raise NotFoundError(f"VMCOREINFO does not tell the offset of {path}")
        return found

    def _size(self, name: str) -> int:
        found = self._info.size(name)
        if not found or found > 1 << 12:
            raise NotFoundError(f"VMCOREINFO does not tell the size of {name}")
        return found

    def _word_at(self, address: int) -> int:
        return self._memory.u64(address) if self._word == 8 else self._memory.u32(address)

    def records(self) -> Iterator[LogRecord]:
        """See `KernelLog.records`. Raises FaultError where the ring cannot be read, NotFoundError."""
        ring = self._ring()
        mask = (1 << ring.count_bits) - 1
        id_mask = (1 << 8 * self._word - 2) - 1
        size, info_size = self._size("prb_desc"), self._size("printk_info")
        at = ring.first
        for _ in range(mask + 1):
            record = self._record(ring, at, at & mask, size, info_size, id_mask)
            if record is not None:
                yield record
            if at == ring.last:
                return
            at = at + 1 & id_mask

    def _ring(self) -> _Ring:
        """Raises FaultError, NotFoundError."""
        assert self._pointer is not None  # checked when it was made
        base = self._word_at(self._pointer)
        descriptors = base + self._offset("printk_ringbuffer.desc_ring")
        text = base + self._offset("printk_ringbuffer.text_data_ring")
        count_bits = self._memory.u32(descriptors + self._offset("prb_desc_ring.count_bits"))
        size_bits = self._memory.u32(text + self._offset("prb_data_ring.size_bits"))
        if not 0 < count_bits <= COUNT_LIMIT or not 0 < size_bits <= SIZE_LIMIT:
            raise NotFoundError(f"a log of 2^{count_bits} records and 2^{size_bits} bytes is none")
        counter = self._info.offset("atomic_long_t.counter") or 0
        count = 1 << count_bits

        def array(path: str, size: int) -> bytes:
            return self._memory.read_padded(self._word_at(descriptors + self._offset(path)), size)

        return _Ring(
            array("prb_desc_ring.descs", count * self._size("prb_desc")),
            array("prb_desc_ring.infos", count * self._size("printk_info")),
            self._memory.read_padded(self._word_at(text + self._offset("prb_data_ring.data")), 1 << size_bits),
            count_bits,
            size_bits,
            self._word_at(descriptors + self._offset("prb_desc_ring.tail_id") + counter),
            self._word_at(descriptors + self._offset("prb_desc_ring.head_id") + counter),
        )

    def _record(
        self, ring: _Ring, number: int, index: int, size: int, info_size: int, id_mask: int
    ) -> LogRecord | None:
        """One record; None where its descriptor is free, or being written to."""
        word = struct.Struct("<Q" if self._word == 8 else "<I")
        place = index * size
        counter = self._info.offset("atomic_long_t.counter") or 0
        (state,) = word.unpack_from(ring.descriptors, place + self._offset("prb_desc.state_var") + counter)
        if state & id_mask != number & id_mask or state >> (8 * self._word - 2) not in (_COMMITTED, _FINALIZED):
            return None
        blocks = place + self._offset("prb_desc.text_blk_lpos")
        (begin,) = word.unpack_from(ring.descriptors, blocks + self._offset("prb_data_blk_lpos.begin"))
        (stop,) = word.unpack_from(ring.descriptors, blocks + self._offset("prb_data_blk_lpos.next"))
        info = index * info_size
        (sequence,) = struct.unpack_from("<Q", ring.infos, info + self._offset("printk_info.seq"))
        (time,) = struct.unpack_from("<Q", ring.infos, info + self._offset("printk_info.ts_nsec"))
        lengths = info + self._offset("printk_info.text_len")
        length, facility, flags = struct.unpack_from("<HBB", ring.infos, lengths)
        (caller,) = struct.unpack_from("<I", ring.infos, info + self._offset("printk_info.caller_id"))
        text = b"" if begin & 1 else self._text(ring, begin, stop, length)
        # `u8 flags:5, level:3` stands behind the length and the facility (struct printk_info).
        return LogRecord(sequence, time, flags >> 5, facility, caller, decoded(text))

    def _text(self, ring: _Ring, begin: int, stop: int, length: int) -> bytes:
        """A block of text begins with its descriptor's number; one that would wrap lies at the ring's start."""
        size = 1 << ring.size_bits
        start = begin % size
        if begin >> ring.size_bits != stop >> ring.size_bits and stop % size:
            start = 0
        start += self._word
        return ring.text[start : min(start + length, size)]
