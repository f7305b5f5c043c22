"""A debug stub that answers as a test tells it to."""

from __future__ import annotations

import contextlib
import re
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from engine.connectors.gdb import GdbConnector
from engine.connectors.gdb.wire import framed, unpacked


class Script:
    """A stub that answers with what `answer(command)` gives; None is silence, bytes that begin with $ stand as such."""

    def __init__(self, path: Path, answer: Callable[[str], bytes | None]) -> None:
        self.path = str(path)
        self.asked: list[str] = []
        self.answer = answer
        self._server = socket.socket(socket.AF_UNIX)
        self._server.bind(self.path)
        self._server.listen(8)
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._server.accept()
                with connection, contextlib.suppress(OSError):
                    self._talk(connection)

    def _talk(self, connection: socket.socket) -> None:
        received = b""
        while data := connection.recv(1 << 16):
            received += data
            while found := re.search(rb"\$(.*?)#..|\x03", received, re.DOTALL):
                received = received[found.end() :]
                command = "interrupt" if found[1] is None else unpacked(found[1]).decode("latin-1")
                self.asked.append(command)
                reply = b"T02" if command == "interrupt" else self.answer(command)
                if reply == b"hang up":
                    return
                if reply is not None and command != "c":
                    self.send(connection, reply if reply.startswith(b"$") else b"+" + framed(reply))

    def send(self, connection: socket.socket, data: bytes) -> None:
        """What goes out, as it goes out."""
        connection.sendall(data)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        self._thread.join(10)


MEMORY = bytes(range(256)) * 64


def plain(command: str, readable: int = len(MEMORY)) -> bytes:
    """A stub that reads memory and detaches, and knows nothing else."""
    if found := re.fullmatch("m([0-9a-f]+),([0-9a-f]+)", command):
        start, size = (int(word, 16) for word in found.groups())
        return MEMORY[start : start + size].hex().encode() if start + size <= readable else b"E01"
    return b"OK" if command == "D" else b""


Scripted = Callable[..., Script]


@contextlib.contextmanager
def scripted(folder: Path) -> Iterator[Scripted]:
    """What makes stubs with their sockets in a folder: (answer, [class]) → Script; they end with the block."""
    with contextlib.ExitStack() as stack:
        number = 0

        def make(answer: Callable[[str], bytes | None], kind: type[Script] = Script) -> Script:
            nonlocal number
            number += 1
            made = kind(folder / f"stub{number}", answer)
            stack.callback(made.close)
            return made

        yield make


@contextlib.contextmanager
def opened(target: str, *, writable: bool = False, **options: str) -> Iterator[GdbConnector]:
    """A connector to a stub of whatever kind."""
    connector = GdbConnector.open(target, options, parent=None, writable=writable)
    try:
        yield connector
    finally:
        connector.close()
