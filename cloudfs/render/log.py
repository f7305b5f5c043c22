"""A kernel's log and symbols as lines and records."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from cloudfs.render.values import address_text
from engine.types import LogRecord, SymbolInfo

LEVELS = ("emerg", "alert", "crit", "err", "warn", "notice", "info", "debug")
"""As dmesg(1) calls them."""
_CPU = 1 << 31


def log_lines(record: LogRecord, *, raw: bool = False) -> Iterator[str]:
    """The lines of one record as dmesg(1) prints them: each with the time; with `raw` with its priority too."""
    seconds, rest = divmod(record.time_ns // 1000, 10**6)
    head = f"[{seconds:5d}.{rest:06d}] "
    if raw:
        head = f"<{record.facility << 3 | record.level}>{head}"
    for line in record.text.split("\n"):
        yield f"{head}{line}\n"


def log_record(record: LogRecord) -> dict[str, Any]:
    """One record; `time` in seconds since boot."""
    caller = record.caller
    return {
        "sequence": record.sequence,
        "time": record.time_ns / 1e9,
        "level": LEVELS[record.level & 7],
        "facility": record.facility,
        "thread": None if not caller or caller & _CPU else caller,
        "cpu": caller & ~_CPU if caller & _CPU else None,
        "text": record.text,
    }


def symbol_line(symbol: SymbolInfo) -> str:
    """A line of /proc/kallsyms."""
    owner = f"\t[{symbol.module}]" if symbol.module else ""
    return f"{symbol.address:016x} {symbol.kind} {symbol.name}{owner}\n"


def symbol_record(symbol: SymbolInfo) -> dict[str, Any]:
    """One symbol of a kernel."""
    return {
        "name": symbol.name,
        "kind": symbol.kind,
        "address": address_text(symbol.address),
        "module": symbol.module,
    }
