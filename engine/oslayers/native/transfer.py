"""Bytes between a process and a buffer, without changing the process by reading it.

A read asks pagemap first. Pages that are held are copied; every other page is answered by what its mapping
is: a fault outside of any (reading below a stack would make it grow), zeros where memory was never touched
(reading would give the process a page), what the file holds where it is shared memory (read through
/proc/PID/map_files, which needs CAP_SYS_ADMIN or CAP_CHECKPOINT_RESTORE). A page of a file on a disk is read
through the process, as gdb does. Two things are left that change the target:

- shared memory that nobody has touched, without those capabilities: it is read through the process, and
  gets a page of zeros;
- a page that is given back between the look at pagemap and the copy.

A page that a userfaultfd monitor would fill counts as never touched; reading it through mem would wait.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator

from engine.errors import FaultError, FaultKind, SourceFaultError
from engine.memory import fault
from engine.oslayers.native import vectors
from engine.oslayers.native.descriptors import Descriptors, Walk
from engine.oslayers.native.mappings import AddressSpaceGoneError, Mapping, WouldWaitError
from engine.oslayers.native.pagemap import (
    LEAST_HELD,
    LEAST_PRESENT,
    PAGE_IS_PRESENT,
    PAGE_IS_SWAPPED,
    PAGE_SHIFT,
    SCAN_PAGES,
    TOP_BYTE,
    Run,
    entry_runs,
)
from engine.oslayers.native.storage import Storage
from engine.types import ADDRESS_SPACE

CHUNK = 4 << 20
"""Bytes that are looked up and copied at a time."""
VECTOR_BYTES = 64 << 10
"""From more bytes on process_vm_readv is faster than mem (measured: 6.7 and 9.3 us, at 1 MiB 75 and 141)."""
CHANGES = 8
"""How often a mapping may change between two looks at it before the read gives up."""

_OF_FILES = frozenset({Storage.FILE, Storage.SHARED_MEMORY, Storage.MEMORY_FILE})
"""What has a file behind it, disk or not: where such a mapping cannot be read, the file ends before."""
_ZEROS = memoryview(bytes(1 << 20))
_ONLY_SWAPPED = bytes(range(LEAST_HELD, LEAST_PRESENT))


def _page_start(address: int) -> int:
    return address >> PAGE_SHIFT << PAGE_SHIFT


def _page_stop(address: int) -> int:
    return -(-address >> PAGE_SHIFT) << PAGE_SHIFT


def zero(view: memoryview) -> None:
    """Fill with zeros."""
    for start in range(0, len(view), len(_ZEROS)):
        part = view[start : start + len(_ZEROS)]
        part[:] = _ZEROS[: len(part)]


def _scanned(files: Descriptors, start: int, stop: int, *, wait: bool) -> list[Run] | None:
    """The held runs by the ioctl, or None where it cannot say."""
    if files.scanner is None or stop - start < SCAN_PAGES << PAGE_SHIFT:
        return None
    first, last = _page_start(start), _page_stop(stop)
    try:
        held = PAGE_IS_PRESENT | PAGE_IS_SWAPPED
        runs = list(files.scanner.runs(first, last, held, skip_zero_page=False))
        if not wait and next(files.scanner.runs(first, last, PAGE_IS_SWAPPED, skip_zero_page=False), None):
            raise WouldWaitError
    except ProcessLookupError:
        raise AddressSpaceGoneError from None
    except OSError:  # EFAULT: part of the range lies beyond any process's addresses
        return None
    return runs


def held_runs(files: Descriptors, start: int, stop: int, *, wait: bool = True) -> list[Run]:
    """The runs of held pages that touch [start, stop), page-aligned; all of it where there is no pagemap.

    Raises WouldWaitError, unless `wait`, where a page is in swap.
    """
    if files.pagemap < 0:
        return [(start, stop)]
    runs = _scanned(files, start, stop, wait=wait)
    if runs is not None:
        return runs
    first = start >> PAGE_SHIFT
    count = (_page_stop(stop) >> PAGE_SHIFT) - first
    entries = os.pread(files.pagemap, count * 8, first * 8)
    if not entries and not files.alive():
        raise AddressSpaceGoneError
    top = entries[TOP_BYTE::8]
    if not wait and len(top.translate(None, _ONLY_SWAPPED)) < len(top):
        raise WouldWaitError
    return entry_runs(top, first, present=False)


def parts(files: Descriptors, start: int, stop: int, *, wait: bool = True) -> Iterator[tuple[bool, int, int]]:
    """[start, stop) cut into what is held and what is not: (held, start, stop), without gaps."""
    at = start
    for begin, end in held_runs(files, start, stop, wait=wait):
        begin, end = max(begin, at), min(end, stop)
        if at < begin:
            yield False, at, begin
        if begin < end:
            yield True, begin, end
            at = end
    if at < stop:
        yield False, at, stop


def _copy_mem(files: Descriptors, address: int, view: memoryview) -> int:
    """At least one byte from `address` on by mem."""
    try:
        count = os.preadv(files.mem, (view,), address)
    except (OSError, OverflowError) as error:
        if isinstance(error, OSError) and error.errno not in (errno.EIO, errno.EFAULT, errno.EINVAL):
            raise
        raise FaultError(address) from None
    if count == 0:
        raise AddressSpaceGoneError
    return count


def _copy_vector(files: Descriptors, address: int, view: memoryview) -> int:
    """Bytes from `address` on by process_vm_readv, certain to be this process's; 0 where it cannot read."""
    if not files.vectors:
        return 0
    count = vectors.read_span(files.pid, address, view)
    if count <= 0:
        if vectors.refused(-count):
            files.vectors = False
        return 0
    if not files.same():
        raise AddressSpaceGoneError
    return count


def copy(files: Descriptors, address: int, view: memoryview) -> None:
    """Fill `view` through the process. Raises FaultError, AddressSpaceGoneError."""
    size, done = len(view), 0
    while done < size:
        count = 0
        if size - done > VECTOR_BYTES:
            count = _copy_vector(files, address + done, view[done:])
        if count == 0:
            # What process_vm_readv will not read, a page without the right to read for one, mem may.
            count = _copy_mem(files, address + done, view[done : done + VECTOR_BYTES])
        done += count


def open_mapped(files: Descriptors, mapping: Mapping) -> int | None:
    """A descriptor of the file behind a mapping, or None where that is not allowed or not a plain file.

    Raises FileNotFoundError where the mapping is not there any more. The file is looked at before it is
    opened: to open a device does something.
    """
    path = f"{files.path}/map_files/{mapping.start:x}-{mapping.stop:x}"
    try:
        handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except PermissionError:
        return None
    try:
        status = os.fstat(handle)
        device = os.major(status.st_dev), os.minor(status.st_dev)
        if (device, status.st_ino) != (mapping.device, mapping.inode):
            raise FileNotFoundError(path)
        if not stat.S_ISREG(status.st_mode):
            return None
        for flags in (os.O_NOATIME, 0):
            try:
                return os.open(f"/proc/self/fd/{handle}", os.O_RDONLY | os.O_CLOEXEC | flags)
            except PermissionError:
                continue
        return None
    finally:
        os.close(handle)


def _read_file(mapping: Mapping, descriptor: int, address: int, view: memoryview) -> None:
    """Fill `view` with what a file mapped at `address` holds; the rest of its last page reads as zeros."""
    offset = mapping.offset + address - mapping.start
    done = 0
    while done < len(view):
        count = os.preadv(descriptor, (view[done:],), offset + done)
        if count == 0:
            break
        done += count
    valid = min(len(view), max(_page_stop(os.fstat(descriptor).st_size) - offset, 0))
    if done < valid:
        zero(view[done:valid])
    if max(done, valid) < len(view):
        raise SourceFaultError(address + max(done, valid), detail="the file behind the mapping ends before")


def _read_memory_file(files: Descriptors, mapping: Mapping, address: int, view: memoryview) -> bool:
    """Fill `view` from shared memory without touching it; False where that is not allowed."""
    descriptor = open_mapped(files, mapping)
    if descriptor is not None:
        try:
            _read_file(mapping, descriptor, address, view)
        finally:
            os.close(descriptor)
        return True
    if mapping.huge and not mapping.shared and files.mappings.name(mapping) == b"/anon_hugepage (deleted)":
        zero(view)
        return True
    return False


def _touch(files: Descriptors, mapping: Mapping, address: int, view: memoryview) -> None:
    """Fill `view` through the process from pages that are not present.

    By process_vm_readv wherever the mapping can be read: mem would call into a driver (generic_access_phys)
    where the mapping is of a device, and reading a register can change it.
    """
    count = _copy_vector(files, address, view) if mapping.readable else 0
    if count == len(view):
        return
    if not (mapping.readable and files.vectors):
        copy(files, address + count, view[count:])
        return
    kind = FaultKind.SOURCE if mapping.storage in _OF_FILES else FaultKind.ABSENT
    raise fault(address + count, kind)


def _read_missing_part(
    files: Descriptors, mapping: Mapping, address: int, view: memoryview, *, wait: bool
) -> None:
    if mapping.storage is Storage.ANONYMOUS:
        zero(view)
        return
    if not wait and mapping.storage is not Storage.KERNEL:
        raise WouldWaitError
    in_memory = mapping.storage in (Storage.SHARED_MEMORY, Storage.MEMORY_FILE)
    if not (in_memory and _read_memory_file(files, mapping, address, view)):
        _touch(files, mapping, address, view)


def read_missing(files: Descriptors, walk: Walk, address: int, view: memoryview, *, wait: bool) -> None:
    """Fill `view` with what pages that are not held would show."""
    size, done, changes = len(view), 0, 0
    while done < size:
        at = address + done
        mapping = walk.at(at)
        if mapping is None:
            raise FaultError(at)
        step = min(size - done, mapping.stop - at)
        try:
            _read_missing_part(files, mapping, at, view[done : done + step], wait=wait)
        except FileNotFoundError:
            changes += 1
            walk.again()
            if changes == CHANGES:
                raise FaultError(at, detail="its mapping changes all the time") from None
            continue
        done += step


def read(
    files: Descriptors, address: int, view: memoryview, *, wait: bool = True, walk: Walk | None = None
) -> None:
    """Fill `view` with the bytes from `address` on; `walk`, where there is one, is shared by several reads.

    Raises FaultError with the first bad address, AddressSpaceGoneError, and WouldWaitError unless `wait`.
    """
    size = len(view)
    if size and not 0 <= address < ADDRESS_SPACE:
        raise FaultError(address)
    if walk is None:
        with Walk(files, wait=wait) as walk:
            read(files, address, view, wait=wait, walk=walk)
        return
    for offset in range(0, size, CHUNK):
        stop = address + min(size, offset + CHUNK)
        for held, begin, end in parts(files, address + offset, stop, wait=wait):
            part = view[begin - address : end - address]
            if held:
                copy(files, begin, part)
            else:
                read_missing(files, walk, begin, part, wait=wait)


def _store(files: Descriptors, address: int, view: memoryview) -> None:
    done = 0
    while done < len(view):
        at = address + done
        try:
            count = os.pwrite(files.mem, view[done:], at)
        except (OSError, OverflowError) as error:
            if isinstance(error, OSError) and error.errno not in (errno.EIO, errno.EFAULT, errno.EINVAL):
                raise
            kind = FaultKind.ABSENT if files.mapping_at(at) is None else FaultKind.READ_ONLY
            raise fault(at, kind) from None
        if count == 0:
            raise AddressSpaceGoneError
        done += count


def write(files: Descriptors, address: int, view: memoryview, *, walk: Walk | None = None) -> None:
    """Store `view` at `address`, through pages that are read-only too (FOLL_FORCE, as a debugger does).

    Raises FaultError with the first address that was not written, AddressSpaceGoneError.
    """
    size = len(view)
    if size and not 0 <= address < ADDRESS_SPACE:
        raise FaultError(address)
    if walk is None:
        with Walk(files) as walk:
            write(files, address, view, walk=walk)
        return
    for offset in range(0, size, CHUNK):
        stop = address + min(size, offset + CHUNK)
        for held, begin, end in parts(files, address + offset, stop):
            at = begin
            while at < end:
                # Writing where nothing is mapped may make a stack grow.
                mapping = None if held else walk.at(at)
                if not held and mapping is None:
                    raise FaultError(at)
                last = end if mapping is None else min(end, mapping.stop)
                _store(files, at, view[at - address : last - address])
                at = last
