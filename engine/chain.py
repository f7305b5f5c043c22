"""The words in which openings are written: in the files `new`, after -c and -o, and as a TARGET.

    NAME [-c PARENT] PLUGIN[:TARGET][:KEY=VALUE,KEY=VALUE]

The last part is options when it begins with KEY=. Quotes ('…' or "…") keep what stands in them whole: a
colon, a comma, a space. A backslash outside of '…' keeps the next character.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import field

from engine.errors import InvalidArgumentError
from engine.records import dataclass

USAGE = "NAME [-c PARENT] PLUGIN[:TARGET][:KEY=VALUE,KEY=VALUE]"
NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", re.ASCII)
_OPTION = re.compile(r"[A-Za-z][A-Za-z0-9_-]*=", re.ASCII)
_PLAIN = re.compile(r"[A-Za-z0-9_./@%+=-]+", re.ASCII)
LINE_LIMIT = 64 << 10


@dataclass(frozen=True, slots=True)
class Spec:
    """What to open: a plugin, its target, its options."""

    plugin: str
    target: str = ""
    options: Mapping[str, str] = field(default_factory=dict, hash=False)

    def __str__(self) -> str:
        text = self.plugin + (":" + quote(self.target) if self.target else "")
        if self.options:
            text += ":" + ",".join(f"{key}={quote(value, '=')}" for key, value in self.options.items())
        return text


@dataclass(frozen=True, slots=True)
class Command:
    """One line of `new`."""

    name: str
    spec: Spec
    parent: str | None = None


def quote(text: str, plain: str = "") -> str:
    """`text` so that reading it gives it back."""
    if text and _PLAIN.fullmatch(text) and ("=" not in text or "=" in plain):
        return text
    return '"' + re.sub(r'(["\\])', r"\\\1", text) + '"'


class _Text:
    """Characters, each with whether it was quoted: only bare ones separate."""

    __slots__ = ("bare", "text")

    def __init__(self, text: str, bare: Sequence[bool]) -> None:
        self.text = text
        self.bare = bare

    @classmethod
    def read(cls, line: str) -> _Text:
        characters: list[str] = []
        bare: list[bool] = []
        closing = ""
        escaped = False
        for character in line:
            if escaped:
                characters.append(character)
                bare.append(False)
                escaped = False
            elif character == "\\" and closing != "'":
                escaped = True
            elif closing:
                if character == closing:
                    closing = ""
                else:
                    characters.append(character)
                    bare.append(False)
            elif character in "'\"":
                closing = character
            else:
                characters.append(character)
                bare.append(True)
        if closing or escaped:
            raise InvalidArgumentError(f"{line!r}: {'a quote is not closed' if closing else 'a backslash stands last'}")
        return cls("".join(characters), bare)

    def split(self, separators: str, limit: int = -1) -> list[_Text]:
        parts: list[_Text] = []
        start = 0
        for index, character in enumerate(self.text):
            if character in separators and self.bare[index] and limit != len(parts):
                parts.append(_Text(self.text[start:index], self.bare[start:index]))
                start = index + 1
        parts.append(_Text(self.text[start:], self.bare[start:]))
        return parts

    def begins_option(self) -> bool:
        match = _OPTION.match(self.text)
        return match is not None and all(self.bare[: match.end()])


def _spec(word: _Text, whole: str) -> Spec:
    plugin, *rest = word.split(":", 1)
    if not NAME_PATTERN.fullmatch(plugin.text):
        raise InvalidArgumentError(f"{whole!r}: {plugin.text!r} is not a plugin's name; want {USAGE}")
    if not rest:
        return Spec(plugin.text)
    parts = rest[0].split(":")
    if not parts[-1].begins_option():
        return Spec(plugin.text, rest[0].text)
    options = _options(parts.pop(), whole)
    return Spec(plugin.text, ":".join(part.text for part in parts), options)


def _options(text: _Text, whole: str) -> dict[str, str]:
    options: dict[str, str] = {}
    for part in text.split(","):
        if not part.begins_option():
            raise InvalidArgumentError(f"{whole!r}: {part.text!r} is not KEY=VALUE (quote a value that holds a comma)")
        key, value = part.text.split("=", 1)
        if key in options:
            raise InvalidArgumentError(f"{whole!r}: {key}= stands twice")
        options[key] = value
    return options


def parse_spec(word: str) -> Spec:
    """Read PLUGIN[:TARGET][:OPTIONS]; spaces are plain characters here, as the shell has split already."""
    _check(word)
    return _spec(_Text.read(word), word)


def parse_command(line: str) -> Command:
    """Read one line of `new`. Raises InvalidArgumentError that says what is wrong and how it is written."""
    _check(line)
    words = [part for part in _Text.read(line).split(" \t") if part.text]
    if len(words) not in (2, 4) or (len(words) == 4 and words[1].text != "-c"):
        raise InvalidArgumentError(f"{line!r}: want {USAGE}")
    name = check_name(words[0].text)
    return Command(name, _spec(words[-1], line), words[2].text if len(words) == 4 else None)


def check_name(name: str) -> str:
    """The name of an instance, if it can be one."""
    if not NAME_PATTERN.fullmatch(name):
        raise InvalidArgumentError(
            f"{name!r} cannot name an instance: want a letter or digit, then up to 63 letters, digits, . _ -"
        )
    return name


def _check(text: str) -> None:
    if len(text) > LINE_LIMIT or "\0" in text or "\n" in text:
        raise InvalidArgumentError("a line of at most 64 KiB without NUL is wanted")
