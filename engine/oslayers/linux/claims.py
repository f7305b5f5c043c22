"""What kernels say of themselves in plain text: their names (`uname`) and their banners, wherever they lie in memory.

    leads(memory)       kernels that may lie in it, the likeliest first

Both stand in the image of every kernel, of any architecture and byte order, and need nothing else to be read. Copies
of them stand in logs, in the page cache and in what a boot loader left: so they are where a search begins, and prove
nothing.

Sources: Linux include/uapi/linux/utsname.h (struct new_utsname: six fields of 65 bytes), init/version.c and
init/version-timestamp.c (linux_banner ends with a line feed, its copy in the log does not); releases 5.10 to 7.x.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from engine.formats.search import find_all
from engine.memory import Memory
from engine.records import dataclass

IMAGE_SPAN = 192 << 20
"""What belongs to one kernel's image lies no farther apart."""
LEAD_LIMIT = 16
HIT_LIMIT = 1 << 14

_FIELD = 65
_NAMES = 6 * _FIELD
_SYSNAME = b"Linux\0\0\0"
_BANNER = b"Linux version "
_BANNER_LIMIT = 1024
_RELEASE = re.compile(rb"[0-9]{1,3}\.[0-9]{1,4}[!-~]{0,58}")
_MACHINE = re.compile(rb"[A-Za-z][A-Za-z0-9_]{1,31}")
_WHOLE_BANNER = re.compile(rb"Linux version ([0-9]{1,3}\.[0-9]{1,4}[!-~]{0,58}) \([ -~]+\) #[ -~]*\n\0")


@dataclass(frozen=True, slots=True)
class Claim:
    """One place where something says that it is a kernel."""

    address: int
    release: str
    machine: str | None
    """The architecture as `uname -m` prints it; a banner does not tell."""


@dataclass(frozen=True, slots=True)
class Lead:
    """Claims of one release that lie near one another: perhaps a kernel's image."""

    release: str
    names: tuple[Claim, ...]
    banners: tuple[Claim, ...]

    @property
    def places(self) -> tuple[int, ...]:
        """Where they lie, those of the read-only banners first."""
        return tuple(claim.address for claim in (*self.banners, *self.names))

    @property
    def machine(self) -> str | None:
        """The architecture that the names tell, if they tell one."""
        told = {claim.machine for claim in self.names}
        return told.pop() if len(told) == 1 else None

    @property
    def release_number(self) -> tuple[int, int]:
        """Major and minor number of the release."""
        match = re.match(r"(\d+)\.(\d+)", self.release)
        return (int(match[1]), int(match[2])) if match else (0, 0)


def leads(memory: Memory) -> list[Lead]:
    """Kernels that may lie in this memory, those with both names and a banner first."""
    found: list[Lead] = []
    by_release: dict[str, list[Claim]] = {}
    for claim in claims(memory):
        by_release.setdefault(claim.release, []).append(claim)
    for release, all_of in by_release.items():
        found += [_lead(release, group) for group in _groups(all_of)]
    found.sort(key=lambda lead: (not (lead.names and lead.banners), not lead.banners, lead.places[0]))
    return found[:LEAD_LIMIT]


def _groups(found: Iterable[Claim]) -> list[list[Claim]]:
    groups: list[list[Claim]] = []
    for claim in sorted(found, key=lambda each: each.address):
        if groups and claim.address - groups[-1][0].address <= IMAGE_SPAN:
            groups[-1].append(claim)
        else:
            groups.append([claim])
    return groups


def _lead(release: str, group: list[Claim]) -> Lead:
    names = tuple(claim for claim in group if claim.machine is not None)
    return Lead(release, names, tuple(claim for claim in group if claim.machine is None))


def claims(memory: Memory) -> list[Claim]:
    """Every whole set of names and every whole banner at a multiple of four, ascending."""
    found = []
    for address in find_all(memory, [_SYSNAME, _BANNER], alignment=4, limit=HIT_LIMIT):
        head = memory.read_padded(address, min(_BANNER_LIMIT, memory.size - address))
        claim = _banner(address, head) if head.startswith(_BANNER) else _names(address, head)
        if claim is not None:
            found.append(claim)
    return found


def _banner(address: int, head: bytes) -> Claim | None:
    match = _WHOLE_BANNER.match(head)
    return Claim(address, match[1].decode("ascii"), None) if match else None


def _names(address: int, head: bytes) -> Claim | None:
    """A `struct new_utsname`: sysname, nodename, release, version, machine, domainname, each padded with NULs."""
    if len(head) < _NAMES:
        return None
    fields = []
    for start in range(0, _NAMES, _FIELD):
        text, _, padding = head[start : start + _FIELD].partition(b"\0")
        if start != _FIELD and any(padding):  # a host's name may have been longer before
            return None
        fields.append(text)
    release, version, machine = fields[2:5]
    if not _RELEASE.fullmatch(release) or not version.startswith(b"#") or not _MACHINE.fullmatch(machine):
        return None
    return Claim(address, release.decode("ascii"), machine.decode("ascii"))
