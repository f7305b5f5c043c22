"""Talks to a QEMU that we started: its machine protocol (QMP), its debugger stub, the guest's serial port."""

from __future__ import annotations

import json
import re
import socket
import time
from pathlib import Path
from typing import Any, Self

from guests.kernels import GuestError

_LIMIT = 180.0


def _connected(path: Path, limit: float = 20.0) -> socket.socket:
    """A connection to a socket that QEMU is about to make."""
    deadline = time.monotonic() + limit
    while True:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.connect(str(path))
        except (FileNotFoundError, ConnectionRefusedError):
            connection.close()
            if time.monotonic() > deadline:
                raise GuestError(f"QEMU did not open {path.name} within {limit:.0f} s") from None
            time.sleep(0.01)
        else:
            connection.settimeout(_LIMIT)
            return connection


class Monitor:
    """QMP. A socket of it takes one client, so keep this one."""

    def __init__(self, path: Path) -> None:
        self._socket = _connected(path)
        self._lines = self._socket.makefile("rb")
        try:
            self._lines.readline()
            self.ask("qmp_capabilities")
        except OSError as error:
            self.close()
            raise GuestError(f"QEMU ended at {path.name}: {error.strerror}") from None
        except GuestError:
            self.close()
            raise

    def ask(self, command: str, **arguments: object) -> Any:
        """The answer to a command; events are passed over."""
        self._socket.sendall(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")
        while line := self._lines.readline():
            answer = json.loads(line)
            if "return" in answer:
                return answer["return"]
            if "error" in answer:
                raise GuestError(f"QEMU refused {command} {arguments}: {answer['error'].get('desc')}")
        raise GuestError(f"QEMU ended at {command}")

    def human(self, line: str) -> str:
        """What the monitor for people prints."""
        return str(self.ask("human-monitor-command", **{"command-line": line})).replace("\r\n", "\n")

    def close(self) -> None:
        self._lines.close()
        self._socket.close()


class Serial:
    """The guest's console; its program's lines start with a mark, see program/console.c."""

    MARK = b"@cloudfs "

    def __init__(self, path: Path) -> None:
        self.socket = _connected(path)
        self._waiting = b""
        self.log = b""

    def said(self, word: str, limit: float) -> list[str]:
        """The words of the next line of the program that starts with `word`; GuestError when it fails or is late."""
        deadline = time.monotonic() + limit
        while True:
            line = self._line(deadline, word)
            if not line.startswith(self.MARK):
                continue
            words = line[len(self.MARK) :].decode("utf-8", "replace").split()
            if words[:1] == ["failed"]:
                raise GuestError(f"the program in the guest gave up: {' '.join(words[1:])}")
            if words[:1] == [word]:
                return words[1:]

    def tell(self, line: str) -> None:
        """Write a line to the guest."""
        self.socket.sendall(line.encode() + b"\n")

    def notes(self) -> list[str]:
        """What the program found not as it should be, but went on."""
        return re.findall(r"@cloudfs note (.*)", self.log.decode("utf-8", "replace"))

    def _line(self, deadline: float, awaited: str) -> bytes:
        while b"\n" not in self._waiting:
            left = deadline - time.monotonic()
            if left <= 0:
                raise GuestError(f"the guest did not say «{awaited}» in time; its console ends: {self._ending()}")
            self.socket.settimeout(left)
            try:
                more = self.socket.recv(65536)
            except TimeoutError:
                continue
            if not more:
                raise GuestError(f"the guest ended before it said «{awaited}»; its console ends: {self._ending()}")
            self.log += more
            self._waiting += more
        line, _, self._waiting = self._waiting.partition(b"\n")
        return line.rstrip(b"\r")

    def _ending(self) -> str:
        return self.log[-1500:].decode("utf-8", "replace")

    def close(self) -> None:
        self.socket.close()


class Debugger:
    """QEMU's debugger stub: registers that the monitor does not print. Connect to a stopped guest only: it stops it.

    Registers are found by name in the descriptions that the stub gives (GDB manual, "Standard Target Features").
    """

    def __init__(self, path: Path) -> None:
        self._socket = _connected(path)
        self.ask("qSupported:multiprocess-;xmlRegisters=i386")
        self.ask("?")
        self.numbers: dict[str, int] = {}
        self.sizes: dict[str, int] = {}
        self._learn("target.xml", 0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def ask(self, text: str) -> str:
        """The answer to a packet."""
        packet = text.encode()
        self._socket.sendall(b"$" + packet + b"#%02x" % (sum(packet) & 255))
        answer = b""
        while not re.search(rb"#..$", answer, re.DOTALL):
            more = self._socket.recv(65536)
            if not more:
                raise GuestError(f"QEMU's debugger stub ended at {text[:40]}")
            answer += more
        self._socket.sendall(b"+")
        body = answer[answer.index(b"$") + 1 : -3]
        return re.sub(rb"}(.)", lambda escaped: bytes([escaped[1][0] ^ 0x20]), body, flags=re.DOTALL).decode("latin-1")

    def _description(self, name: str) -> str:
        whole = ""
        while True:
            part = self.ask(f"qXfer:features:read:{name}:{len(whole):x},ffb")
            whole += part[1:]
            if part[:1] != "m":
                return whole

    def _learn(self, name: str, number: int) -> int:
        """Numbers of registers; those that give none follow the one before them."""
        for tag, attributes in re.findall(r"<(xi:include|reg)\s([^>]*)>", self._description(name)):
            found = dict(re.findall(r'([\w:]+)="([^"]*)"', attributes))
            if tag == "xi:include":
                number = self._learn(found["href"], number)
                continue
            number = int(found.get("regnum", number))
            self.numbers.setdefault(found["name"], number)
            self.sizes.setdefault(found["name"], int(found["bitsize"]) // 8)
            number += 1
        return number

    def read(self, name: str) -> int | None:
        """A register's value; None for one that cannot be read. (Numbers are sent in the guest's order of bytes.)"""
        answer = self.ask(f"p{self.numbers[name]:x}")
        if not answer or answer.startswith("E") or "x" in answer:
            return None
        return int.from_bytes(bytes.fromhex(answer), "little")

    def write(self, name: str, value: int) -> None:
        """Set a register of the stopped guest."""
        self.demand(f"P{self.numbers[name]:x}={value.to_bytes(self.sizes[name], 'little').hex()}")

    def demand(self, text: str) -> None:
        """Send a packet that is to be answered with OK; GuestError otherwise."""
        answer = self.ask(text)
        if answer != "OK":
            raise GuestError(f"QEMU's debugger stub answered {text} with {answer or 'nothing'}")
