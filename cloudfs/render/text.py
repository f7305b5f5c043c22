"""JSON, tables and `info` texts."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from cloudfs.render.escaping import escape_terminal
from cloudfs.render.values import human_size
from engine.records import dataclass

_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


def to_json(value: Any) -> str:
    r"""One JSON document, ending in a newline, ASCII only, indented by two as `json.dumps` does it.

    Bytes that are no UTF-8 stand as a backslash and three octal digits: most readers refuse lone surrogates.
    """
    return _indented(value, "\n") + "\n"


def _indented(value: Any, line: str) -> str:
    # json.dumps(indent=) makes a few functions that know one another at each call: rubbish for the collector of cycles,
    # which a daemon that renders thousands of files would hold megabytes of. Without indent= it is C and makes none.
    inner = line + "  "
    if isinstance(value, Mapping) and value:
        pairs = (f"{_leaf(_key(key))}: {_indented(part, inner)}" for key, part in value.items())
        return f"{{{inner}{f',{inner}'.join(pairs)}{line}}}"
    if isinstance(value, list | tuple) and value:
        return f"[{inner}{f',{inner}'.join(_indented(part, inner) for part in value)}{line}]"
    return "{}" if isinstance(value, Mapping) else _leaf(value)


def _key(key: Any) -> str:
    return key if isinstance(key, str) else json.dumps(key)


def _leaf(value: Any) -> str:
    if isinstance(value, str):
        value = _LONE_SURROGATE.sub(lambda match: escape_terminal(match[0]), value)
    return json.dumps(value)


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
