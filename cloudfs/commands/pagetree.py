"""Summarises the page tables of an address space: pages by size and permission, and what takes most.

SPACE is a PID, a process's name where only one has it, or `kernel`.
"""

from __future__ import annotations

import argparse
import heapq
from collections import Counter
from typing import Any

import numpy as np

from cloudfs.commands._address_spaces import address_space_of, modules_of
from cloudfs.commands._arguments import Exit, Parser, Shape, UsageError, add_chain_options
from cloudfs.commands._opening import opened, words_of
from cloudfs.commands._output import Output
from cloudfs.render import Column, ModuleNames, address_text, human_size, page_permissions, page_size_text
from engine.errors import FaultKind
from engine.translate.bulk import Blocks, WalkReport
from engine.translate.maps import coalesced
from engine.translate.virtual import VirtualMemory
from engine.types import PageFlags, Rights

EXAMPLES = """\
  cloudfs pagetree -c raw:memory.raw -o raw-dtb:dtb=0x1ad000 kernel
  cloudfs pagetree memory.raw 4711 --top 20
  cloudfs pagetree memory.raw kernel --json | jq .tables
"""
SHAPE = Shape(process="required", process_word="SPACE")
TOP = 10
TOP_LIMIT = 10_000
PAGE_COLUMNS = (
    Column("page_size", "PAGE", right=True),
    Column("permissions", "PERMS"),
    Column("pages", "PAGES", right=True),
    Column("bytes", "BYTES", right=True),
)
TOP_COLUMNS = (
    Column("start", "START", right=True),
    Column("stop", "STOP", right=True),
    Column("permissions", "PERMS"),
    Column("bytes", "BYTES", right=True),
    Column("module", "MODULE"),
)


def configure(parser: Parser) -> None:
    """The words and options of `cloudfs pagetree`."""
    parser.usage = f"cloudfs pagetree [OPTIONS] {SHAPE}"
    parser.add_argument("--top", default=str(TOP), metavar="N", help=f"how many of the largest ranges ({TOP})")
    add_chain_options(parser, process=True)


def run(arguments: argparse.Namespace) -> int:
    """Walk the tree and print the summary."""
    words = words_of(arguments, SHAPE)
    output = Output("pagetree", json=arguments.json, no_color=arguments.no_color)
    if not arguments.top.isdigit() or int(arguments.top) > TOP_LIMIT:
        raise UsageError(f"--top {arguments.top}: want a number up to {TOP_LIMIT}")
    assert words.process is not None, "the shape requires one"
    is_process = arguments.process is not None
    with (
        opened(arguments, words) as target,
        address_space_of(target, words.process, is_process=is_process) as (_, memory),
    ):
        modules = modules_of(target, words.process, is_process=is_process)
        summary = summarise(memory, int(arguments.top), modules)
    if output.json:
        output.document(summary)
    else:
        _print(output, summary)
    tables = summary["tables"]
    if tables["unreadable"] or tables["limited"]:
        output.say("part of the page tables could not be walked: " + _what_is_missing(tables))
        return Exit.PARTIAL
    return Exit.DONE


def summarise(memory: VirtualMemory, top: int, modules: ModuleNames) -> dict[str, Any]:
    """The summary as a record: one pass over the tree, in bounded memory."""
    report, counts, sizes = WalkReport(), Counter[tuple[int, int, int]](), Counter[tuple[int, int, int]]()
    absent = Counter[str]()
    largest: list[tuple[int, int, int, int]] = []

    def counted(chunk: Blocks) -> Blocks:
        _count(chunk, counts, sizes, absent)
        return chunk

    chunks = map(counted, memory.translation_blocks(report=report))
    for runs in coalesced(chunks, frames=False):
        wanted = np.argsort(runs.sizes)[::-1][:top]
        found = zip(
            runs.sizes[wanted].tolist(), runs.starts[wanted].tolist(), runs.rights[wanted].tolist(),
            runs.flags[wanted].tolist(), strict=True,
        )  # fmt: skip
        largest = heapq.nlargest(top, [*largest, *found])
    pages = [
        {
            "page_size": 1 << bits,
            "permissions": page_permissions(Rights(rights), PageFlags(flags)),
            "pages": count,
            "bytes": sizes[bits, rights, flags],
        }
        for (bits, rights, flags), count in sorted(counts.items(), key=lambda item: -sizes[item[0]])
    ]
    return {
        "dtb": [address_text(dtb) for _, dtb in memory.roots],
        "modes": [spec.name for spec, _ in memory.roots],
        "mapped": sum(sizes.values()),
        "pages": pages,
        "absent": dict(absent),
        "tables": {
            "read": report.tables,
            "repeated": report.repeated,
            "unreadable": [address_text(address) for address in report.unreadable],
            "malformed": report.malformed,
            "limited": report.limited,
        },
        "largest": [
            {
                "start": address_text(start),
                "stop": address_text(start + size),
                "permissions": page_permissions(Rights(rights), PageFlags(flags)),
                "bytes": size,
                "module": modules.at(start) or None,
            }
            for size, start, rights, flags in largest
        ],
    }


_SHOWN_FLAGS = (PageFlags.GLOBAL | PageFlags.INACCESSIBLE | PageFlags.TRANSITION).value


def _count(
    chunk: Blocks, counts: Counter[tuple[int, int, int]], sizes: Counter[tuple[int, int, int]], absent: Counter[str]
) -> None:
    """Add a chunk's pages by (log2 of the page, rights, flags), and its absent stretches by their reasons."""
    good = chunk.kinds == 0
    keys = (
        chunk.page_bits.astype(np.uint32) << 16 | chunk.rights.astype(np.uint32) << 8 | chunk.flags & _SHOWN_FLAGS
    )
    for key in np.unique(keys[good]).tolist():
        rows = good & (keys == key)
        bits, rights, flags = key >> 16, key >> 8 & 0xFF, key & 0xFF
        size = int(chunk.sizes[rows].sum())
        sizes[bits, rights, flags] += size
        counts[bits, rights, flags] += max(1, size >> bits)
    for kind, number in zip(*np.unique(chunk.kinds[~good], return_counts=True), strict=True):
        absent[FaultKind(int(kind)).name.lower()] += int(number)


def _print(output: Output, summary: dict[str, Any]) -> None:
    rows = summary["pages"]
    largest = summary["largest"]
    if output.terminal:
        roots = ", ".join(f"{dtb} ({mode})" for dtb, mode in zip(summary["dtb"], summary["modes"], strict=True))
        output.text(f"DTB {roots}: {human_size(summary['mapped'])} mapped by {summary['tables']['read']} tables\n\n")
        rows = [
            {**row, "page_size": page_size_text(row["page_size"]), "bytes": human_size(row["bytes"])} for row in rows
        ]
        largest = [{**row, "bytes": human_size(row["bytes"])} for row in largest]
    output.table(rows, PAGE_COLUMNS)
    if largest:
        output.text("\n")
        output.table(largest, TOP_COLUMNS)
    for why, count in summary["absent"].items():
        output.text(f"\nabsent with a reason: {count} × {why}\n")


def _what_is_missing(tables: dict[str, Any]) -> str:
    parts = []
    if tables["unreadable"]:
        first = tables["unreadable"][0]
        parts.append(f"{len(tables['unreadable'])} tables lie outside of memory, the first at {first}")
    if tables["limited"]:
        parts.append("there are more tables than memory has pages")
    return "; ".join(parts)
