"""What an image file is, told by its content: which connector opens it, or what to do where none does.

One row of `FORMATS` for each format. Another distribution takes part with an entry point of the group
`cloudfs.formats`: its name says everything, so that nothing is imported to recognise a file.

    [project.entry-points."cloudfs.formats"]
    "mine.0.4d454d31" = "my_package:MyConnector"     # the connector, the offset, the magic bytes in hexadecimal
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import Iterator

from engine.announced import announced
from engine.records import dataclass

log = logging.getLogger(__name__)

HEAD_SIZE = 4096
"""Bytes of a file that are looked at: every magic lies within."""
GROUP = "cloudfs.formats"


@dataclass(frozen=True, slots=True)
class Format:
    """One format: the `magic` bytes at `offset`, and what opens it."""

    offset: int
    magic: bytes
    what: str
    """What such a file is, with its article."""
    connector: str | None = None
    """The plugin that opens it; None: there is none yet."""
    advice: str = ""
    """What a person can do where there is none: a clause in which {path} stands for the file."""
    packing: str = ""
    """How a file is packed in which something else is to be recognised; see `engine.image_source`."""

    def matches(self, head: bytes) -> bool:
        """Whether a file that begins with `head` is one."""
        return head.startswith(self.magic, self.offset)


FORMATS: tuple[Format, ...] = (
    Format(0, b"EMiL", "a LiME image", "lime"),
    Format(0, b"AVML", "an AVML image", "lime"),
    Format(0, b"KDUMP   ", "a kdump image", "kdump"),
    Format(0, b"DISKDUMP", "a diskdump image", "kdump"),
    Format(0, b"makedumpfile", "a flattened kdump image", "kdump"),
    Format(0, b"\x7fELF", "an ELF file", "elfcore"),
    Format(0, b"PAGEDUMP", "a Windows crash dump"),
    Format(0, b"PAGEDU64", "a Windows crash dump"),
    Format(0, b"MDMP", "a Windows minidump", advice="it holds one process, not physical memory"),
    Format(0, b"hibr", "a Windows hibernation file"),
    Format(0, b"HIBR", "a Windows hibernation file"),
    *(Format(0, bytes.fromhex(magic), "the state of a VMware machine", "vmware")
      for magic in ("d0bed0be", "d0bed2be", "d2bed2be", "d3bed3be", "d1bad1ba", "d2bad2ba")),
    Format(0, bytes.fromhex("9edd4389"), "a file of an encrypted VMware machine", advice="decrypt the machine first"),
    Format(0, b"QEVM", "a saved state of QEMU", advice="`dump-guest-memory` of its monitor writes the memory alone"),
    Format(0, b"LibvirtQemudSave", "a saved state of libvirt", advice="`virsh dump --memory-only` writes the memory"),
    Format(0, b"\x7fVirtualBox Saved", "a saved state of VirtualBox",
           advice="`VBoxManage debugvm NAME dumpvmcore` writes the memory alone"),
    Format(0, b"EVF\x09\x0d\x0a\xff\x00", "an EnCase image", advice="`ewfexport {path}` writes what is in it"),
    Format(0, b"\x1f\x8b\x08", "a gzip file", advice="unpack it: gzip -dk {path}", packing="gzip"),
    Format(0, b"\xfd7zXZ\0", "an xz file", advice="unpack it: xz -dk {path}", packing="xz"),
    Format(0, b"\x28\xb5\x2f\xfd", "a Zstandard file", advice="unpack it: zstd -d {path}", packing="zstd"),
    Format(0, b"\x04\x22\x4d\x18", "an lz4 file", advice="unpack it: lz4 -d {path}", packing="lz4"),
    Format(4, b"1AY&SY", "a bzip2 file", advice="unpack it: bzip2 -dk {path}", packing="bzip2"),
    Format(0, b"PK\x03\x04", "a ZIP file", advice="unpack it: unzip {path}", packing="zip"),
    Format(0, b"7z\xbc\xaf\x27\x1c", "a 7-Zip file", advice="unpack it: 7z x {path}"),
    Format(0, b"Rar!\x1a\x07", "a RAR file", advice="unpack it: unrar x {path}"),
    Format(257, b"ustar", "a tar archive", advice="unpack it: tar xf {path}"),
    Format(0, b"QFI\xfb", "a qcow2 disk image", advice="it holds a disk, not memory"),
    Format(0, b"KDMV", "a VMware disk image", advice="it holds a disk, not memory"),
)  # fmt: skip
"""Files whose bytes are not memory as it stands; one with a connector goes before one without."""


SUFFIXES = {".vmem": "vmware"}
"""Files that have no magic, and whose connector looks for others beside them: by what their names end with."""


def announced_formats() -> Iterator[Format]:
    """The formats of other distributions, by their entry points; one that is written wrongly is left out."""
    for entry in announced(GROUP):
        try:
            connector, offset, magic = entry.name.rsplit(".", 2)
            made = Format(int(offset), bytes.fromhex(magic), f"a file for the connector {connector}", connector)
        except ValueError:
            log.warning("the entry point %r of %s is not CONNECTOR.OFFSET.MAGIC: it is left out", entry.name, GROUP)
            continue
        if made.magic and 0 <= made.offset <= HEAD_SIZE - len(made.magic):
            yield made
        else:
            log.warning("the entry point %r of %s lies beyond byte %d: it is left out", entry.name, GROUP, HEAD_SIZE)


DEFLATED_LIME = Format(
    0, b"", "a LiME image packed by LiME itself (compress=1)",
    advice="unpack it: zlib-flate -uncompress < {path} > memory.lime (in the package qpdf)", packing="zlib",
)  # fmt: skip


def _is_deflated_lime(head: bytes) -> bool:
    """Whether a zlib stream (RFC 1950: method 8, the first two bytes a multiple of 31) holds a LiME header."""
    if len(head) < 2 or head[0] & 0x8F != 8 or (head[0] << 8 | head[1]) % 31:
        return False
    try:
        return zlib.decompressobj().decompress(head, 4) == b"EMiL"
    except zlib.error:
        return False


def recognise(head: bytes) -> Format | None:
    """The format of a file by its first `HEAD_SIZE` bytes; None where it is none that is known."""
    if _is_deflated_lime(head):
        return DEFLATED_LIME
    own = [row for row in FORMATS if row.matches(head)]
    for row in own:
        if row.connector is not None:
            return row
    theirs = next((row for row in announced_formats() if row.matches(head)), None)
    return theirs or next(iter(own), None)


def connector_by_name(path: str) -> str | None:
    """The connector for a file whose content says nothing, by its name."""
    return next((plugin for suffix, plugin in SUFFIXES.items() if path.lower().endswith(suffix)), None)
