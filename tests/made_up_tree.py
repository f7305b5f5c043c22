"""A tree that is made up: every kind of node, and nodes with every kind of bug.

`python made_up_tree.py MOUNTPOINT [KEY=VALUE …]` mounts it (keys: those of MountOptions, `files=N` and
`backing=FILE`), prints «ready» when it stands, and at SIGUSR1 how many inodes the kernel knows.
"""

from __future__ import annotations

import errno
import logging
import mmap
import os
import signal
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from cloudfs.node import Attributes, Directory, File, Link, Node, OpenFile, TextLink
from engine.bytes_memory import BytesMemory
from engine.errors import FaultError, ProcessExitedError, TargetBusyError
from engine.memory import Memory

MEMORY_SIZE = (2 << 20) + 100
PATTERN = bytes((7 * i + i // 251) % 256 for i in range(65521))


def pattern(size: int) -> bytes:
    return (PATTERN * (size // len(PATTERN) + 1))[:size]


class Folder(Directory):
    """A directory with fixed children, or those that a function gives."""

    def __init__(self, name: str, children: dict[str, Node] | Callable[[], dict[str, Node]]) -> None:
        self.name = name
        self._children = children if callable(children) else lambda: children
        self.removed: list[str] = []

    @property
    def identity(self) -> tuple[str, str]:
        return ("folder", self.name)

    def children(self) -> Iterator[tuple[str, Node]]:
        yield from self._children().items()

    def child(self, name: str) -> Node | None:
        return self._children().get(name)


class Instances(Folder):
    """A directory whose children can be removed, but for the one called `busy`."""

    def attributes(self) -> Attributes:
        return Attributes(stat.S_IFDIR | 0o755)

    def remove_child(self, name: str) -> None:
        if name not in self._children():
            raise FileNotFoundError(name)
        if name == "busy":
            raise TargetBusyError("something stands on busy")
        del self._children()[name]


class OpenBytes(OpenFile):
    def __init__(self, data: bytes, *, keep: bool = False) -> None:
        self.data = data
        self.keep_cache = keep
        self.direct_io = not keep
        self.released = 0

    def read(self, offset: int, size: int, scratch: memoryview) -> bytes:
        return self.data[offset : offset + size]

    def release(self) -> None:
        self.released += 1


class Text(File):
    """A text file of a fixed content."""

    def __init__(self, name: str, text: str, *, keep: bool = False, mode: int = 0o444) -> None:
        self.name, self.text, self.keep, self.mode = name, text, keep, mode

    @property
    def identity(self) -> tuple[str, str]:
        return ("text", self.name)

    def attributes(self) -> Attributes:
        return Attributes(stat.S_IFREG | self.mode, size=len(self.text.encode()))

    def open(self, flags: int) -> OpenFile:
        return OpenBytes(self.text.encode(), keep=self.keep)


class OpenMemory(OpenFile):
    """Reads up to the first fault, as /proc/PID/mem does."""

    def __init__(self, memory: Memory) -> None:
        self.memory = memory

    def read(self, offset: int, size: int, scratch: memoryview) -> bytes | memoryview:
        count = min(size, self.memory.size - offset)
        if count <= 0:
            return b""
        part = scratch[:count]
        return part[: self.memory.read_available(offset, part)]

    def write(self, offset: int, data: bytes) -> int:
        self.memory.write(offset, data)
        return len(data)


class MemoryFile(File):
    def __init__(self, name: str, memory: Memory) -> None:
        self.name, self.memory = name, memory

    @property
    def identity(self) -> tuple[str, str]:
        return ("memory", self.name)

    def attributes(self) -> Attributes:
        return Attributes(stat.S_IFREG | (0o600 if self.memory.writable else 0o400), size=self.memory.size)

    def open(self, flags: int) -> OpenFile:
        return OpenMemory(self.memory)


class Holed(BytesMemory):
    """The bytes of [4096, 8192) cannot be read."""

    def readinto(self, address: int, buffer: memoryview) -> None:
        if address < 8192 and address + len(buffer) > 4096:
            if address < 4096:
                super().readinto(address, buffer[: 4096 - address])
            raise FaultError(max(address, 4096))
        super().readinto(address, buffer)


class OpenMapping(OpenFile):
    """Gives parts of a file's mapping themselves, without a copy: the file may be cut meanwhile."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            self.view = memoryview(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ))

    def read(self, offset: int, size: int, scratch: memoryview) -> memoryview:
        return self.view[offset : offset + size]


class MappedFile(File):
    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def identity(self) -> tuple[str, str]:
        return ("mapped", str(self.path))

    def attributes(self) -> Attributes:
        return Attributes(stat.S_IFREG | 0o400, size=self.path.stat().st_size)

    def open(self, flags: int) -> OpenFile:
        return OpenMapping(self.path)


class OpenCommands(OpenFile):
    """Collects lines; a rest without newline counts at the next flush. The word `fail` is refused."""

    may_block = True

    def __init__(self, control: Control) -> None:
        self.control = control
        self.rest = b""

    def read(self, offset: int, size: int, scratch: memoryview) -> bytes:
        return self.control.text()[offset : offset + size]

    def write(self, offset: int, data: bytes) -> int:
        *lines, self.rest = (self.rest + data).split(b"\n")
        for line in lines:
            self.run(line)
        return len(data)

    def flush(self) -> None:
        self.control.flushes += 1
        rest, self.rest = self.rest, b""
        if rest:
            self.run(rest)

    def run(self, line: bytes) -> None:
        if line == b"fail":
            raise FileExistsError("there is one already")
        self.control.lines.append(line)


class Control(File):
    """A control file that remembers its commands; reading it shows them."""

    takes_commands = True

    def __init__(self, name: str = "control") -> None:
        self.name = name
        self.lines: list[bytes] = []
        self.flushes = 0

    @property
    def identity(self) -> tuple[str, str]:
        return ("control", self.name)

    def text(self) -> bytes:
        return b"".join(b"# " + line + b"\n" for line in self.lines)

    def attributes(self) -> Attributes:
        return Attributes(stat.S_IFREG | 0o600, size=len(self.text()))

    def open(self, flags: int) -> OpenFile:
        return OpenCommands(self)


class OpenBlocking(OpenFile):
    """Reads wait for the event; `read_nowait` never does."""

    may_block = True

    def __init__(self, event: threading.Event) -> None:
        self.event = event
        self.released = 0

    def read(self, offset: int, size: int, scratch: memoryview) -> bytes | memoryview:
        self.event.wait(60)
        scratch[:4] = b"late"
        return scratch[offset : min(4, offset + size)]

    def release(self) -> None:
        self.released += 1


class Blocking(File):
    """A file whose target answers only after `event` is set. `slow`: so do opening and attributes."""

    def __init__(self, name: str, event: threading.Event, *, slow: bool = False) -> None:
        self.name, self.event, self.slow = name, event, slow
        self.opened: list[OpenBlocking] = []

    @property
    def identity(self) -> tuple[str, str]:
        return ("blocking", self.name)

    @property
    def may_block(self) -> bool:
        return self.slow

    @property
    def thread_group(self) -> str:
        return self.name

    def attributes(self) -> Attributes:
        if self.slow:
            self.event.wait(60)
        return Attributes(stat.S_IFREG | 0o444, size=4)

    def open(self, flags: int) -> OpenFile:
        if self.slow:
            self.event.wait(60)
        file = OpenBlocking(self.event)
        self.opened.append(file)
        return file


# -- nodes with bugs ---------------------------------------------------------------------------------------


class OpenBug(OpenFile):
    def __init__(self, give: Callable[[int], object]) -> None:
        self.give = give

    def read(self, offset: int, size: int, scratch: memoryview) -> bytes:
        return self.give(size)

    def write(self, offset: int, data: bytes) -> int:
        return self.give(len(data))


class BugFile(File):
    """A file whose reads and writes give what `give` gives for a size."""

    def __init__(self, name: str, give: Callable[[int], object]) -> None:
        self.name, self.give = name, give

    @property
    def identity(self) -> tuple[str, str]:
        return ("bug", self.name)

    def attributes(self) -> Attributes:
        return Attributes(stat.S_IFREG | 0o666, size=4096)

    def open(self, flags: int) -> OpenFile:
        return OpenBug(self.give)


class BrokenPart(Text):
    """A text file of which one method raises."""

    def __init__(self, name: str, method: str, error: BaseException) -> None:
        super().__init__(name, "text\n")
        self.method, self.error = method, error

    def attributes(self) -> Attributes:
        if self.method == "attributes":
            raise self.error
        return super().attributes()

    def open(self, flags: int) -> OpenFile:
        if self.method == "open":
            raise self.error
        if self.method == "return":
            return "not a file"
        return super().open(flags)


class WrongAttributes(Text):
    """Attributes that fit no struct stat."""

    def attributes(self) -> Attributes:
        return Attributes(-1, size=1 << 70, uid=-5, mtime_ns=1 << 90)


def raising(error: BaseException) -> Callable[[int], object]:
    def give(size: int) -> object:
        raise error

    return give


BUGS: dict[str, Callable[[int], object]] = {
    "raises": raising(RuntimeError("a bug")),
    "exits": raising(SystemExit(3)),
    "none": lambda size: None,
    "str": lambda size: "x" * size,
    "int": lambda size: 7.5,
    "too-long": lambda size: b"x" * (size + 1),
    "strided": lambda size: memoryview(bytes(2 * size))[::2],
    "released": lambda size: _released(size),
    "enosys": raising(OSError(errno.ENOSYS, "never heard of it")),
    "errno-0": raising(OSError(0, "no error")),
    "errno-9999": raising(OSError(9999, "no such error")),
    "errno-minus": raising(OSError(-5, "turned round")),
}


def _released(size: int) -> memoryview:
    view = memoryview(bytes(size))
    view.release()
    return view


BAD_NAMES = ("", "/", "a/b", ".", "..", "nul\0", "x" * 256, "x" * 300, "\ud800", "ü" * 128)
GOOD_NAMES = ("plain", "x" * 255, "with space", "nl\n", "\udcff", "ü" * 127, "-rf", "~")


def bad_names() -> Folder:
    """Good names between bad ones."""
    children: list[tuple[str, Node]] = []
    for number, name in enumerate(BAD_NAMES):
        children.append((name, Text(f"bad {number}", "bad\n")))
        if number < len(GOOD_NAMES):
            children.append((GOOD_NAMES[number], Text(f"good {number}", "good\n")))
    children.append(("plain", Text("again", "twice\n")))
    children.append(("not a node", "text"))
    children.append((b"bytes", Text("bytes", "x")))

    class BadNames(Folder):
        def children(self) -> Iterator[tuple[str, Node]]:
            yield from children

    return BadNames("bad names", {})


def bad_listing() -> Folder:
    """Children whose attributes fail, one that vanished, and a listing that ends in a bug."""

    class BadListing(Folder):
        def children(self) -> Iterator[tuple[str, Node]]:
            yield "first", Text("first", "1\n")
            yield "broken", BrokenPart("broken attributes", "attributes", RuntimeError("a bug"))
            yield "fault", BrokenPart("faulting attributes", "attributes", FaultError(0x1000))
            yield "vanished", BrokenPart("vanished", "attributes", ProcessExitedError(7))
            yield "wrong", WrongAttributes("wrong", "x")
            yield "last", Text("last", "9\n")
            raise ZeroDivisionError("in the middle of the listing")

        def child(self, name: str) -> Node | None:
            try:
                return dict(self.children()).get(name)
            except ZeroDivisionError:
                return next((node for found, node in _until_bug(self.children()) if found == name), None)

    return BadListing("bad listing", {})


def _until_bug(children: Iterator[tuple[str, Node]]) -> Iterator[tuple[str, Node]]:
    try:
        yield from children
    except ZeroDivisionError:
        return


class BadLink(Link):
    def __init__(self, name: str, text: object) -> None:
        self.name, self.text = name, text

    @property
    def identity(self) -> tuple[str, str]:
        return ("bad link", self.name)

    def target(self) -> str | bytes:
        return self.text


class Changing(Folder):
    """`number` generations of one name: each is another directory."""

    generation = 0

    def children(self) -> Iterator[tuple[str, Node]]:
        for generation in range(self.generation, self.generation + 3):
            name = f"process {generation}"
            yield str(generation), Folder(name, {"text": Text(name, f"{generation}\n")})

    def child(self, name: str) -> Node | None:
        return dict(self.children()).get(name)


class OpenInline(OpenFile):
    """Another process's memory, read in the loop: what `may_block` exists to prevent."""

    def __init__(self, pid: int) -> None:
        self.fd = os.open(f"/proc/{pid}/mem", os.O_RDONLY)

    def read(self, offset: int, size: int, scratch: memoryview) -> bytes:
        return os.pread(self.fd, size, offset)

    def release(self) -> None:
        os.close(self.fd)


class InlineMemory(File):
    def __init__(self, pid: int) -> None:
        self.pid = pid

    @property
    def identity(self) -> tuple[str, int]:
        return ("inline", self.pid)

    def attributes(self) -> Attributes:
        return Attributes(stat.S_IFREG | 0o400)

    def open(self, flags: int) -> OpenFile:
        return OpenInline(self.pid)


class InlineMemories(Folder):
    """`PID`: that process's memory, read in the loop."""

    def child(self, name: str) -> Node | None:
        return InlineMemory(int(name)) if name.isdigit() else None


class Made(Folder):
    """A node of its own for every name: `control…`, `memory…` and `instances…`."""

    def __init__(self, name: str) -> None:
        self.made: dict[str, Node] = {}
        super().__init__(name, self.made)

    def child(self, name: str) -> Node | None:
        if name not in self.made:
            if name.startswith("control"):
                self.made[name] = Control(name)
            elif name.startswith("memory"):
                self.made[name] = MemoryFile(name, BytesMemory(bytearray(pattern(MEMORY_SIZE))))
            elif name.startswith("instances"):
                self.made[name] = instances_of(name)
        return self.made.get(name)


def instances_of(name: str) -> Instances:
    return Instances(name, {kind: Folder(f"{name}/{kind}", {"info": Text(kind, "x\n")}) for kind in ("idle", "busy")})


class OpenSleepy(OpenBytes):
    def read(self, offset: int, size: int, scratch: memoryview) -> bytes:
        time.sleep(0.3)
        return super().read(offset, size, scratch)


class Sleepy(Text):
    """A read that takes some time in the loop."""

    def open(self, flags: int) -> OpenFile:
        return OpenSleepy(self.text.encode())


def make_tree(files: int = 10, backing: Path | None = None) -> Folder:
    """The tree. `files`: how many the directory `many` has; `backing`: the file behind `mapped`."""
    event = threading.Event()
    memory = BytesMemory(bytearray(pattern(MEMORY_SIZE)))
    many: dict[str, Node] = {f"file-{i:06}": Text(f"file-{i:06}", f"{i}\n") for i in range(files)}
    bugs: dict[str, Node] = {name: BugFile(name, give) for name, give in BUGS.items()}
    bugs["open-raises"] = BrokenPart("open raises", "open", KeyError("a bug"))
    bugs["open-returns-str"] = BrokenPart("open returns", "return", KeyError("unused"))
    bugs["attributes-raise"] = BrokenPart("attributes raise", "attributes", RuntimeError("a bug"))
    bugs["wrong-attributes"] = WrongAttributes("wrong attributes", "x")
    for name, text in {"nul": "a\0b", "empty": "", "long": "x" * 5000, "none": None}.items():
        bugs[f"link-{name}"] = BadLink(name, text)
    children: dict[str, Node] = {
        "text": Text("text", "hello\n"),
        "cached": Text("cached", pattern(300_000).decode("latin-1"), keep=True),
        "memory": MemoryFile("memory", memory),
        "read-only": MemoryFile("read-only", BytesMemory(pattern(MEMORY_SIZE))),
        "holed": MemoryFile("holed", Holed(pattern(3 * 4096))),
        "control": Control(),
        "link": TextLink(("link", "link"), "nested/deep"),
        "nested": Folder("nested", {"deep": Folder("deep", {"text": Text("deep text", "deep\n")})}),
        "many": Folder("many", many),
        "instances": instances_of("instances"),
        "bugs": Folder("bugs", bugs),
        "bad names": bad_names(),
        "bad listing": bad_listing(),
        "blocking": Blocking("blocking", event),
        "slow": Folder("slow", {"slow": Blocking("slow", event, slow=True), "text": Text("beside", "x\n")}),
        "inline": InlineMemories("inline", {}),
        "sleepy": Sleepy("sleepy", "slept\n"),
        "changing": Changing("changing", {}),
        "made": Made("made"),
    }
    if backing is not None:
        children["mapped"] = MappedFile(backing)
    return Folder("root", children)


def main() -> None:
    from cloudfs import mount as mounting

    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    mountpoint, *words = sys.argv[1:]
    given = dict(word.split("=", 1) for word in words)
    files = int(given.pop("files", "10"))
    backing = Path(given.pop("backing")) if "backing" in given else None
    fields = {
        key: value == "yes" if value in ("yes", "no") else float(value) if value[:1].isdigit() else value
        for key, value in given.items()
    }
    made: list[mounting.TreeOperations] = []

    class Recorded(mounting.TreeOperations):
        def __init__(self, *arguments: object, **keywords: object) -> None:
            super().__init__(*arguments, **keywords)
            made.append(self)

    def report(number: int, frame: object) -> None:
        made[0].inodes.check()
        print("inodes", len(made[0].inodes), flush=True)

    signal.signal(signal.SIGUSR1, report)
    mounting.TreeOperations = Recorded
    try:
        mounting.mount(
            make_tree(files, backing),
            mountpoint,
            mounting.MountOptions(**fields),
            ready=lambda: print("ready", flush=True),
        )
    except mounting.MountError as error:
        sys.exit(f"error: {error}")
    made[0].inodes.check()


if __name__ == "__main__":
    main()
