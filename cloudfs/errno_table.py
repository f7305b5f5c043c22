"""What an error means to a file system: the only file with errno constants.

A class without a row has the row of the nearest class above it. A new class of `engine.errors` needs a row
only where it differs from its parent.
"""

from __future__ import annotations

import errno
import os

from engine.errors import (
    AccessDeniedError,
    AlreadyExistsError,
    BadDataError,
    ConnectorClosedError,
    EngineError,
    FaultError,
    InvalidArgumentError,
    NotFoundError,
    NotRecognisedError,
    PluginError,
    ProcessExitedError,
    ReadOnlyError,
    TargetBusyError,
    TargetGoneError,
    TargetTimeoutError,
    UnsupportedError,
)

ERRNO: dict[type[BaseException], int] = {
    FaultError: errno.EIO,  # as /proc/PID/mem answers for a hole
    BadDataError: errno.EIO,
    NotFoundError: errno.ENOENT,
    ProcessExitedError: errno.ESRCH,  # as /proc/PID/maps after the exit
    ReadOnlyError: errno.EROFS,
    InvalidArgumentError: errno.EINVAL,
    NotRecognisedError: errno.ENXIO,
    AlreadyExistsError: errno.EEXIST,
    UnsupportedError: errno.EOPNOTSUPP,
    ConnectorClosedError: errno.ENODEV,
    TargetGoneError: errno.ENODEV,
    TargetBusyError: errno.EBUSY,
    AccessDeniedError: errno.EACCES,
    TargetTimeoutError: errno.ETIMEDOUT,
    PluginError: errno.ENXIO,
    # What Python code raises without a number: `raise PermissionError("…")`.
    PermissionError: errno.EPERM,
    FileNotFoundError: errno.ENOENT,
    FileExistsError: errno.EEXIST,
    NotADirectoryError: errno.ENOTDIR,
    IsADirectoryError: errno.EISDIR,
    ProcessLookupError: errno.ESRCH,
    TimeoutError: errno.ETIMEDOUT,
    BlockingIOError: errno.EAGAIN,
    InterruptedError: errno.EINTR,
    BrokenPipeError: errno.EPIPE,
    ConnectionAbortedError: errno.ECONNABORTED,
    ConnectionRefusedError: errno.ECONNREFUSED,
    ConnectionResetError: errno.ECONNRESET,
}

BUG = errno.EIO
"""What any other exception becomes."""

MAX_ERRNO = 511
"""The kernel takes no reply with an errno of 512 or more (fs/fuse/dev.c, fuse_dev_do_write): the caller
would wait for ever.
"""


def errno_of(error: BaseException) -> int:
    """The errno of an error, in 1 … 511 and never ENOSYS.

    The kernel takes ENOSYS as «this file system will never do that» and stops asking.
    """
    number = error.errno if isinstance(error, OSError) else None
    if number is None:
        number = next((ERRNO[kind] for kind in type(error).__mro__ if kind in ERRNO), BUG)
    if number == errno.ENOSYS:
        return errno.EOPNOTSUPP
    return number if isinstance(number, int) and 0 < number <= MAX_ERRNO else BUG


def is_bug(error: BaseException) -> bool:
    """Whether nobody raises it on purpose, so that it belongs in the log with its traceback."""
    return not isinstance(error, (EngineError, OSError))


def sentence(error: BaseException) -> str:
    """The error as one line for a person."""
    if isinstance(error, OSError) and error.errno is not None:
        text = error.strerror or os.strerror(error.errno)
        if error.filename is not None:
            text = f"{os.fsdecode(error.filename)}: {text}"
    else:
        text = str(error)
    if is_bug(error):
        text = f"a bug, {type(error).__name__}" + (f": {text}" if text else "")
    return " ".join(text.split()) or type(error).__name__
