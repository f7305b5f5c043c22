"""A QEMU's monitors: its machine protocol (QMP), or the one for people; asked for a moment, within a time limit.

QEMU serves one client of a socket at a time: the next one waits, perhaps for ever, and whoever manages the guest waits
while we are there. So we come, ask and go; where nobody answers within `GREETING` seconds the socket is busy, and where
what answers is no QMP, or not the QEMU that we mean, it is left alone.

Sources: QEMU docs/interop/qmp-spec.txt; monitor/hmp.c and util/readline.c (what the other one prints: a banner, and a
prompt behind each answer; what is typed is echoed with sequences for terminals); unix(7) for SO_PEERCRED.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import struct
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from types import TracebackType
from typing import Any, Self

from engine.connectors.qemu.command_line import Address
from engine.connectors.qemu.places import reach
from engine.errors import AccessDeniedError, NotFoundError, TargetBusyError, TargetTimeoutError, UnsupportedError

GREETING = 1.0
"""Seconds for which we wait for QEMU to speak: it does so at once, or somebody else is connected."""
ANSWERS = 5.0
"""Seconds for all that is asked of it together: long only while QEMU itself stands still."""
ANSWER_LIMIT = 16 << 20
"""Bytes of an answer; `info mtree -f` of a large machine takes one MiB."""
BANNER_LIMIT = 1 << 12
"""Bytes in which the monitor for people has said what it is."""
_PROMPT = b"\n(qemu) "
_BANNER = re.compile(r"\s*QEMU \S.* monitor")
_SEQUENCES = re.compile(rb"\x1b\[[0-9;]*[A-Za-z]|\xff[\xfb-\xfe].", re.DOTALL)
"""For terminals (ECMA-48), and telnet's requests (RFC 854)."""
_CREDENTIALS = struct.Struct("3i")
_PIECE = 1 << 16


class MonitorError(UnsupportedError):
    """QEMU refused a command, or what answered is no QMP."""

    code = "monitor"


class Conversation(ABC):
    """One short conversation over a socket; use it as a context manager."""

    def __init__(self, connection: socket.socket, what: str, deadline: float | None = None) -> None:
        """`deadline` ends it, in seconds of time.monotonic(); by default it may take `ANSWERS`."""
        self._socket = connection
        self._what = what
        self._rest = bytearray()
        self._deadline = time.monotonic() + ANSWERS if deadline is None else deadline

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._socket.close()

    @contextlib.contextmanager
    def _greeted(self) -> Iterator[None]:
        """The time in which it must have greeted. Raises TargetBusyError where it says nothing."""
        whole, self._deadline = self._deadline, min(self._deadline, time.monotonic() + GREETING)
        try:
            yield
        except TargetTimeoutError:
            raise TargetBusyError(
                f"{self._what} does not answer: it serves one client, and another one is there"
            ) from None
        self._deadline = whole

    def _receive(self) -> None:
        """Have more to read. Raises TargetTimeoutError, MonitorError where it is closed or there is too much."""
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TargetTimeoutError(f"{self._what} did not answer in time")
        self._socket.settimeout(left)
        try:
            piece = self._socket.recv(_PIECE)
        except TimeoutError:
            return
        except OSError as error:
            raise MonitorError(f"{self._what}: {error.strerror}") from None
        if not piece:
            raise MonitorError(f"{self._what} closed the connection")
        self._rest += piece
        if len(self._rest) > ANSWER_LIMIT:
            raise MonitorError(f"{self._what} answered with more than {ANSWER_LIMIT >> 20} MiB")

    def _send(self, message: bytes) -> None:
        """Raises TargetTimeoutError, MonitorError."""
        try:
            self._socket.settimeout(max(0.01, self._deadline - time.monotonic()))
            self._socket.sendall(message)
        except TimeoutError:
            raise TargetTimeoutError(f"{self._what} did not take a command in time") from None
        except OSError as error:
            raise MonitorError(f"{self._what}: {error.strerror}") from None

    @abstractmethod
    def human(self, line: str) -> str:
        """What the monitor for people prints. Raises MonitorError, TargetTimeoutError."""


class Monitor(Conversation):
    """The machine protocol."""

    def __init__(self, connection: socket.socket, what: str, deadline: float | None = None) -> None:
        """Greets. Raises TargetBusyError where nobody answers, MonitorError where it is no QMP."""
        super().__init__(connection, what, deadline)
        with self._greeted():
            greeting = self._line()
        if "QMP" not in greeting:
            raise MonitorError(f"what listens at {what} is no QMP")
        self.ask("qmp_capabilities")

    def _line(self) -> dict[str, Any]:
        """The next message. Raises TargetTimeoutError, MonitorError where it is no object of JSON."""
        while (stop := self._rest.find(b"\n")) < 0:
            self._receive()
        line = bytes(self._rest[:stop])
        del self._rest[: stop + 1]
        try:
            message = json.loads(line)
        except (ValueError, RecursionError):
            message = None
        if not isinstance(message, dict):
            raise MonitorError(f"what listens at {self._what} is no QMP")
        return message

    def ask(self, command: str, **arguments: object) -> Any:
        """What a command returns. Raises MonitorError where QEMU refuses it, TargetTimeoutError."""
        self._send(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")
        while True:
            answer = self._line()
            if "return" in answer:
                return answer["return"]
            if "error" in answer:
                refusal = answer["error"]
                said = refusal.get("desc") if isinstance(refusal, dict) else refusal
                raise MonitorError(f"QEMU refused {command}: {said}")

    def human(self, line: str) -> str:
        """See `Conversation.human`."""
        return str(self.ask("human-monitor-command", **{"command-line": line})).replace("\r\n", "\n")


class HumanMonitor(Conversation):
    """The monitor for people."""

    def __init__(self, connection: socket.socket, what: str, deadline: float | None = None) -> None:
        """Waits for its prompt. Raises TargetBusyError where nobody answers, MonitorError where it is another thing."""
        super().__init__(connection, what, deadline)
        with self._greeted():
            banner = self._answer(BANNER_LIMIT)
        if not _BANNER.match(banner):
            raise MonitorError(f"what listens at {what} is no monitor of QEMU")

    def _answer(self, limit: int = ANSWER_LIMIT) -> str:
        """What is printed before the next prompt. Raises as `_receive`."""
        while not self._rest.endswith(_PROMPT):
            if len(self._rest) > limit:
                raise MonitorError(f"what listens at {self._what} is no monitor of QEMU")
            self._receive()
        told = bytes(self._rest)
        self._rest.clear()
        return _SEQUENCES.sub(b"", told).decode(errors="replace").replace("\r\n", "\n").removesuffix("(qemu) ")

    def human(self, line: str) -> str:
        """See `Conversation.human`: without the echo of the line."""
        self._send(line.encode() + b"\n")
        told = self._answer().partition("\n")[2]
        if told.startswith("unknown command:"):
            raise MonitorError(f"QEMU refused {line}: {told.strip()}")
        return told


def connect(address: Address, pid: int, deadline: float | None = None) -> Conversation:
    """Converse with the QEMU of that PID of this host, until `deadline` (time.monotonic()) at the latest.

    Raises NotFoundError where nothing listens or cannot be reached, AccessDeniedError, TargetBusyError, MonitorError.
    """
    what = f"the monitor of process {pid} ({address})"
    deadline = time.monotonic() + ANSWERS if deadline is None else min(deadline, time.monotonic() + ANSWERS)
    if address.kind == "elsewhere":
        raise NotFoundError(f"{what} cannot be connected to")
    if time.monotonic() >= deadline:
        raise TargetTimeoutError(f"{what} is not asked: others took too long")
    try:
        connection = _unix(address, pid) if address.kind == "unix" else _tcp(address, pid)
    except (TimeoutError, BlockingIOError):  # its queue of connections is full
        raise TargetBusyError(f"{what} takes no connection: others wait there already") from None
    except PermissionError as error:
        raise AccessDeniedError(f"{what} cannot be connected to: {error.strerror}") from None
    except OSError as error:
        raise NotFoundError(f"{what} cannot be connected to: {error.strerror or error}") from None
    try:
        return (HumanMonitor if address.human else Monitor)(connection, what, deadline)
    except BaseException:
        connection.close()
        raise


def _unix(address: Address, pid: int) -> socket.socket:
    """A connection to a socket of the process, if it is that very process which listens."""
    with contextlib.ExitStack() as held:
        path = "\0" + address.path if address.abstract else held.enter_context(_reached(address.path, pid))
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.settimeout(GREETING)
            connection.connect(path)
            raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
            listener = _CREDENTIALS.unpack(raw)[0]
            if listener != pid:
                raise ConnectionRefusedError(None, f"process {listener} listens there")
        except BaseException:
            connection.close()
            raise
        return connection


@contextlib.contextmanager
def _reached(path: str, pid: int) -> Iterator[str]:
    """A short path by which a path of the process is reached: it may have another root, and 108 bytes are the most."""
    number = reach(path, pid)
    try:
        yield f"/proc/self/fd/{number}"
    finally:
        os.close(number)


def _tcp(address: Address, pid: int) -> socket.socket:
    """A connection to a port, if the process has this program's network."""
    if os.stat(f"/proc/{pid}/ns/net").st_ino != os.stat("/proc/self/ns/net").st_ino:
        raise ConnectionRefusedError(None, "it has a network of its own")
    host = {"": "localhost", "0.0.0.0": "127.0.0.1", "::": "::1"}.get(address.host, address.host)
    return socket.create_connection((host, address.port), GREETING)
