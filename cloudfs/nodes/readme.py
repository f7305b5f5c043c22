"""`README`: how to use this tree, on one screen, with examples that work in this very mount."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from collections.abc import Set as AbstractSet

from cloudfs.nodes.contexts import TreeContext, connector_entry, module_entry, os_entry, process_entry, root_entry
from cloudfs.nodes.procfs import LIKE_PROC
from engine.errors import EngineError
from engine.machine import Instance

UNSIZED = ("mem", "new", "plugins", "exports", "imports", "mounts", "mountinfo")
"""Files that say size 0 and have bytes all the same."""
WIDTH = 100
_FIRST_LINE = "cloudfs: the memory of a machine as files"


def readme_text(tree: TreeContext) -> str:
    """The whole of it."""
    return "".join(line.rstrip() + "\n" for line in _lines(tree))


def _lines(tree: TreeContext) -> Iterator[str]:
    yield _FIRST_LINE
    yield ""
    yield "Try it in this directory:"
    for example in examples(tree):
        yield f"  {example}"
    for title, described in (
        ("Here", root_entry.describe()),
        ("connector/NAME/", connector_entry.describe()),
        ("os/NAME/ (os/ has links into the first that was asked for)", os_entry.describe()),
        ("os/NAME/processes/PID/", process_entry.describe()),
        (".../modules/NAME/", module_entry.describe()),
    ):
        yield ""
        yield f"{title}:"
        yield from _listing(dict(described), LIKE_PROC if "PID" in title else frozenset())
    yield ""
    yield from KNOW


KNOW = (
    "Know that:",
    "  Nothing is written unless cloudfs was started with --writable; a refused write is EROFS.",
    "  grep belongs on regions/: below the whole tree a byte appears again and again.",
    f"  Of size 0, and not empty: {' '.join(UNSIZED)}.",
    "  tar and rsync store nothing of them, nor of proc/, where links are the target's own: follow none.",
    "  Of another machine a 0 in a process's stat may mean «not known»; status leaves such a line out.",
    "  In names %XX is a byte no name should hold; one that ends in ~ and a hash was cut (see info).",
    "  Keep indexers and backups out: .ignore and CACHEDIR.TAG tell those that ask.",
)


def _listing(described: Mapping[str, str], like_proc: AbstractSet[str]) -> Iterator[str]:
    """A line for each name; those that people know from /proc share one, and a `.json` twin stands with its text."""
    for name, summary in described.items():
        twin = f"{name}.json"
        if name not in like_proc and not name.endswith(".json"):
            names = f"{name} {twin}" if twin in described else name
            yield f"  {names:<16} {summary}"
    if like_proc:
        names = " ".join(name for name in described if name in like_proc)
        yield from textwrap.wrap(f"{names}: as in /proc/PID", WIDTH, initial_indent="  ", subsequent_indent="    ")


def examples(tree: TreeContext) -> Iterator[str]:
    """Lines for a shell whose working directory is the root of the tree."""
    default = tree.machine.default_os
    if default is not None:
        yield from _process_examples(default)
    for instance in tree.machine.instances("connector")[:1]:
        yield f"xxd -l 64 connector/{instance.name}/phys_mem"
        yield f"cat connector/{instance.name}/info"
    yield "cat connector/new os/new"


def _process_examples(instance: Instance) -> Iterator[str]:
    try:
        native = instance.layer.info.kind == "native"
        pids = instance.pids()
    except EngineError:
        return
    if not pids:
        return
    pid = "$$" if native else str(pids[0])
    process = f"os/processes/{pid}"
    yield f"cat {process}/maps"
    yield f"xxd -s 0x$(head -n 1 {process}/maps | cut -d - -f 1) -l 64 {process}/mem"
    yield f"grep -rl PATH= {process}/regions"
    if _tells_modules(instance, pids[0]):
        yield f"ls {process}/modules"


def _tells_modules(instance: Instance, pid: int) -> bool:
    try:
        return instance.process(pid).tells_modules
    except EngineError:
        return False
