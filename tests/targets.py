"""Programs that tests look into: each says what is in its memory, and where."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass

_PROGRAM = """
import ctypes, mmap, os, sys
ctypes.CDLL(None).prctl(0x59616D61, ctypes.c_ulong(-1), 0, 0, 0)  # PR_SET_PTRACER: anybody of this user may look
secret = ctypes.create_string_buffer(bytes.fromhex(sys.argv[1]), 4096)
anonymous = mmap.mmap(-1, 1 << 20, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
anonymous[:] = bytes(range(256)) * 4096
hold = (ctypes.c_char * (1 << 20)).from_buffer(anonymous)
counter = ctypes.c_uint64(1234567890123456789)
print(ctypes.addressof(secret), ctypes.addressof(hold), ctypes.addressof(counter), flush=True)
for line in sys.stdin:
    print(counter.value, secret.raw[:64].hex(), flush=True)
"""


@dataclass
class Target:
    """A running program with known bytes in its memory."""

    pid: int
    secret: int
    """Address of the secret."""
    pattern: int
    """Address of 1 MiB of the bytes 0 to 255, again and again."""
    counter: int
    """Address of the 64-bit number 1234567890123456789."""
    process: subprocess.Popen[str]

    def ask(self) -> tuple[int, bytes]:
        """What the program itself sees now: the number, and the first 64 bytes of its secret."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        number, text = self.process.stdout.readline().split()
        return int(number), bytes.fromhex(text)


@contextlib.contextmanager
def running_target(secret: bytes = b"a secret of the tests") -> Iterator[Target]:
    """A program that holds `secret`, ended at the end."""
    process = subprocess.Popen(
        [sys.executable, "-c", _PROGRAM, secret.hex()], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        first, second, third = map(int, process.stdout.readline().split())
        yield Target(process.pid, first, second, third, process)
    finally:
        process.kill()
        process.communicate()
