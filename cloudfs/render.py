"""Records → JSON, tables, `info` texts and the formats of /proc: one place for the mount and the command line.

A record is a dict of JSON-able values under the keys that every OS layer gives: addresses are strings in
hexadecimal (a JSON number loses them), sizes and ids are numbers, times are ISO 8601 in UTC. What is not known
is None; a key is never missing.

Text comes from hostile memory. `escape_terminal` is for what people read, `file_name` for names in the tree;
bytes that are no UTF-8 arrive as surrogates (PEP 383), as Python gives them everywhere else.
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from engine.connector import Target
from engine.machine import Instance
from engine.registry import PluginStatus
from engine.types import (
    ConnectorInfo,
    ExportInfo,
    ImportInfo,
    ModuleInfo,
    OsInfo,
    ProcessInfo,
    Region,
    SectionInfo,
    ThreadInfo,
)

Record = dict[str, Any]

# -- values ------------------------------------------------------------------------------------------


def address_text(address: int | None) -> str | None:
    """An address as records carry it: `0xffff888000001000`, or None."""
    return None if address is None else f"{address:#x}"


def time_text(seconds: float | None) -> str | None:
    """Seconds since 1970 as ISO 8601 in UTC with milliseconds; None for None and for no time of this calendar."""
    if seconds is None:
        return None
    try:
        moment = datetime.fromtimestamp(seconds, UTC)
    except (OverflowError, ValueError, OSError):
        return None
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def human_size(size: int) -> str:
    """A number of bytes for people: `512 B`, `4.0 KiB`, `2.0 GiB`."""
    value = float(size)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB", "PiB"):
        if value < 1024:
            return f"{size} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} EiB"


def _plain(value: Any) -> Any:
    """A value of an OS layer's own (`extra`) as JSON can carry it."""
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, bytes | bytearray):
        return bytes(value).decode("utf-8", "surrogateescape")
    if isinstance(value, Iterable):
        return [_plain(part) for part in value]
    return str(value)


# -- records -----------------------------------------------------------------------------------------


def process_record(info: ProcessInfo) -> Record:
    """The keys of `ps`; those that only some OS layers know follow."""
    record: Record = {
        "pid": info.pid,
        "ppid": info.ppid,
        "name": info.name,
        "state": info.state,
        "uid": info.uid,
        "gid": info.gid,
        "threads": info.threads,
        "start_time": time_text(info.start_time),
        "command_line": None if info.command_line is None else list(info.command_line),
        "executable": info.executable,
        "architecture": info.architecture,
        "kernel_thread": info.kernel_thread,
        "dtb": address_text(info.dtb),
        "object": address_text(info.object),
    }
    for key, value in info.extra.items():
        record.setdefault(key, _plain(value))
    return record


def thread_record(info: ThreadInfo) -> Record:
    """One thread."""
    return {"tid": info.tid, "name": info.name, "state": info.state}


def region_record(region: Region) -> Record:
    """The keys of `maps`. `offset` is hexadecimal too: of /dev/mem it is a physical address."""
    return {
        "start": address_text(region.start),
        "stop": address_text(region.stop),
        "permissions": region.permissions,
        "offset": address_text(region.offset),
        "device": region.device_text,
        "inode": region.inode,
        "path": region.path,
    }


def module_record(info: ModuleInfo) -> Record:
    """The keys of `modules`."""
    return {
        "name": info.name,
        "path": info.path,
        "base": address_text(info.base),
        "size": info.size,
        "architecture": info.architecture,
        "build_id": info.build_id,
    }


def section_record(section: SectionInfo) -> Record:
    """One section of a module."""
    return {"name": section.name, "base": address_text(section.base), "size": section.size}


def export_record(symbol: ExportInfo, base: int | None = None) -> Record:
    """One symbol that a module offers; its address where the module's base is known."""
    address = None if base is None else base + symbol.offset
    return {
        "name": symbol.name,
        "offset": address_text(symbol.offset),
        "address": address_text(address),
        "size": symbol.size,
        "kind": symbol.kind,
    }


def import_record(symbol: ImportInfo) -> Record:
    """One symbol that a module wants of others."""
    return {"name": symbol.name, "library": symbol.library, "version": symbol.version}


def connector_record(info: ConnectorInfo) -> Record:
    """What a connector says of what it has opened."""
    return {
        "kind": info.kind,
        "target": info.target,
        "size": info.size,
        "real_size": info.real_size,
        "live": info.live,
        "writable": info.writable,
        "notes": list(info.notes),
    }


def os_record(info: OsInfo, processes: int | None = None) -> Record:
    """What an OS layer says of the system it has recognised; `processes` counts them."""
    return {
        "kind": info.kind,
        "version": info.version,
        "architecture": info.architecture,
        "page_size": info.page_size,
        "kernel_base": address_text(info.kernel_base),
        "dtb": address_text(info.dtb),
        "boot_time": time_text(info.boot_time),
        "hostname": info.hostname,
        "processes": processes,
        "skipped": dict(info.skipped),
        "live": info.live,
        "writable": info.writable,
        "notes": list(info.notes),
    }


def instance_record(instance: Instance) -> Record:
    """An opened connector or OS layer: its own record, its name and place in the chain, what was done with it.

    Raises ConnectorClosedError after it was removed.
    """
    if instance.kind == "connector":
        own = connector_record(instance.connector.info)
    else:
        own = os_record(instance.layer.info, len(instance.pids()))
    record: Record = {"name": instance.name, **own}
    record["spec"] = str(instance.spec)
    record["options"] = dict(instance.spec.options)
    record["parent"] = None if instance.parent is None else instance.parent.name
    record["children"] = [child.name for child in instance.children]
    record["generation"] = instance.generation
    record["opened_at"] = time_text(instance.opened_at)
    record["counters"] = asdict(instance.counters)
    figures = getattr(instance.memory_view, "figures", None)
    if figures is not None:
        record["metrics"] = figures()
    record["last_error"] = instance.last_error
    return record


def target_record(target: Target, plugin: str) -> Record:
    """Something that the connector `plugin` could open here."""
    return {"plugin": plugin, "target": target.name, "description": target.description}


def plugin_record(status: PluginStatus) -> Record:
    """One plugin; `problem` is None where it loads."""
    plugin = status.plugin
    return {
        "name": plugin.name,
        "kind": plugin.kind,
        "summary": status.summary,
        "where": plugin.where,
        "distribution": plugin.distribution,
        "problem": status.problem,
    }


# -- text for people and programs --------------------------------------------------------------------

_PRINTABLE_ASCII = re.compile(r"[ -~]*").fullmatch
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


def _is_hidden(character: str) -> bool:
    """Whether a terminal or a listing could be deceived: controls, bidirectional marks, line separators."""
    return unicodedata.category(character) in ("Cc", "Cf", "Zl", "Zp", "Cs")


def _raw(text: str) -> bytes:
    """The bytes of text, those of PEP 383 as they were; other surrogates (of UTF-16) three bytes each."""
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return b"".join(
            character.encode("utf-8", "surrogateescape" if "\udc80" <= character <= "\udcff" else "surrogatepass")
            for character in text
        )


def escape_terminal(text: str) -> str:
    r"""Text that cannot move a terminal's cursor or deceive who reads it.

    Control and format characters and bytes that are no UTF-8 become a backslash and three octal digits for
    each byte, as the kernel writes them in /proc.
    """
    if _PRINTABLE_ASCII(text):
        return text
    return "".join(
        "".join(f"\\{byte:03o}" for byte in _raw(character)) if _is_hidden(character) else character
        for character in text
    )


def to_json(value: Any) -> str:
    r"""One JSON document, ending in a newline, ASCII only.

    Bytes that are no UTF-8 stand as a backslash and three octal digits: most readers refuse lone surrogates.
    """
    text = json.dumps(_without_surrogates(value), indent=2)
    return text + "\n"


def _without_surrogates(value: Any) -> Any:
    if isinstance(value, str):
        return _LONE_SURROGATE.sub(lambda match: escape_terminal(match[0]), value)
    if isinstance(value, Mapping):
        return {_without_surrogates(key): _without_surrogates(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_without_surrogates(part) for part in value]
    return value


def cell_text(value: Any) -> str:
    """A value of a record in one line of text: `-` for None, yes and no, lists joined by spaces; escaped."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return ", ".join(f"{escape_terminal(str(key))} {cell_text(part)}" for key, part in value.items()) or "-"
    if isinstance(value, list | tuple):
        return " ".join(cell_text(part) for part in value) or "-"
    return escape_terminal(str(value))


@dataclass(frozen=True, slots=True)
class Column:
    """One column of a table: which key of the records, under which title; numbers stand to the right."""

    key: str
    title: str
    right: bool = False


def display_width(text: str) -> int:
    """Columns of a terminal that text takes: wide characters two, combining ones none."""
    if text.isascii():
        return len(text)
    return sum(
        0 if unicodedata.combining(character) else 2 if unicodedata.east_asian_width(character) in "WF" else 1
        for character in text
    )


def table(rows: Iterable[Mapping[str, Any]], columns: Sequence[Column], *, terminal: bool) -> str:
    """Rows as a table: aligned below titles for a terminal, else tab-separated without titles.

    One line for each row, whatever its values hold; the last column is not padded.
    """
    lines = [[cell_text(row[column.key]) for column in columns] for row in rows]
    if not terminal:
        return "".join("\t".join(line) + "\n" for line in lines)
    lines.insert(0, [column.title for column in columns])
    widths = [max(display_width(line[index]) for line in lines) for index in range(len(columns))]
    return "".join(_aligned(line, columns, widths) + "\n" for line in lines)


def _aligned(line: Sequence[str], columns: Sequence[Column], widths: Sequence[int]) -> str:
    cells = []
    for text, column, width in zip(line, columns, widths, strict=True):
        space = " " * (width - display_width(text))
        cells.append(space + text if column.right else text + space)
    return "  ".join(cells).rstrip(" ")


def info_text(record: Mapping[str, Any]) -> str:
    """A record as aligned lines `key: value`; a record in it is indented, a list of sentences one to a line."""
    return "".join(line + "\n" for line in _info_lines(record, ""))


_SIZE_KEYS = ("size", "bytes")


def _info_lines(record: Mapping[str, Any], indent: str) -> Iterable[str]:
    width = max((display_width(escape_terminal(key)) for key in record), default=0) + 2
    for key, value in record.items():
        label = f"{indent}{escape_terminal(key)}:"
        if isinstance(value, Mapping) and value:
            yield label
            yield from _info_lines(value, indent + "  ")
            continue
        text = cell_text(value)
        if isinstance(value, int) and value >= 1024 and any(word in key for word in _SIZE_KEYS):
            text += f" ({human_size(value)})"
        lead = label + " " * (len(indent) + width - display_width(label))
        if key == "notes" and isinstance(value, list) and len(value) > 1:
            for sentence in value:
                yield lead + cell_text(sentence)
                lead = " " * len(lead)
            continue
        yield lead + text


# -- formats of /proc --------------------------------------------------------------------------------

MAPS_PATH_COLUMN = 73
"""Where paths begin: seq_setwidth(m, 25 + sizeof(void *) * 6 - 1) of fs/proc/task_mmu.c, and one space (Linux 6.x)."""


def maps_line(region: Region) -> str:
    r"""One line of /proc/PID/maps as show_map_vma() of fs/proc/task_mmu.c prints it, with its newline.

    A newline in a path is `\012`, nothing else is escaped; a line without path ends in a space.
    """
    line = (
        f"{region.start:08x}-{region.stop:08x} {region.permissions} {region.offset:08x} "
        f"{region.device_text} {region.inode} "
    )
    if region.path:
        line = line.ljust(MAPS_PATH_COLUMN - 1) + " " + region.path.replace("\n", "\\012")
    return line + "\n"


def maps_text(regions: Iterable[Region]) -> str:
    """All of /proc/PID/maps. Encode it with os.fsencode: paths may hold any byte."""
    return "".join(map(maps_line, regions))


# -- names in the tree -------------------------------------------------------------------------------

NAME_MAX = 255
_HASH_DIGITS = 16
_SAFE_NAME = re.compile(r"[ !-$&-.0-~]+").fullmatch
_ESCAPED = re.compile(r"%([0-9A-F]{2})")


def file_name(raw: str | bytes, suffix: str = "") -> str:
    """What a file can be called that stands for `raw`, and `suffix` (plain ASCII) behind it: 1-255 bytes.

    `%` and two hexadecimal digits stand for each byte of what no name may or should hold: `/`, NUL, control and
    format characters, what is no UTF-8, `%` itself, and the dots of `.` and `..`; `%` alone is the empty name.
    `unescape_file_name` is the inverse. What then exceeds 255 bytes is cut, and ends in `~` and a hash of it all.
    """
    text = raw.decode("utf-8", "surrogateescape") if isinstance(raw, bytes) else raw
    if _SAFE_NAME(text) and len(text) + len(suffix) <= NAME_MAX:
        name = text
    else:
        name = "".join(map(_escape_character, text)) or "%"
        if len(name.encode()) + len(suffix) > NAME_MAX:
            name = _cut(name, NAME_MAX - len(suffix))
    name += suffix
    return name.replace(".", "%2E") if name in (".", "..") else name


def _escape_character(character: str) -> str:
    if character in "/%" or _is_hidden(character):
        return "".join(f"%{byte:02X}" for byte in _raw(character))
    return character


def _cut(name: str, limit: int) -> str:
    """The longest beginning of an escaped name that leaves room for `~` and the hash of all of it."""
    tail = "~" + hashlib.blake2b(name.encode(), digest_size=_HASH_DIGITS // 2).hexdigest()
    head = name.encode()[: limit - len(tail)].decode("utf-8", "ignore")
    return re.sub(r"%[0-9A-F]?$", "", head) + tail


def unescape_file_name(name: str) -> bytes:
    """The bytes that `file_name` was given (without a suffix, and where it did not have to cut)."""
    if name == "%":
        return b""
    plain = _ESCAPED.sub(lambda match: chr(0xDC00 + int(match[1], 16)), name)
    return b"".join(
        bytes([ord(character) - 0xDC00]) if "\udc00" <= character <= "\udcff" else character.encode()
        for character in plain
    )
