"""What a command prints: for people on a terminal, for programs in a pipe, or as JSON."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from cloudfs.commands._streams import BOLD, PLAIN, flush, is_terminal, put, say, wants_colour, writing
from cloudfs.render import Column, display_width, table, to_json


def clip(line: str, width: int) -> str:
    """A line cut to `width` columns of a terminal; what was cut shows as `…`."""
    if display_width(line) <= width:
        return line
    while display_width(line) > width - 1:
        line = line[: len(line) - max(1, (display_width(line) - width) // 2)]
    return line + "…"


class Output:
    """Where a command prints. What it prints is escaped; only `raw` passes bytes as they are."""

    def __init__(self, name: str, *, json: bool = False, no_color: bool = False) -> None:
        self.name = name
        self.json = json
        self.no_color = no_color
        self.terminal = is_terminal(sys.stdout)
        self.colour = wants_colour(sys.stdout, no_color)

    @property
    def width(self) -> int:
        """Columns of the terminal."""
        import shutil

        return max(20, shutil.get_terminal_size().columns)

    def text(self, text: str) -> None:
        """Print text that is safe for a terminal already."""
        put(text)

    def raw(self, data: bytes | memoryview) -> None:
        """Print bytes as they are."""
        flush()
        with writing():
            sys.stdout.buffer.write(data)

    def flush(self) -> None:
        """Hand what was printed to the kernel."""
        flush()

    def document(self, value: Any) -> None:
        """Print one JSON document."""
        put(to_json(value))

    def table(self, rows: Iterable[Mapping[str, Any]], columns: Sequence[Column]) -> None:
        """Print rows below bold titles, cut at the terminal's edge; in a pipe tab-separated, whole, without titles."""
        text = table(rows, columns, terminal=self.terminal)
        if not self.terminal:
            put(text)
            return
        width = self.width
        title, *lines = [clip(line, width) for line in text.splitlines()]
        put(f"{BOLD}{title}{PLAIN}\n" if self.colour else title + "\n")
        put("".join(line + "\n" for line in lines))

    def say(self, sentence: str) -> None:
        """Print a sentence on standard error, behind all that was printed so far."""
        flush()
        say(self.name, sentence, no_color=self.no_color)
