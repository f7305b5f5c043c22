"""The arrows: which room may import which. A name may import whatever its arrows reach, TYPE_CHECKING included.

A new room that is not matched below fails the test: draw its arrow first.
"""

from __future__ import annotations

import ast
import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# room (pattern) → the rooms (patterns) its arrows point to; the first pattern that matches counts.
ARROWS: dict[str, tuple[str, ...]] = {
    "engine.records": (),
    "engine.types": (),
    "engine.errors": (),
    "engine.mounts": (),
    "engine.numbers": ("engine.errors",),
    "engine.containers": (),
    "engine.machine_states": (),
    "engine.padding": ("engine.types", "engine.errors"),
    "engine.floors": (),
    "engine.memory": ("engine.types", "engine.errors", "engine.padding"),
    "engine.bytes_memory": ("engine.memory",),
    "engine.leases": ("engine.mounts",),
    "engine.cache_folder": (),
    "engine.kept_columns": ("engine.cache_folder",),
    "engine.compiled": ("engine.cache_folder",),
    "engine.accelerator": ("engine.bytes_memory", "engine.compiled"),
    "engine.file_memory": ("engine.accelerator", "engine.middleware", "engine.leases", "engine.floors"),
    "engine.memory_map": ("engine.memory", "engine.floors"),
    "engine.joined_memory": ("engine.memory",),
    "engine.remote_file": ("engine.block_memory", "engine.middleware", "engine.leases"),
    "engine.image_source": (
        "engine.file_memory", "engine.joined_memory", "engine.block_memory", "engine.decoders", "engine.recognition",
        "engine.formats.zip", "engine.formats.xz", "engine.formats.zstd", "engine.formats.lz4",
        "engine.remote_file",
    ),
    "engine.zero_gaps": ("engine.memory",),
    "engine.decoders": ("engine.errors",),
    "engine.block_memory": ("engine.bytes_memory",),
    "engine.overlay": ("engine.memory",),
    "engine.page_cache": ("engine.memory",),
    "engine.middleware": ("engine.overlay", "engine.page_cache"),
    "engine.formats": (),
    "engine.formats.elf": ("engine.formats.elf.*",),
    "engine.layout": ("engine.errors",),
    "engine.formats.avml": ("engine.block_memory", "engine.formats.lime"),
    "engine.formats.kdump.*": ("engine.memory_map", "engine.decoders", "engine.accelerator", "engine.formats.*"),
    "engine.formats.*": ("engine.bytes_memory", "engine.layout", "engine.formats.*"),
    "engine.translate": (),
    "engine.translate.mmu": ("engine.memory",),
    "engine.translate.modes": ("engine.translate.x86", "engine.translate.arm", "engine.translate.riscv"),
    "engine.translate.rows": ("engine.translate.mmu", "engine.translate.columns"),
    "engine.translate.batch": ("engine.translate.rows",),
    "engine.translate.tree": ("engine.translate.batch",),
    "engine.translate.listing": ("engine.translate.rows",),
    "engine.translate.accelerated": ("engine.translate.tree", "engine.accelerator"),
    "engine.translate.bulk": ("engine.translate.accelerated", "engine.translate.listing"),
    "engine.translate.maps": ("engine.translate.bulk",),
    "engine.translate.tower": ("engine.translate.accelerated", "engine.floors"),
    "engine.translate.virtual": ("engine.translate.maps", "engine.translate.tower"),
    "engine.translate.*": ("engine.translate.mmu",),
    "engine.oslayer": ("engine.memory_map", "engine.leases"),
    "engine.elf_modules": ("engine.oslayer", "engine.formats.*"),
    "engine.connector": ("engine.oslayer",),
    "engine.image_connector": ("engine.connector", "engine.image_source"),
    "engine.connectors": (),
    "engine.connectors.gdb": (
        "engine.connector", "engine.middleware", "engine.connectors.gdb.*", "engine.formats.*", "engine.numbers",
    ),
    "engine.connectors.gdb.*": ("engine.memory_map", "engine.connectors.gdb.*"),
    "engine.connectors.*": (
        "engine.connector", "engine.file_memory", "engine.block_memory", "engine.formats.*", "engine.middleware",
        "engine.decoders", "engine.zero_gaps", "engine.image_source", "engine.image_connector",
        "engine.numbers",
    ),
    "engine.connectors.qemu": ("engine.connectors.qemu.connector",),
    "engine.connectors.qemu.*": (
        "engine.joined_memory", "engine.connector",
        "engine.file_memory", "engine.numbers", "engine.connectors.qemu.*", "engine.formats.*",
        "engine.machine_states",
    ),
    "engine.oslayers": (),
    "engine.oslayers.raw_dtb": ("engine.oslayer", "engine.translate.*", "engine.numbers"),
    "engine.oslayers.linux": ("engine.oslayers.linux.*",),
    "engine.oslayers.linux.*": (
        "engine.oslayer", "engine.elf_modules", "engine.formats.*", "engine.layout", "engine.translate.*",
        "engine.numbers", "engine.middleware", "engine.kept_columns", "engine.containers", "engine.file_memory",
        "engine.machine_states",
        "engine.oslayers.linux.*",
    ),
    "engine.oslayers.native": ("engine.oslayers.native.*",),
    "engine.oslayers.native.*": (
        "engine.oslayer", "engine.elf_modules", "engine.formats.*", "engine.mounts", "engine.file_memory",
        "engine.containers", "engine.accelerator", "engine.oslayers.native.*",
    ),
    "engine.announced": (),
    "engine.registry": ("engine.connector", "engine.oslayer", "engine.announced"),
    "engine.chain": ("engine.errors",),
    "engine.machine": ("engine.registry", "engine.chain", "engine.middleware"),
    "engine.recognition": ("engine.announced",),
    "engine.targets": ("engine.machine", "engine.file_memory", "engine.recognition", "engine.image_source"),
    "engine": ("engine.*",),
    "engine.testing": ("engine.*",),
    "engine.testing.*": ("engine.*",),
    "cloudfs": (),
    "cloudfs.render": ("cloudfs.render.*",),
    "cloudfs.render.*": ("engine", "engine.*", "cloudfs.render.*"),
    "cloudfs.node": ("engine.errors", "engine.leases", "engine.types"),
    "cloudfs.entries": ("cloudfs.node", "engine", "engine.*"),
    "cloudfs.nodes": (),
    "cloudfs.nodes.*": ("cloudfs.entries", "cloudfs.render", "cloudfs.nodes", "cloudfs.nodes.*"),
    "cloudfs.errno_table": ("engine.errors",),
    "cloudfs.inodes": ("cloudfs.node",),
    "cloudfs.fast_loop": ("cloudfs.shim",),
    "cloudfs.mountpoint": ("engine.errors", "cloudfs.serving"),
    "cloudfs.serving": (),
    "cloudfs.watchdog": ("cloudfs.mountpoint",),
    "cloudfs.shim": ("engine.types", "engine.cache_folder"),
    "cloudfs.shortcuts": ("cloudfs.shim", "cloudfs.node"),
    "cloudfs.seeking": ("cloudfs.operations",),
    "cloudfs.doctor": ("cloudfs.mount",),
    "cloudfs.leased_files": ("cloudfs.node",),
    "cloudfs.resting": ("cloudfs.operations",),
    "cloudfs.listing": ("cloudfs.inodes",),
    "cloudfs.worker_threads": ("engine.errors",),
    "cloudfs.bug_log": ("cloudfs.node",),
    "cloudfs.node_calls": (
        "cloudfs.node", "cloudfs.errno_table", "cloudfs.watchdog", "cloudfs.worker_threads", "cloudfs.bug_log",
    ),
    "cloudfs.shown_attributes": ("cloudfs.inodes",),
    "cloudfs.pruning": ("cloudfs.inodes",),
    "cloudfs.directory_handlers": (
        "cloudfs.node_calls", "cloudfs.listing", "cloudfs.shown_attributes", "cloudfs.pruning",
    ),
    "cloudfs.operations": ("cloudfs.directory_handlers", "cloudfs.shortcuts", "cloudfs.leased_files"),
    "cloudfs.mount": (
        "cloudfs.seeking", "cloudfs.mountpoint", "cloudfs.fast_loop", "cloudfs.nodes.root", "cloudfs.resting",
    ),
    "cloudfs.daemon": ("engine.errors",),
    "cloudfs.commands": (),
    "cloudfs.commands.mount": ("cloudfs.mount", "cloudfs.commands.*", "cloudfs.daemon"),
    "cloudfs.commands.plugins": ("cloudfs.nodes.plugins_file", "cloudfs.commands.*", "cloudfs.doctor"),
    "cloudfs.commands.umount": ("cloudfs.mountpoint", "cloudfs.commands.*"),
    "cloudfs.commands.*": ("cloudfs.render", "cloudfs.commands.*"),
    "cloudfs.cli": ("cloudfs.commands.*",),
    "cloudfs.start": ("cloudfs.cli", "cloudfs.mount_helper"),
    "cloudfs.__main__": ("cloudfs.start",),
    "cloudfs.mount_helper": ("cloudfs.cli", "cloudfs.commands.*"),
}  # fmt: skip
COMMON = {"engine.records"}
"""Whoever likes may import these: they import nothing themselves."""
FUSE = {
    "cloudfs.mount", "cloudfs.operations", "cloudfs.fast_loop", "cloudfs.worker_threads", "cloudfs.seeking",
    "cloudfs.doctor", "cloudfs.leased_files", "cloudfs.resting", "cloudfs.node_calls", "cloudfs.shown_attributes",
    "cloudfs.directory_handlers",
}  # fmt: skip
"""Only these import pyfuse3 and trio, what runs blocking work among them: the rest must not pay for them."""


def _rooms() -> dict[str, Path]:
    found = {}
    for package in ("engine", "cloudfs"):
        for path in sorted((ROOT / package).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            found[name.removesuffix(".__init__")] = path
    return found


ROOMS = _rooms()


def _arrows(room: str) -> tuple[str, ...]:
    if room in ARROWS:
        return ARROWS[room]
    matches = [pattern for pattern in ARROWS if fnmatch.fnmatchcase(room, pattern)]
    assert matches, f"draw the arrows of {room} in {Path(__file__).name}"
    return ARROWS[max(matches, key=len)]


def _reach(room: str) -> set[str]:
    seen: set[str] = set()
    todo = [room]
    while todo:
        for pattern in _arrows(todo.pop()):
            for other in fnmatch.filter(ROOMS, pattern):
                if other not in seen:
                    seen.add(other)
                    todo.append(other)
    return seen


def _imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: imports are written whole"
            base = str(node.module)
            found.update(f"{base}.{alias.name}" if f"{base}.{alias.name}" in ROOMS else base for alias in node.names)
    return found


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_what_its_arrows_reach(room):
    ours = {name for name in _imports(ROOMS[room]) if name.split(".")[0] in ("engine", "cloudfs")}
    wrong = ours - _reach(room) - {room} - COMMON
    assert not wrong, f"{room} imports {', '.join(sorted(wrong))} against the arrows"


@pytest.mark.parametrize("room", [room for room in ROOMS if room not in FUSE])
def test_only_the_mount_imports_pyfuse3_and_trio(room):
    heavy = {name.split(".")[0] for name in _imports(ROOMS[room])} & {"pyfuse3", "trio"}
    assert not heavy


def test_the_engine_knows_no_file_system():
    for room, path in ROOMS.items():
        if room.startswith("engine"):
            assert not any(name.startswith("cloudfs") for name in _imports(path)), room


def test_leaves_do_not_import_one_another():
    for room, path in ROOMS.items():
        parts = room.split(".")
        if len(parts) >= 3 and parts[1] in ("connectors", "oslayers"):
            for name in _imports(path):
                other = name.split(".")
                if other[:2] in (["engine", "connectors"], ["engine", "oslayers"]):
                    assert other[:3] == parts[:3], f"{room} imports the leaf {name}"


def test_no_two_rooms_import_each_other():
    graph = {room: {name for name in _imports(path) if name in ROOMS} - {room} for room, path in ROOMS.items()}
    graph.pop("engine")  # its imports are for type checkers alone: the names are loaded on first use
    state: dict[str, int] = {}

    def visit(room: str, way: list[str]) -> None:
        if state.get(room) == 2 or room not in graph:
            return
        assert state.get(room) != 1, f"a circle: {' → '.join([*way[way.index(room) :], room])}"
        state[room] = 1
        for other in graph[room]:
            visit(other, [*way, room])
        state[room] = 2

    for room in graph:
        visit(room, [])
