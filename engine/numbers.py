"""Numbers as people write them: 4096, 0x1000, 4K, 2M, 1_000."""

from __future__ import annotations

import re

from engine.errors import InvalidArgumentError

_NUMBER = re.compile(r"(0[xX][0-9a-fA-F_]+|0[bB][01_]+|0[oO][0-7_]+|[0-9][0-9_]*)([kKmMgGtT])?(?:i?[bB])?")
_UNITS = {"": 0, "k": 10, "m": 20, "g": 30, "t": 40}
_BIT_LIMIT = 128


def parse_number(text: str, what: str = "number") -> int:
    """The number in `text`; K, M, G, T count in powers of 1024. Raises InvalidArgumentError naming `what`."""
    match = _NUMBER.fullmatch(text.strip())
    if match is None or len(text) > 100:
        raise InvalidArgumentError(f"{what} {text!r} is no number; write 4096, 0x1000, 4K or 2M")
    try:
        number = int(match[1], 0 if match[1][1:2].isalpha() else 10)
    except ValueError:
        raise InvalidArgumentError(f"{what} {text!r} is no number; write 4096, 0x1000, 4K or 2M") from None
    number <<= _UNITS[(match[2] or "").lower()]
    if number.bit_length() > _BIT_LIMIT:
        raise InvalidArgumentError(f"{what} {text!r} is larger than any address")
    return number
