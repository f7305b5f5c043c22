"""The syntax of QEMU's command line: options, their key=value lists, sizes.

Sources: QEMU util/keyval.c and util/qemu-option.c (a comma inside of a value is written twice; the first word may
stand without its key; JSON where the value begins with a brace), util/qemu-config.c (files for -readconfig),
util/cutils.c (qemu_strtosz), qemu-options.hx (which options take no value).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal

WITHOUT_VALUE = frozenset(
    "S alt-grab async-teardown ctrl-grab curses daemonize enable-fips enable-hax enable-kvm enable-sync-profile "
    "full-screen h help jitdump localtime mem-prealloc no-acpi no-fd-bootchk no-frame no-hpet no-kvm no-kvm-irqchip "
    "no-kvm-pit no-kvm-pit-reinjection no-quit no-reboot no-shutdown no-user-config nodefaults nodefconfig nographic "
    "old-param one-insn-per-tb only-migratable perfmap portrait preconfig rtc-td-hack s sdl semihosting singlestep "
    "snapshot tdf usb version win2k-hack xen-attach xen-domid-restrict".split()
)
"""Options that stand alone; all others of QEMU take one value."""
OPTIONS_MOST = 1 << 16
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([bBkKmMgGtTpPeE]?)[iI]?[bB]?")
_UNITS = {"b": 0, "k": 10, "m": 20, "g": 30, "t": 40, "p": 50, "e": 60}
_LARGEST = 1 << 63


def options(arguments: Sequence[str]) -> Iterator[tuple[str, str]]:
    """(option without its dashes, value) in their order; an option without a value has an empty one."""
    index = 1
    while index < min(len(arguments), OPTIONS_MOST):
        word = arguments[index]
        index += 1
        if not word.startswith("-") or word == "-":
            continue  # an image of a disk
        name = word[2:] if word.startswith("--") else word[1:]
        if name in WITHOUT_VALUE or index >= len(arguments):
            yield name, ""
            continue
        yield name, arguments[index]
        index += 1


def pairs(text: str, first: str = "") -> dict[str, str]:
    """`key=value,key=value` as a mapping; the first word without a key is that of `first`. JSON too.

    A later key wins over an earlier one. A word alone means that it is on, `noWORD` that it is off.
    """
    if text.startswith("{"):
        return _json(text)
    found: dict[str, str] = {}
    for number, word in enumerate(_split(text)):
        key, equals, value = word.partition("=")
        if equals:
            found[key] = value
        elif number == 0 and first:
            found[first] = word
        elif key.startswith("no") and len(key) > 2:
            found[key[2:]] = "off"
        elif key:
            found[key] = "on"
    return found


def _split(text: str) -> list[str]:
    """At single commas; two of them are one that belongs to the word."""
    return [word.replace("\0", ",") for word in text.replace(",,", "\0").split(",")]


def _json(text: str) -> dict[str, str]:
    """The members of an object; of those in members the names are joined by a dot. QEMU takes single quotes too."""
    try:
        document = json.loads(text if '"' in text else text.replace("'", '"'))
    except (ValueError, RecursionError):
        return {}
    found: dict[str, str] = {}
    todo: list[tuple[str, object]] = [("", document)]
    while todo:
        prefix, value = todo.pop()
        if isinstance(value, Mapping):
            todo += [(f"{prefix}.{name}" if prefix else str(name), member) for name, member in value.items()]
        elif isinstance(value, bool):
            found[prefix] = "on" if value else "off"
        elif isinstance(value, str | int | float):
            found[prefix] = str(value)
    return found


_SECTION = re.compile(r"\[([a-z0-9_-]{1,64})(?:\s+\"([^\"]*)\")?\]")
_MEMBER = re.compile(r"([A-Za-z0-9_.-]{1,64})\s*=\s*\"([^\"]*)\"")
_GROUPS = {"memory": "m", "smp-opts": "smp"}


def sections(text: str) -> Iterator[tuple[str, str]]:
    """What a file for -readconfig says, as `options` gives it: (option, its words)."""
    name, words = "", list[str]()
    for line in text.splitlines()[:OPTIONS_MOST]:
        if head := _SECTION.fullmatch(line.strip()):
            if name:
                yield name, ",".join(words)
            name = _GROUPS.get(head[1], head[1])
            words = [] if head[2] is None else [_word("id", head[2])]
        elif member := _MEMBER.fullmatch(line.strip()):
            words.append(_word(member[1], member[2]))
    if name:
        yield name, ",".join(words)


def _word(key: str, value: str) -> str:
    return f"{key}={value}".replace(",", ",,")


def size_of(text: str | None, unit: str = "b") -> int | None:
    """Bytes, as QEMU reads a size: 2G, 1.5G, 0x1000; a bare number counts `unit`s. None where it is none."""
    if text is None or len(text) > 64:
        return None
    text = text.strip()
    if re.fullmatch(r"0[xX][0-9a-fA-F]{1,16}", text):
        number = int(text, 16) << _UNITS[unit]
        return number if number < _LARGEST else None
    match = _SIZE.fullmatch(text)
    if match is None:
        return None
    number = int(Decimal(match[1]) * (1 << _UNITS[match[2].lower() or unit]))
    return number if number < _LARGEST else None


def is_on(text: str | None) -> bool:
    """Whether a switch of QEMU is on."""
    return text in ("on", "yes", "true", "y")
