"""A stub as a source of memory: stopped while one looks, let go afterwards.

Memory can be read over this protocol only while the target stands still. A `Session` stops it when it is asked for
something, and lets it run on when nothing was asked for `grace` seconds (`brief`), or when it is closed (`hold`).
What was read while it stood still is kept until it runs again: nothing can have changed.

How it was found it is left: running, but where it is known to have stood still before (QEMU that was never started,
or was paused by somebody else).
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from engine.connectors.gdb.guardian import Guardian
from engine.connectors.gdb.stub import Kind, greet, leave
from engine.connectors.gdb.wire import INTERRUPT, Endpoint, Wire, name_of
from engine.errors import (
    BadDataError,
    ConnectorClosedError,
    EngineError,
    TargetGoneError,
    TargetTimeoutError,
    UnsupportedError,
)

log = logging.getLogger(__name__)

GRACE = 0.02
"""Seconds that a target stands still after the last question: the next one comes within them, or much later."""
PAGE = 4096
KEPT_PAGES = 1 << 14
"""Pages that are kept while the target stands still: 64 MiB."""
LOST = (TargetTimeoutError, TargetGoneError, BadDataError)
T = TypeVar("T")


class Session:
    """One stub; every method may be called in any thread, and waits for the others."""

    def __init__(self, where: Endpoint, limit: float, *, hold: bool, physical: bool | None) -> None:
        """Connect, and learn what the stub can. Raises NotFoundError, TargetTimeoutError, UnsupportedError."""
        self.name = name_of(where)
        self.hold = hold
        self.was_running = True
        self.stops = 0
        """How often the target was stopped."""
        self._where, self._limit = where, limit
        self._want_physical = physical
        self._held = int(hold)
        self._wire: Wire | None = None
        self._guardian: Guardian | None = None
        self._one_by_one = False
        self._cannot_stop = False
        """Whether it was let go and is out of reach: qemu-x86_64 -g stops a program but once."""
        self._left_standing = False
        """Whether it stood still when the connection was lost."""
        self._closed = False
        self._pages: dict[int, bytes] = {}
        self._turn = threading.RLock()
        self._due = threading.Condition(threading.Lock())
        self._deadline: float | None = None
        self._thread: threading.Thread | None = None
        self._stopped = False
        self._checked = 0.0
        with self._turn:
            self._connect(first=True)
            self._let_go_later()
        if physical and not self.stub.physical:
            self.close()
            raise UnsupportedError(
                f"the stub at {self.name} has no physical addresses (only QEMU's has): physical=no reads what the "
                "processor's own page tables map"
            )

    # -- connecting --------------------------------------------------------------------------------------

    def _connect(self, *, first: bool) -> Wire:
        wire = Wire.connect(self._where, self._limit)
        try:
            stub = greet(wire, physical=self._want_physical)
        except BaseException:
            wire.close()
            raise
        if first:
            self.stub, self.was_running = stub, stub.was_running
        if self._one_by_one:
            wire.depth = 1
        self._wire, self._stopped = wire, True
        self._guardian = Guardian.of(wire, stub)
        self._told()
        self.stops += 1
        return wire

    def _told(self) -> None:
        """Tell the guardian how it is."""
        if self._guardian is not None:
            tell = self._guardian.stands if self._stopped and self.was_running else self._guardian.runs
            tell()

    # -- standing still ----------------------------------------------------------------------------------

    def use(self, action: Callable[[Wire], T], *, again: bool = True) -> T:
        """What `action` gives while the target stands still; with `again` once more where the connection was lost.

        Raises TargetTimeoutError, TargetGoneError and BadDataError as the connection does, ConnectorClosedError.
        """
        with self._turn:
            try:
                return self._try(action)
            except LOST as error:
                silent = isinstance(error, TargetTimeoutError) and not self._stopped
                # A line without flow control loses what comes while its stub is busy with an answer.
                self._one_by_one |= self._stopped and isinstance(error, (TargetTimeoutError, BadDataError))
                self._drop()
                if silent or not again:
                    raise
            log.info("lost the stub at %s: connecting again", self.name)
            try:
                return self._try(action)
            except LOST:
                self._drop()
                raise

    def _try(self, action: Callable[[Wire], T]) -> T:
        if self._closed:
            raise ConnectorClosedError(f"the connection to {self.name} was closed")
        if self._cannot_stop:
            raise TargetTimeoutError(self._still_running)
        wire = self._wire or self._connect(first=False)
        wire.check()  # what is kept needs no question
        self._checked = time.monotonic()
        if not self._stopped:
            self._stop(wire)
        try:
            return action(wire)
        finally:
            self._let_go_later()

    def _stop(self, wire: Wire) -> None:
        wire.send(INTERRUPT)
        try:
            wire.stopped()
        except TargetTimeoutError:
            if self.stub.kind is not Kind.QEMU:
                self._cannot_stop = True
            raise TargetTimeoutError(self._still_running) from None
        self._stopped = True
        self.stops += 1
        self._told()

    @property
    def _still_running(self) -> str:
        return (
            f"the stub at {self.name} did not stop its target again within {self._limit:g} s: some can do so but once, "
            "and want stop=hold"
        )

    def _drop(self) -> None:
        if self._guardian is not None:
            self._guardian.close()
        if self._wire is not None:
            self._wire.close()
            self._left_standing = self._stopped
        self._guardian = None
        self._wire, self._stopped = None, False
        self._pages.clear()

    def _let_go_later(self) -> None:
        if self._held or not self.was_running:
            return
        if self._deadline is not None:  # the thread is awake, and sees this before it lets go: it wants our turn
            self._deadline = time.monotonic() + GRACE
            return
        with self._due:
            self._deadline = time.monotonic() + GRACE
            if self._thread is None:
                self._thread = threading.Thread(target=self._let_go_in_time, name=f"gdb {self.name}", daemon=True)
                self._thread.start()
            self._due.notify()

    def _let_go_in_time(self) -> None:
        """Let the target run whenever nothing was asked for a moment; sleeps without a timer otherwise."""
        while True:
            with self._due:
                while self._deadline is None and not self._closed:
                    self._due.wait()
                if self._closed:
                    return
                left = (self._deadline or 0) - time.monotonic()
                if left > 0:
                    self._due.wait(left)
                    continue
                self._deadline = None
            with self._turn, contextlib.suppress(EngineError):
                if not (self._closed or self._held or self._deadline is not None):
                    self._let_go()

    def _let_go(self) -> None:
        if self._wire is not None and self._stopped:
            self._pages.clear()
            self._stopped = False
            try:
                self._wire.tell(b"c")
            except EngineError:
                self._drop()
                raise
            self._told()

    def pause(self) -> None:
        """Keep it stopped until `resume`."""
        with self._turn:
            self._held += 1
            try:
                self.use(_nothing)
            except BaseException:
                self._held -= 1
                raise

    def resume(self) -> None:
        """Undo one `pause`; a target that stood still when it was found runs from now on."""
        with self._turn:
            self._held = max(int(self.hold), self._held - 1)
            self.was_running = True
            if not self._held:
                self._let_go()

    def close(self) -> None:
        """Leave the target as it was found, and hang up."""
        with self._turn:
            if self._closed:
                return
            try:
                self._leave()
            except EngineError as error:
                log.warning("the target at %s was not left properly: %s", self.name, error)
            self._drop()
            self._closed = True
        with self._due:
            self._due.notify()

    def _leave(self) -> None:
        wire = self._wire
        if wire is None and self.was_running and self._left_standing:
            wire = self._connect(first=False)
        if wire is None:
            return
        if not self._stopped:
            self._stop(wire)
        leave(wire, self.stub, runs_on=self.was_running)

    # -- what is asked -----------------------------------------------------------------------------------

    def kept(self, numbers: Sequence[int]) -> dict[int, bytes] | None:
        """Pages that were read while the target stands still as it does; None where one of them was not.

        Whether the stub is still there is not asked more than once in `GRACE`.
        """
        with self._turn:
            if not self._stopped or self._closed or time.monotonic() - self._checked > GRACE:
                return None
            pages = self._pages
            found = {number: pages[number] for number in numbers if number in pages}
            if len(found) < len(numbers):
                return None
            self._let_go_later()
            return found

    def read_pages(self, numbers: Sequence[int]) -> dict[int, bytes]:
        """Whole pages by number, as far as they can be read: a page that cannot is shorter, or empty."""
        kept = self.kept(numbers)
        if kept is not None:
            return kept

        def fetch(wire: Wire) -> dict[int, bytes]:
            pages = self._pages
            missing = [number for number in numbers if number not in pages]
            if len(pages) + len(missing) > KEPT_PAGES:
                pages.clear()
                missing = list(numbers)
            got = self._read(wire, [(number * PAGE, PAGE) for number in missing])
            found = dict(zip(missing, got, strict=True))
            if len(found) <= KEPT_PAGES:
                pages.update(found)
            return {number: found[number] if number in found else pages[number] for number in numbers}

        return self.use(fetch)

    def read(self, requests: Sequence[tuple[int, int]]) -> list[bytes]:
        """(address, size) each exactly as it is; what cannot be read is missing at the end."""
        return self.use(lambda wire: self._read(wire, requests))

    def _read(self, wire: Wire, requests: Sequence[tuple[int, int]]) -> list[bytes]:
        chunk = self.stub.chunk
        parts = [
            (row, address + offset, min(chunk, size - offset))
            for row, (address, size) in enumerate(requests)
            for offset in range(0, size, chunk)
        ]
        replies = wire.ask_all([b"m%x,%x" % (address, size) for _, address, size in parts])
        found = [bytearray() for _ in requests]
        broken = [False] * len(requests)
        for (row, address, size), reply in zip(parts, replies, strict=True):
            if not broken[row]:
                data = self._bytes_of(wire, address, size, reply)
                found[row] += data
                broken[row] = len(data) < size
        return [bytes(data) for data in found]

    def _bytes_of(self, wire: Wire, address: int, size: int, reply: bytes) -> bytes:
        """The bytes of one answer; where it is an error or too short, what can be had by smaller questions."""
        data = self._decoded(reply, size)
        while len(data) < size and data:
            more = self._decoded(wire.ask(b"m%x,%x" % (address + len(data), size - len(data))), size - len(data))
            if not more:
                break
            data += more
        step = size // 2
        while not data and step >= 1:  # refused as a whole: half of it, and so on
            first = self._decoded(wire.ask(b"m%x,%x" % (address, step)), step)
            if first:
                return first + self._rest(wire, address + len(first), size - len(first), step)
            step //= 2
        return data

    def _rest(self, wire: Wire, address: int, size: int, step: int) -> bytes:
        """What can be read behind a part that could, in steps that become smaller."""
        data = b""
        while step >= 1 and len(data) < size:
            part = self._decoded(wire.ask(b"m%x,%x" % (address + len(data), min(step, size - len(data)))), step)
            data += part
            step = step if part else step // 2
        return data

    def _decoded(self, reply: bytes, most: int) -> bytes:
        if reply[:1] == b"E" and len(reply) == 3:
            return b""
        try:
            data = bytes.fromhex(reply.decode("ascii"))
        except ValueError:
            data = b""
            if reply[:1] != b"E":
                raise BadDataError(0, detail=f"the stub at {self.name} sent memory that is not hexadecimal") from None
        return data[:most]

    def write(self, address: int, data: memoryview) -> int:
        """Store `data`; gives how many bytes were stored, from its start on."""

        def store(wire: Wire) -> int:
            done, chunk = 0, max(16, self.stub.chunk - 32)
            while done < len(data):
                part = data[done : done + chunk]
                for page in range((address + done) // PAGE, (address + done + len(part) - 1) // PAGE + 1):
                    self._pages.pop(page, None)
                if wire.ask(b"M%x,%x:%b" % (address + done, len(part), part.hex().encode())) != b"OK":
                    break
                done += len(part)
            return done

        return self.use(store, again=False)

    @contextlib.contextmanager
    def still(self) -> Iterator[None]:
        """Keep the target stopped for a while: what is read in it is of one moment."""
        self.pause()
        try:
            yield
        finally:
            with self._turn:
                self._held = max(int(self.hold), self._held - 1)
                self._let_go_later()


def _nothing(wire: Wire) -> None:
    """Only to have the target stopped."""
