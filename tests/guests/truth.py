"""What a guest told of itself: sections by name, and what is read from them again and again."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

SECRET_SIZE = 48


def parse_sections(told: bytes) -> dict[str, bytes]:
    """A line "NAME LENGTH", LENGTH bytes, a line feed, and so on: see program/truth.c."""
    sections: dict[str, bytes] = {}
    at = 0
    while at < len(told):
        name, _, length = told[at : told.index(b"\n", at)].rpartition(b" ")
        at = told.index(b"\n", at) + 1
        sections[name.decode()] = told[at : at + int(length)]
        at += int(length) + 1
    return sections


def secret_text(name: str) -> bytes:
    """What stands at the secret of that name; computed apart from the program, after the same rule."""
    sum_ = 0xCBF29CE484222325
    for byte in name.encode():
        sum_ = (sum_ ^ byte) * 0x100000001B3 % (1 << 64)
    return f"cloudfs secret {name} {sum_:016x}".encode().ljust(SECRET_SIZE, b".")[:SECRET_SIZE]


class Truth(Mapping[str, bytes]):
    """Sections by name: paths of /proc and /sys as the guest read them; `dmesg`, `btf`, `vmcoreinfo`, `page_size`."""

    PRESENT = 1 << 8
    """Of the flags of a run of pagemap, which are bits 55 to 63 of its entries."""

    def __init__(self, sections: Mapping[str, bytes]) -> None:
        self._sections = sections

    def __getitem__(self, name: str) -> bytes:
        return self._sections[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._sections)

    def __len__(self) -> int:
        return len(self._sections)

    def text(self, name: str) -> str:
        """A section as text; bytes that are none stay recoverable."""
        return self[name].decode("utf-8", "surrogateescape")

    @property
    def page_size(self) -> int:
        """Of the guest's kernel, in bytes."""
        return int(self["page_size"])

    @property
    def vmcoreinfo(self) -> dict[str, str]:
        """What the kernel tells to readers of crash dumps; the host took the text from where /sys says that it lies."""
        return dict(line.split("=", 1) for line in self.text("vmcoreinfo").splitlines() if "=" in line)

    @property
    def iomem(self) -> str:
        return self.text("/proc/iomem")

    @property
    def pids(self) -> list[int]:
        """Of all processes, kernel threads too, ascending."""
        return sorted({int(found[1]) for name in self if (found := re.match(r"/proc/(\d+)/", name))})

    @property
    def keeper(self) -> int:
        """The process that holds the secrets and in whose address space the guest stands."""
        return int(self._secret_lines("pid")[0][0])

    @property
    def twin(self) -> tuple[int, int]:
        """A child of the keeper, and an address at which it has other bytes: the secret "twin"."""
        pid, address = self._secret_lines("twin")[0]
        return int(pid), int(address, 16)

    @property
    def secrets(self) -> dict[str, int]:
        """Addresses of the keeper's secrets by name."""
        return {name: int(address, 16) for name, address in self._secret_lines("secret")}

    @property
    def read_back(self) -> dict[str, bytes]:
        """What /proc/self/mem of the guest gave of secrets whose pages changed their rights."""
        return {name: bytes.fromhex(read.replace("-", "")) for name, read in self._secret_lines("read")}

    def _secret_lines(self, word: str) -> list[list[str]]:
        lines = (line.split() for line in self.text("/tmp/secrets").splitlines())
        return [parts[1:] for parts in lines if parts[0] == word]

    def maps(self, pid: int) -> list[tuple[int, int, str, str]]:
        """(start, stop, rights, path) of a process's maps."""
        rows = (line.split(None, 5) for line in self.text(f"/proc/{pid}/maps").splitlines())
        return [
            (int(row[0].split("-")[0], 16), int(row[0].split("-")[1], 16), row[1], row[5] if len(row) > 5 else "")
            for row in rows
        ]

    def pagemap(self, pid: int) -> Iterator[tuple[int, int, int, int]]:
        """(virtual address, number of pages, first page frame, flags): the guest kernel's own view."""
        for line in self.text(f"/proc/{pid}/pagemap").splitlines():
            start, count, frame, flags = line.split()
            yield int(start, 16), int(count), int(frame, 16), int(flags, 16)

    def symbol_addresses(self) -> list[int]:
        """Of /proc/kallsyms, in its order."""
        return [int(line.split(b" ", 1)[0], 16) for line in self["/proc/kallsyms"].splitlines()]

    def symbol(self, name: str) -> int:
        """Address of the first symbol of that name; KeyError without one."""
        found = re.search(rb"^([0-9a-f]+) . " + re.escape(name.encode()) + rb"$", self["/proc/kallsyms"], re.MULTILINE)
        if found is None:
            raise KeyError(name)
        return int(found[1], 16)
