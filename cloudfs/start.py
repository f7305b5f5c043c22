"""Where the program `cloudfs` begins: Ctrl-C ends it in silence, also while it is still being loaded.

Nothing that takes time is imported before the handler stands.
"""

from __future__ import annotations

# What `signal` wraps, built in: the other takes milliseconds, in which Ctrl-C would show a traceback.
import _signal  # type: ignore[import-not-found] # typeshed does not know it
import os

INTERRUPTED = 130
"""128 + SIGINT: what a shell says of a program that Ctrl-C has ended."""


def _end(*_: object) -> None:
    """End at once. Nothing is open yet, or nothing any more: there is nobody to unwind for."""
    os._exit(INTERRUPTED)


def main() -> int:
    """Run the command line of this process, and give its exit code.

    While a command runs KeyboardInterrupt is raised, so that it can clean up. Where SIGINT is ignored, as in what a
    script starts in the background, it stays so.
    """
    ignored = _signal.getsignal(_signal.SIGINT) is not _signal.default_int_handler
    if not ignored:
        _signal.signal(_signal.SIGINT, _end)
    from cloudfs import cli

    def loaded() -> None:
        if not ignored:
            _signal.signal(_signal.SIGINT, _signal.default_int_handler)

    code = cli.main(loaded=loaded)
    if not ignored:
        _signal.signal(_signal.SIGINT, _end)
    return code
