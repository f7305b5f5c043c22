"""What a person writes to say what to open: a TARGET, and the words of -c and -o.

    nothing                  this machine
    memory.raw               an image file, its format recognised by content
    https://host/memory.lime one behind a URL
    raw:memory.raw:base=1M   a plugin with target and options
    -c qemu:web-01 -o linux  a chain, each standing on the one before it
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Sequence
from itertools import pairwise

from engine import chain, registry
from engine.errors import EngineError, InvalidArgumentError, NotFoundError, NotRecognisedError
from engine.file_memory import open_descriptor
from engine.image_source import is_split, not_opened, open_source
from engine.machine import Instance, Kind, Machine
from engine.recognition import HEAD_SIZE, Format, connector_by_name, recognise
from engine.records import dataclass
from engine.remote_file import is_url

Link = tuple[Kind, chain.Spec]

def image_link(path: str) -> Link:
    """How to open an image file, by its content, also where it is split or packed.

    Raises NotRecognisedError for what no connector opens.
    """
    head = _head(path)
    found = recognise(head)
    inside: dict[str, str] = {}
    if is_split(path) or (found is not None and found.packing):
        outer = found
        with contextlib.closing(open_source(path, {}, writable=False)) as source:
            found, inside = recognise(source.head()), {"inside": "yes"}
        if found is not None and found.connector is not None:
            _check_packed(path, outer, found, found.connector)
    if found is None and (connector := connector_by_name(path)) is not None:
        return "connector", chain.Spec(connector, path)
    if found is None:
        return "connector", chain.Spec("raw", path, inside)
    if found.connector is None:
        sentence = not_opened(path, found, "which no installed connector reads")
        raise NotRecognisedError(f"{sentence}; {chain.Spec('raw', path)} shows its bytes")
    return "connector", chain.Spec(found.connector, path)


def _head(path: str) -> bytes:
    if is_url(path):
        with contextlib.closing(open_source(path, {}, writable=False, as_it_is=True)) as source:
            return source.head()
    try:
        with open(path, "rb", opener=_open_regular) as file:
            return file.read(HEAD_SIZE)
    except FileNotFoundError:
        or_plugin = "" if "/" in path else ", and no plugin of that name"
        raise NotFoundError(f"there is no file {path!r}{or_plugin}") from None


def _check_packed(path: str, outer: Format | None, found: Format, connector: str) -> None:
    """Raise NotRecognisedError where the connector of what is inside cannot open it as it is packed."""
    if outer is None or not outer.packing:
        return  # how its parts are joined it may know better
    if not registry.load_connector(connector).opens_packed:
        why = f"with {found.what} in it, which the connector {connector} does not read in place"
        raise NotRecognisedError(not_opened(path, outer, why))


def _open_regular(path: str, flags: int) -> int:
    del flags  # open(2)'s are chosen there, so that a FIFO cannot make us wait
    return open_descriptor(path, writable=False)


def target_link(target: str) -> Link:
    """What a TARGET means: a plugin's spec where the word up to its first colon names one, else an image's path."""
    word = target.split(":", 1)[0]
    if is_url(target):
        return image_link(target)
    if chain.NAME_PATTERN.fullmatch(word):
        plugin = registry.find(word)
        if plugin is not None:
            kind: Kind = "connector" if plugin.kind == "connector" else "oslayer"
            return kind, chain.parse_spec(target)
    return image_link(target)


@dataclass(frozen=True, slots=True)
class Chain:
    """A chain of openings; `implied` where its last link, `auto`, was not asked for."""

    links: tuple[Link, ...]
    implied: bool = False


def chain_of(target: str | None, words: Sequence[tuple[Kind, str]] = ()) -> Chain:
    """The chain that TARGET and the words of -c and -o (in their order) ask for; this machine where nothing is said.

    One that stops at a connector gets the OS layer `auto` last. Raises InvalidArgumentError where two of a
    kind follow one another.
    """
    links = [] if target is None else [target_link(target)]
    links += [(kind, chain.parse_spec(word)) for kind, word in words]
    if not links:
        links = [("oslayer", chain.Spec("native"))]
    for (kind, spec), (next_kind, next_spec) in pairwise(links):
        if kind == next_kind:
            plural = "connectors" if kind == "connector" else "OS layers"
            raise InvalidArgumentError(f"{spec} and {next_spec} are both {plural}: a chain alternates")
    if links[-1][0] == "connector":
        return Chain((*links, ("oslayer", chain.Spec(registry.AUTO))), implied=True)
    return Chain(tuple(links))


def open_chain(
    machine: Machine, wanted: Chain, *, need_os: bool = True, patience: float | None = None
) -> Instance:
    """Open a chain, each link on the one before it; gives the last instance.

    Without `need_os` memory in which no OS is recognised is no error where `auto` was only implied: the
    connector is given then, and its `last_error` says why. So it is where that takes longer than `patience` seconds:
    it goes on, and what is recognised stands in `machine` later.
    """
    parent: Instance | None = None
    for index, (kind, spec) in enumerate(wanted.links):
        if parent is None or need_os or not wanted.implied or index < len(wanted.links) - 1:
            parent = machine.open(kind, spec, parent=parent)
        else:
            parent = _recognised(machine, spec, parent, patience)
    assert parent is not None, "a chain has at least one link"
    return parent


def _recognised(machine: Machine, spec: chain.Spec, parent: Instance, patience: float | None) -> Instance:
    """The OS on a connector, or the connector where there is none, or not in time."""
    found: list[Instance | BaseException] = []

    def look() -> None:
        try:
            found.append(machine.open("oslayer", spec, parent=parent))
        except BaseException as error:
            if isinstance(error, EngineError | OSError):
                parent.last_error = str(error)
            found.append(error)

    if patience is None:
        look()
    else:
        thread = threading.Thread(target=look, name="recognition", daemon=True)
        thread.start()
        thread.join(patience)
    if not found:
        parent.last_error = f"an OS was looked for in {parent.spec} for {patience:g} s so far: it is shown once found"
        return parent
    if isinstance(found[0], NotRecognisedError):
        return parent
    if isinstance(found[0], BaseException):
        raise found[0]
    return found[0]


def open_target(
    target: str | None = None,
    words: Sequence[tuple[Kind, str]] = (),
    *,
    writable: bool = False,
    need_os: bool = False,
) -> Machine:
    """A Machine with one chain open; see `chain_of` and `open_chain`. Nothing stays open where that fails."""
    machine = Machine(writable=writable)
    try:
        open_chain(machine, chain_of(target, words), need_os=need_os)
    except BaseException:
        machine.close()
        raise
    return machine
