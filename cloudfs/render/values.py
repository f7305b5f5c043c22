"""Single values as records carry them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any


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


def plain(value: Any) -> Any:
    """A value of an OS layer's own (`extra`) as JSON can carry it."""
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(part) for key, part in value.items()}
    if isinstance(value, bytes | bytearray):
        return bytes(value).decode("utf-8", "surrogateescape")
    if isinstance(value, Iterable):
        return [plain(part) for part in value]
    return str(value)
