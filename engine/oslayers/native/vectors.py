"""process_vm_readv(2) and process_vm_writev(2): many bytes, or many places, in one call.

They go by PID. Whoever calls them finds out after the call that the PID still meant the same process and
address space, else what came may be another one's. They read no page that the process itself could not
read, where /proc/PID/mem does.
"""

from __future__ import annotations

import ctypes
import errno
import struct
import threading
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from engine.memory import Addresses, Rows

MOST_ROWS = 1024
"""IOV_MAX, include/uapi/linux/uio.h."""

_library = ctypes.CDLL(None, use_errno=True)
_PROTOTYPE = (ctypes.c_int, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_ulong)


def _function(name: str) -> Callable[..., int] | None:
    try:
        function = _library[name]
    except AttributeError:
        return None
    function.argtypes = _PROTOTYPE
    function.restype = ctypes.c_ssize_t
    return function


_readv = _function("process_vm_readv")
_writev = _function("process_vm_writev")


class _Vectors(threading.local):
    """Two iovecs of this thread: the local one, the remote one."""

    def __init__(self) -> None:
        self.buffer = bytearray(32)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.buffer))


_vectors = _Vectors()
_pack = struct.Struct("@4Q").pack_into


def available() -> bool:
    """Whether this system has the calls at all; a sandbox may still refuse them (EPERM, ENOSYS)."""
    return _readv is not None and _writev is not None


def refused(code: int) -> bool:
    """Whether an errno says that the calls are not to be had here, whatever the address."""
    return code in (errno.EPERM, errno.ENOSYS, errno.EACCES)


def read_span(pid: int, address: int, view: memoryview) -> int:
    """Bytes that were read from `address` on into `view`, or the negative errno where there was none."""
    if _readv is None:
        return -errno.ENOSYS
    size = len(view)
    target = ctypes.c_char.from_buffer(view)
    _pack(_vectors.buffer, 0, ctypes.addressof(target), size, address, size)
    local = _vectors.address
    done = _readv(pid, local, 1, local + 16, 1, 0)
    return done if done >= 0 else -ctypes.get_errno()


def _iovecs(addresses: Addresses, width: int) -> npt.NDArray[np.uint64]:
    vectors = np.empty((len(addresses), 2), np.uint64)
    vectors[:, 0] = addresses
    vectors[:, 1] = width
    return vectors


def read_rows(pid: int, addresses: Addresses, out: Rows) -> int:
    """Bytes that were read into the contiguous `out`, row by row up to the first bad piece, or -errno."""
    if _readv is None:
        return -errno.ENOSYS
    remote = _iovecs(addresses, out.shape[1])
    _pack(_vectors.buffer, 0, out.ctypes.data, out.nbytes, 0, 0)
    done = _readv(pid, _vectors.address, 1, remote.ctypes.data, len(remote), 0)
    return done if done >= 0 else -ctypes.get_errno()


def write_rows(pid: int, addresses: Addresses, rows: Rows) -> int:
    """Bytes of the contiguous `rows` that were stored, row by row up to the first bad piece, or -errno."""
    if _writev is None:
        return -errno.ENOSYS
    remote = _iovecs(addresses, rows.shape[1])
    _pack(_vectors.buffer, 0, rows.ctypes.data, rows.nbytes, 0, 0)
    done = _writev(pid, _vectors.address, 1, remote.ctypes.data, len(remote), 0)
    return done if done >= 0 else -ctypes.get_errno()
