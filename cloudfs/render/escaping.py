"""Text out of hostile memory, made harmless for terminals and logs."""

from __future__ import annotations

import re
import unicodedata

_PRINTABLE_ASCII = re.compile(r"[ -~]*").fullmatch


def is_hidden(character: str) -> bool:
    """Whether a terminal or a listing could be deceived: controls, bidirectional marks, line separators."""
    return unicodedata.category(character) in ("Cc", "Cf", "Zl", "Zp", "Cs")


def raw_bytes(text: str) -> bytes:
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
        "".join(f"\\{byte:03o}" for byte in raw_bytes(character)) if is_hidden(character) else character
        for character in text
    )
