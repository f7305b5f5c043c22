"""Names of files in the tree that stand for names out of hostile memory."""

from __future__ import annotations

import hashlib
import re

from cloudfs.render.escaping import is_hidden, raw_bytes

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
    if character in "/%" or is_hidden(character):
        return "".join(f"%{byte:02X}" for byte in raw_bytes(character))
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
