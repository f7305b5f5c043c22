"""GDB's remote serial protocol, the client's side: packets, pipelining, time limits.

    wire = Wire.connect(endpoint("localhost:1234"), limit=5.0)
    wire.ask(b"qSupported")              # b"PacketSize=1000;…"
    wire.ask_all([b"m0,8", b"m8,8"])     # sent together, answered in order

Source: «Debugging with GDB», appendix «GDB Remote Serial Protocol» (GDB 13): Overview (framing, acknowledgement,
escapes and run lengths), Packets, General Query Packets, Stop Reply Packets.

What it cannot do: notifications of non-stop mode are dropped; one conversation at a time, the caller's lock.
"""

from __future__ import annotations

import contextlib
import re
import socket
import time
from collections.abc import Iterator, Sequence
from typing import Self

import numpy as np

from engine.errors import BadDataError, InvalidArgumentError, NotFoundError, TargetGoneError, TargetTimeoutError

DEPTH = 64
"""Commands that are under way together; of QEMU's stub 1 MiB takes 42 ms one by one and 8 ms so (measured)."""
PACKET_MOST = 1 << 20
"""Bytes of one answer; the largest that stubs announce are 128 KiB."""
STRAY_MOST = 1000
"""Stop replies and console texts before an answer, at the most."""
INTERRUPT = b"\x03"
UNKNOWN = b"vMustReplyEmpty"
"""What no stub knows, and all answer with an empty packet."""
_ESCAPED = re.compile(rb"[#$}*]")
_STOPPED = re.compile(rb"[ST][0-9a-fA-F]{2}")
_ENDED = re.compile(rb"[WX][0-9a-fA-F]{2}(?:;.*)?", re.DOTALL)
_PRINTED = re.compile(rb"O(?:[0-9a-fA-F]{2})*")
_RUN = re.compile(rb"(.)\*(.)", re.DOTALL)
_ESCAPE = re.compile(rb"}(.)", re.DOTALL)

Endpoint = str | tuple[str, int]
"""The path of a socket, or host and port."""


def endpoint(target: str) -> Endpoint:
    """What HOST:PORT, PORT or a path means. Raises InvalidArgumentError."""
    if "/" in target:
        return target
    host, _, port = target.rpartition(":")
    if not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise InvalidArgumentError(f"{target!r} is no address of a stub: want HOST:PORT, PORT or the path of a socket")
    return (host.strip("[]") or "localhost", int(port))


def name_of(where: Endpoint) -> str:
    """The endpoint in one word."""
    return where if isinstance(where, str) else f"{where[0]}:{where[1]}"


def checksum(body: bytes) -> int:
    """The sum of all bytes modulo 256; in numpy, for Python's own sum takes longer than all else of a read."""
    return int(np.add.reduce(np.frombuffer(body, np.uint8), dtype=np.uint64)) & 0xFF


def framed(data: bytes) -> bytes:
    """`data` as a packet."""
    body = _ESCAPED.sub(lambda match: b"}" + bytes([match[0][0] ^ 0x20]), data)
    return b"$%b#%02x" % (body, sum(body) & 0xFF if len(body) < 64 else checksum(body))


def unpacked(body: bytes) -> bytes:
    """What a packet's body says: escapes and run lengths undone. Raises ValueError where it would be too long."""
    if b"*" in body:
        size = len(body) + sum(match[2][0] for match in _RUN.finditer(body))
        if size > PACKET_MOST:
            raise ValueError("too long")
        body = _RUN.sub(lambda match: match[1] * (match[2][0] - 28), body)
    return _ESCAPE.sub(lambda match: bytes([match[1][0] ^ 0x20]), body) if b"}" in body else body


def is_stop(packet: bytes) -> bool:
    """Whether it says that the target has stopped."""
    return _STOPPED.match(packet) is not None


class Wire:
    """A connection to a stub.

    Every method raises TargetTimeoutError where the stub is silent for `limit` seconds, TargetGoneError where it
    hangs up, and BadDataError where it answers nonsense; the connection is of no use then.
    """

    def __init__(self, connection: socket.socket, name: str, limit: float) -> None:
        self.name = name
        self.limit = limit
        self.depth = DEPTH
        """How many commands are under way together; 1 for a line that loses what it is not waiting for."""
        self.checks_order = True
        """Whether answers are checked to be in order: on a line that delays or repeats them they may not be."""
        self.acknowledges = True
        """Whether each packet is acknowledged: until the stub has agreed to QStartNoAckMode."""
        self.stray: list[bytes] = []
        """Stop replies that nobody had asked for, as far as they were met."""
        self._socket = connection
        self._received = bytearray()

    @classmethod
    def connect(cls, where: Endpoint, limit: float) -> Self:
        """Connect within `limit` seconds. Raises NotFoundError where nobody listens, TargetTimeoutError."""
        name = name_of(where)
        try:
            if isinstance(where, str):
                connection = socket.socket(socket.AF_UNIX)
                try:
                    connection.settimeout(limit)
                    connection.connect(where)
                except BaseException:
                    connection.close()
                    raise
            else:
                connection = socket.create_connection(where, limit)
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        except TimeoutError:
            raise TargetTimeoutError(f"{name} did not accept a connection within {limit:g} s") from None
        except OSError as error:
            raise NotFoundError(f"no stub listens at {name}: {error.strerror or error}") from None
        return cls(connection, name, limit)

    def close(self) -> None:
        """Hang up, whoever else holds the connection."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def fileno(self) -> int:
        """The connection's descriptor."""
        return self._socket.fileno()

    # -- bytes -------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _connected(self) -> Iterator[None]:
        try:
            yield
        except TimeoutError:
            raise TargetTimeoutError(
                f"the stub at {self.name} was silent for {self.limit:g} s: another debugger may be connected to it; "
                "kgdb listens only once its kernel has stopped (SysRq g)"
            ) from None
        except OSError as error:
            raise TargetGoneError(f"the stub at {self.name} is gone: {error.strerror or error}") from None

    def send(self, data: bytes) -> None:
        """Bytes as they stand."""
        with self._connected():
            self._socket.settimeout(self.limit)
            self._socket.sendall(data)

    def check(self) -> None:
        """Raise TargetGoneError where the stub has hung up; waits for nothing."""
        with self._connected():
            self._socket.settimeout(0)
            try:
                gone = not self._socket.recv(1, socket.MSG_PEEK)
            except BlockingIOError:
                return
        if gone:
            raise TargetGoneError(f"the stub at {self.name} hung up")

    def _receive(self, deadline: float) -> None:
        with self._connected():
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError
            self._socket.settimeout(left)
            data = self._socket.recv(1 << 18)
        if not data:
            raise TargetGoneError(f"the stub at {self.name} hung up")
        self._received += data

    def packet(self, *, acknowledge: bool = True, deadline: float | None = None) -> bytes:
        """The next packet; it must come within the limit, or before the deadline."""
        deadline = time.monotonic() + self.limit if deadline is None else deadline
        while True:
            found = self._take()
            if found is not None:
                if self.acknowledges and acknowledge:
                    self.send(b"+")
                return found
            if len(self._received) > 2 * PACKET_MOST:
                raise self._nonsense("a packet without an end")
            self._receive(deadline)

    def _take(self) -> bytes | None:
        """The next whole packet of what came, without what stands before it; None where there is none yet."""
        received = self._received
        while True:
            start = received.find(b"$")
            notice = received.find(b"%", 0, start if start >= 0 else None)
            if start < 0 and notice < 0:
                received.clear()  # acknowledgements
                return None
            if notice >= 0:
                start = notice
            end = received.find(b"#", start)
            if end < 0 or len(received) < end + 3:
                return None
            body, told = bytes(received[start + 1 : end]), bytes(received[end + 1 : end + 3])
            del received[: end + 3]
            if notice < 0:
                return self._checked(body, told)

    def _checked(self, body: bytes, told: bytes) -> bytes:
        try:
            right = int(told, 16) == checksum(body)
            if right:
                return unpacked(body)
        except ValueError:
            pass
        raise self._nonsense("a packet whose checksum is wrong")

    def _nonsense(self, what: str) -> BadDataError:
        return BadDataError(0, detail=f"the stub at {self.name} sent {what}")

    # -- conversations -----------------------------------------------------------------------------------

    def tell(self, command: bytes) -> None:
        """A command that nothing answers at once."""
        self.send(framed(command))

    def ask(self, command: bytes) -> bytes:
        """The answer to one command; empty where the stub does not know it."""
        self.tell(command)
        return self.answer()

    def status(self) -> bytes:
        """The stop reply to `?`, which says how the target stands; or what else the stub answers.

        Raises TargetGoneError where it has ended.
        """
        self.tell(b"?")
        found = self._checked_end(self.packet())
        while _PRINTED.fullmatch(found):
            found = self._checked_end(self.packet())
        return found

    def answer(self, *, acknowledge: bool = True, console: bool = False) -> bytes:
        """The next packet that is no stop reply; these go to `stray`. What a target prints counts with `console`.

        Raises TargetGoneError where the target has ended.
        """
        for _ in range(STRAY_MOST):
            found = self._checked_end(self.packet(acknowledge=acknowledge))
            if is_stop(found):
                self.stray.append(found)
            elif console or not _PRINTED.fullmatch(found):
                return found
        raise self._nonsense("stop replies without an end")

    def _checked_end(self, packet: bytes) -> bytes:
        if _ENDED.fullmatch(packet):
            raise TargetGoneError(f"the target of the stub at {self.name} has ended")
        return packet

    def stopped(self) -> bytes:
        """The next stop reply; what else was under way is passed over. Raises TargetGoneError where it has ended."""
        deadline = time.monotonic() + self.limit
        for _ in range(STRAY_MOST):
            found = self._checked_end(self.packet(deadline=deadline))
            if is_stop(found):
                return found
        raise self._nonsense("answers to no question without an end")

    def ask_all(self, commands: Sequence[bytes]) -> list[bytes]:
        """The answers to many commands, in their order. Raises BadDataError where they cannot be in it."""
        answers: list[bytes] = []
        depth = self.depth - self.checks_order
        for begin in range(0, len(commands), max(1, depth)):
            group = [*commands[begin : begin + max(1, depth)], *([UNKNOWN] if self.checks_order else [])]
            if depth < 1:
                answers += [self.ask(command) for command in group]
            else:
                # Acknowledged before they are there: a system call for each would cost more than the answers.
                between = b"+" if self.acknowledges else b""
                self.send(between.join([*map(framed, group), b""]))
                answers += [self.answer(acknowledge=False) for _ in group]
            if self.checks_order and answers.pop():
                raise self._nonsense("an answer to what it cannot know: its answers are not in order")
        return answers

    def document(self, kind: str, annex: str, most: int = PACKET_MOST) -> bytes | None:
        """A document of qXfer:KIND:read; None where there is none."""
        parts, size = [], 0
        while size <= most:
            reply = self.ask(f"qXfer:{kind}:read:{annex}:{size:x},f00".encode())
            if reply[:1] not in (b"m", b"l"):
                return None
            parts.append(reply[1:])
            size += len(reply) - 1
            if reply[:1] == b"l":
                return b"".join(parts)
            if len(reply) == 1:
                break
        raise self._nonsense(f"a document {kind} {annex} without an end")

    def monitor(self, command: str, most: int = PACKET_MOST) -> str | None:
        """What the stub's own monitor prints to a command (qRcmd); None where it has none."""
        self.tell(b"qRcmd," + command.encode().hex().encode())
        printed = bytearray()
        while len(printed) <= most:
            reply = self.answer(console=True)
            if reply[:1] != b"O" or reply == b"OK":
                return printed.decode(errors="replace").replace("\r\n", "\n") if reply == b"OK" else None
            try:
                printed += bytes.fromhex(reply[1:].decode("ascii"))
            except ValueError:
                raise self._nonsense("a console text that is not hexadecimal") from None
        raise self._nonsense("a console text without an end")
