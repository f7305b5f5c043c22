"""Where the program `cloudfs` begins: Ctrl-C ends it in silence, also while it is still being loaded.

Nothing that takes time is imported before the handler stands.
"""

from __future__ import annotations

# What `signal` wraps, built in: the other takes milliseconds, in which Ctrl-C would show a traceback.
import _signal  # type: ignore[import-not-found] # typeshed does not know it
import os

TYPE_CHECKING = False
if TYPE_CHECKING:  # `typing` takes milliseconds too
    from collections.abc import Callable

INTERRUPTED = 130
"""128 + SIGINT: what a shell says of a program that Ctrl-C has ended."""


MOUNT_INTERRUPTED = 8
"""What mount(8) says of it."""


def main() -> int:
    """Run the command line of this process, and give its exit code.

    While a command runs KeyboardInterrupt is raised, so that it can clean up. Where SIGINT is ignored, as in what a
    script starts in the background, it stays so.
    """

    def run(loaded: Callable[[], None]) -> int:
        from cloudfs import cli

        return cli.main(loaded=loaded)

    return _interruptible(run, INTERRUPTED)


def mount_helper() -> int:
    """Run this process as a helper of mount(8), likewise."""

    def run(loaded: Callable[[], None]) -> int:
        from cloudfs import mount_helper

        return mount_helper.main(loaded=loaded)

    return _interruptible(run, MOUNT_INTERRUPTED)


def _interruptible(run: Callable[[Callable[[], None]], int], interrupted: int) -> int:
    """What `run` gives. Ctrl-C ends the process at once before it calls what it is given, and after it."""

    def end(*_: object) -> None:  # nothing is open yet, or nothing any more: there is nobody to unwind for
        os._exit(interrupted)

    if _signal.getsignal(_signal.SIGINT) is not _signal.default_int_handler:
        return run(lambda: None)
    _signal.signal(_signal.SIGINT, end)
    code = run(lambda: _signal.signal(_signal.SIGINT, _signal.default_int_handler))
    if _signal.getsignal(_signal.SIGINT) is not _signal.SIG_IGN:  # as when a daemon has been started
        _signal.signal(_signal.SIGINT, end)
    return code
