"""Lets a target run on where this program is killed while it stands still.

    guardian = Guardian.of(wire, stub); guardian.stands(); guardian.runs(); guardian.close()

Who is killed detaches from nothing, and QEMU's stub leaves its machine stopped for ever when the connection drops. So
a small program of its own (sh) holds the connection too, sleeps until this one is gone, and has the target run on then
if it stood still at that moment.
"""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess

from engine.connectors.gdb.stub import Stub, last_words
from engine.connectors.gdb.wire import Wire, framed

log = logging.getLogger(__name__)

LIMIT = 3
"""Seconds in which a stub has to answer what was under way, and to listen."""
EXIT_LIMIT = 1.0
# Standard input says `stands`, `runs` or `over`, or ends; standard output is the connection. Answers to what was under
# way are read, for a stub that cannot send them hears nothing either.
_SCRIPT = f"""
while read -r word; do
    case $word in over) exit;; *) state=$word;; esac
done
[ "$state" = stands ] || exit
timeout {LIMIT} cat <&1 >/dev/null &
printf %s "$1"
wait
"""


class Guardian:
    """Watches over one connection."""

    def __init__(self, process: subprocess.Popen[bytes] | None, pipe: int) -> None:
        self._process = process
        self._pipe = pipe

    @classmethod
    def of(cls, wire: Wire, stub: Stub) -> Guardian:
        """Over this connection; one that can do nothing where sh is missing."""
        heard, pipe = os.pipe()
        # What was cut off in its middle ends here, with a checksum that is wrong.
        words = "#00" + "".join(framed(word).decode("ascii") for word in last_words(stub))
        try:
            process = subprocess.Popen(
                ["sh", "-c", _SCRIPT, "sh", words], stdin=heard, stdout=wire.fileno(), stderr=subprocess.DEVNULL,
                start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            log.info("where this program is killed the target of %s will stand still: %s", wire.name, error)
            process = None
        finally:
            os.close(heard)
        return cls(process, pipe)

    def _say(self, word: bytes) -> None:
        if self._pipe >= 0:
            with contextlib.suppress(OSError):
                os.write(self._pipe, word + b"\n")

    def stands(self) -> None:
        """From now on the target stands still."""
        self._say(b"stands")

    def runs(self) -> None:
        """From now on it runs, or is not to run on."""
        self._say(b"runs")

    def close(self) -> None:
        """Nothing is to be done any more: it was left as it was found, or is out of reach."""
        if self._pipe < 0:
            return
        self._say(b"over")
        os.close(self._pipe)
        self._pipe = -1
        if self._process is not None:
            try:
                self._process.wait(EXIT_LIMIT)
            except subprocess.TimeoutExpired:  # on a busy machine
                self._process.kill()
                self._process.wait()
