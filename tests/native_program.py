"""The program of native_program.c: known things in its memory, and ways to look at it."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest

from engine.oslayers.native import descriptors, mappings, pagemap, usual

PAGE = 4096
SOURCE = Path(__file__).with_suffix(".c")
PATTERN = (np.arange(1 << 20, dtype=np.uint32) * np.uint32(2654435761)).tobytes()
"""What fill() of the program writes, 4 MiB of it."""


class Target:
    """The running program; its addresses are attributes: `target.in_heap`."""

    def __init__(self, program: Path, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [program, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        self.pid = self.process.pid
        self.addresses: dict[str, int] = {}
        self.follow()

    def follow(self) -> None:
        """Read what it says up to `ready`."""
        while (said := self.said())[0] != "ready":
            self.addresses[said[0]] = said[1]

    def __getattr__(self, name: str) -> int:
        try:
            return self.addresses[name]
        except KeyError:
            raise AttributeError(name) from None

    def said(self) -> tuple[str, int]:
        """Its next line."""
        name, number = self.process.stdout.readline().split()
        return name, int(number)

    def tell(self, text: str) -> None:
        """Write to its standard input."""
        self.process.stdin.write(text)
        self.process.stdin.flush()

    def end(self) -> None:
        """End and reap it."""
        self.process.kill()
        self.process.communicate(timeout=10)


def figures(pid: int) -> dict[str, int]:
    """What the kernel counts of a process's memory, in kB: VmRSS, VmPTE, RssShmem, Pss and others."""
    text = Path(f"/proc/{pid}/status").read_text() + Path(f"/proc/{pid}/smaps_rollup").read_text()
    found = {name: int(size) for name, size in re.findall(r"^(\w+):\s+(\d+) kB", text, re.MULTILINE)}
    return {name: found[name] for name in ("VmRSS", "VmPTE", "RssShmem", "RssAnon", "Anonymous", "Referenced")}


KERNELS = ("as it is", "without ioctls", "without pagemap", "without process_vm_readv", "without a compiler")


def without(monkeypatch: pytest.MonkeyPatch, kernel: str) -> None:
    """Make this kernel as poor as another one."""
    if kernel == "without ioctls":  # before Linux 6.7 and 6.11
        monkeypatch.setattr(mappings.QueriedMappings, "works", staticmethod(lambda descriptor: False))
        monkeypatch.setattr(pagemap.Scanner, "works", staticmethod(lambda descriptor: False))
    if kernel == "without pagemap":
        original = descriptors._open_one
        monkeypatch.setattr(
            descriptors, "_open_one", lambda path, flags: -1 if path.endswith("pagemap") else original(path, flags)
        )
    if kernel == "without a compiler":
        monkeypatch.setattr(usual, "library", lambda: None)
    if kernel == "without process_vm_readv":  # before Linux 5.3, which has no pidfd
        monkeypatch.delattr(os, "pidfd_open")
