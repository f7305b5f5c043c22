"""An image of physical memory with page tables written by hand (Intel SDM vol. 3A 4.5, 4-level paging).

    virtual                          physical
    0x0000_5555_0000_0000 + 0..7     frames 0x30 … 0x37, in falling order                    rw, user
    0x0000_5555_0000_8000            absent
    0x0000_5555_0000_9000            frame 0x40                                               r--, user, NX
    0x0000_5555_0020_0000 (2M)       0x400000, where memory goes to 0x480000 (DTB | PCID 5)   rwx, user
    0xffff_ffff_ffff_f000            frame 0x41: the last page                                rwx, kernel, global
"""

from __future__ import annotations

import random
import struct

SIZE = 0x480000
USER = 0x5555_0000_0000
LARGE = USER + 0x200000
LAST = 0xFFFF_FFFF_FFFF_F000
DTB = 0x1000
NX = 1 << 63


def put(data: bytearray, table: int, index: int, entry: int) -> None:
    """Write one entry of a table."""
    struct.pack_into("<Q", data, table + index * 8, entry)


def image() -> bytearray:
    """The bytes, noise wherever no table lies; the same each time."""
    data = bytearray(random.Random(5).randbytes(SIZE))
    data[0x1000:0x9000] = bytes(0x8000)
    put(data, 0x1000, USER >> 39 & 511, 0x2007)
    put(data, 0x2000, USER >> 30 & 511, 0x3007)
    put(data, 0x3000, USER >> 21 & 511, 0x4007)
    put(data, 0x3000, LARGE >> 21 & 511, 0x400000 | 0x87)
    for page in range(8):
        put(data, 0x4000, page, (0x37 - page) << 12 | 7)
    put(data, 0x4000, 9, 0x40000 | 5 | NX)
    put(data, 0x1000, 511, 0x5003)
    put(data, 0x5000, 511, 0x6003)
    put(data, 0x6000, 511, 0x7003)
    put(data, 0x7000, 511, 0x41000 | 0x103)
    return data


def seen(data: bytes | bytearray) -> bytes:
    """What stands at USER: the eight frames in falling order."""
    return b"".join(bytes(data[(0x37 - page) << 12 : (0x38 - page) << 12]) for page in range(8))
