"""Which mapping an address lies in: asked of the kernel one at a time, or found in the text of maps.

Since Linux 6.11 an open maps file answers that by an ioctl, in about a microsecond and without taking the
process's lock; older kernels are asked for the text, line by line up to the one that counts.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from abc import ABC, abstractmethod
from collections.abc import Iterator
from fcntl import ioctl
from typing import NamedTuple

from engine.oslayers.native.regions import parse_region, read_lines
from engine.oslayers.native.storage import Device, Storage, huge_page_devices, storage_of
from engine.types import ADDRESS_SPACE, Rights

PROCMAP_QUERY = 3 << 30 | 104 << 16 | ord("f") << 8 | 17
"""_IOWR('f', 17, struct procmap_query), include/uapi/linux/fs.h of Linux 6.11."""
QUERY_READABLE, QUERY_WRITABLE, QUERY_SHARED = 1, 2, 8
QUERY_OR_NEXT = 0x10
"""PROCMAP_QUERY_COVERING_OR_NEXT_VMA."""

_QUERY = struct.Struct("=9Q4I2Q")
"""size, flags, address; start, stop, flags, page size, offset, inode; major, minor; name and build-id."""
_NAME_SIZE = 256

SHORT_TEXT = 32 << 10
"""Bytes of a maps file, 400 lines or so, that are gone through without a thread: 0.4 to 3 ms."""


class AddressSpaceGoneError(Exception):
    """The address space that a descriptor was opened of is no more: its process ended, or runs another program.

    Never leaves this package: the caller opens the descriptors again or finds out that the process has ended.
    """


class WouldWaitError(Exception):
    """It would have to wait for a disk or another program, or take long. Never leaves this package."""


class Mapping(NamedTuple):
    """One mapping of a process, with what its pages come from."""

    start: int
    stop: int
    readable: bool
    shared: bool
    offset: int
    device: Device
    inode: int
    huge: bool
    storage: Storage
    name: bytes
    """Known only where there is no inode; else empty or what the text says."""


class Mappings(ABC):
    """The mappings of one address space."""

    @abstractmethod
    def next(self, address: int) -> Mapping | None:
        """The mapping that holds `address`, or the first one behind it, or None."""

    def at(self, address: int) -> Mapping | None:
        """The mapping that holds `address`, or None."""
        found = self.next(address)
        return found if found is not None and found.start <= address else None

    def name(self, mapping: Mapping) -> bytes:
        """What maps shows as its name."""
        return mapping.name

    def within(self, start: int, stop: int) -> Iterator[Mapping]:
        """The mappings that touch [start, stop), ascending."""
        while start < stop:
            found = self.next(start)
            if found is None or found.start >= stop:
                return
            yield found
            start = found.stop


class QueriedMappings(Mappings):
    """Asked by ioctl on an open maps file."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    @staticmethod
    def works(descriptor: int) -> bool:
        """Whether this kernel answers on that descriptor."""
        try:
            ioctl(descriptor, PROCMAP_QUERY, _QUERY.pack(_QUERY.size, QUERY_OR_NEXT, *(0,) * 13))
        except OSError as error:
            return error.errno in (errno.ENOENT, errno.ESRCH)
        return True

    def _ask(self, address: int, flags: int, name_address: int = 0) -> tuple[int, ...] | None:
        size = _NAME_SIZE if name_address else 0
        question = _QUERY.pack(_QUERY.size, flags, address, 0, 0, 0, 0, 0, 0, 0, 0, size, 0, name_address, 0)
        try:
            return _QUERY.unpack(ioctl(self._descriptor, PROCMAP_QUERY, question))
        except OSError as error:
            if error.errno == errno.ENOENT:
                return None
            if error.errno == errno.ESRCH:
                raise AddressSpaceGoneError from None
            raise

    def _name(self, address: int) -> bytes:
        text = ctypes.create_string_buffer(_NAME_SIZE)
        try:
            answer = self._ask(address, 0, ctypes.addressof(text))
        except OSError:
            return b"?"
        return text.value if answer is not None and answer[11] else b""

    def name(self, mapping: Mapping) -> bytes:
        """See `Mappings.name`."""
        return self._name(mapping.start)

    def next(self, address: int) -> Mapping | None:
        """See `Mappings.next`."""
        if not 0 <= address < ADDRESS_SPACE:
            return None
        answer = self._ask(address, QUERY_OR_NEXT)
        if answer is None:
            return None
        _, _, _, start, stop, flags, page_size, offset, inode, major, minor = answer[:11]
        device = (major, minor)
        name = b"" if inode else self._name(start)
        shared = bool(flags & QUERY_SHARED)
        return Mapping(start, stop, bool(flags & QUERY_READABLE), shared, offset, device, inode,
                       page_size > os.sysconf("SC_PAGE_SIZE"),
                       storage_of(device, inode, name, shared=shared), name)


class TextMappings(Mappings):
    """Found in the text of a maps file, which is read anew for every question."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._long = False

    def within(self, start: int, stop: int, *, wait: bool = True) -> Iterator[Mapping]:
        """See `Mappings.within`. Raises WouldWaitError, unless `wait`, behind 32 KiB, and from then on at once."""
        if self._long and not wait:
            raise WouldWaitError
        size = 0
        try:
            descriptor = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            raise AddressSpaceGoneError from None
        try:
            for line in read_lines(descriptor):
                size += len(line) + 1
                if size > SHORT_TEXT and not wait:
                    self._long = True
                    raise WouldWaitError
                if int(line[line.index(b"-") + 1 : line.index(b" ")], 16) <= start:
                    continue
                region = parse_region(line)
                if region.start >= stop:
                    return
                name = os.fsencode(region.path)
                yield Mapping(
                    region.start, region.stop, bool(region.rights & Rights.READ), bool(region.shared),
                    region.offset, region.device, region.inode, region.device in huge_page_devices(),
                    storage_of(region.device, region.inode, name, shared=bool(region.shared)), name,
                )
        except ProcessLookupError:
            raise AddressSpaceGoneError from None
        finally:
            os.close(descriptor)

    def next(self, address: int) -> Mapping | None:
        """See `Mappings.next`."""
        return next(self.within(address, ADDRESS_SPACE), None)
