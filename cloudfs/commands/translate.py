"""Translates virtual addresses to physical ones, and back.

SPACE is a PID, a process's name where only one has it, or `kernel`. ADDRESS is one address, several with commas,
or `-` for one to a line on standard input. With --reverse it is physical, and every virtual address that is mapped
to it is printed. An address that lies nowhere is printed with the reason (exit code 4).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator

from cloudfs.commands._address_spaces import address_space_of, modules_of
from cloudfs.commands._arguments import Exit, Parser, Shape, add_chain_options
from cloudfs.commands._opening import opened, words_of
from cloudfs.commands._output import Output
from cloudfs.commands._spaces import address_of
from cloudfs.render import Column, ModuleNames, address_text, page_size_text, translation_record, untranslated_record
from cloudfs.render.records import Record
from engine.errors import FaultError
from engine.translate.virtual import VirtualMemory

EXAMPLES = """\
  cloudfs translate -c raw:memory.raw -o raw-dtb:dtb=0x1ad000 kernel 0xfffff80000000000
  cloudfs translate memory.raw 4711 0x7ffd0010,0x7ffd1010
  cloudfs translate memory.raw kernel --walk 0xffffffff81000000    each entry on the way
  cloudfs translate memory.raw kernel --reverse 0x1000             who maps this page frame
"""
SHAPE = Shape(process="required", rest=("ADDRESS",), process_word="SPACE")
COLUMNS = (
    Column("address", "ADDRESS", right=True),
    Column("physical", "PHYSICAL", right=True),
    Column("page_size", "PAGE", right=True),
    Column("permissions", "PERMS"),
    Column("flags", "FLAGS"),
    Column("module", "MODULE"),
    Column("fault", "FAULT"),
)
REVERSE_COLUMNS = (Column("physical", "PHYSICAL", right=True), Column("address", "ADDRESS", right=True))
WALK_COLUMNS = (
    Column("address", "ADDRESS", right=True),
    Column("level", "LEVEL", right=True),
    Column("entry_address", "ENTRY AT", right=True),
    Column("entry", "ENTRY", right=True),
    Column("kind", "KIND"),
)


def configure(parser: Parser) -> None:
    """The words and options of `cloudfs translate`."""
    parser.usage = f"cloudfs translate [OPTIONS] {SHAPE}"
    form = parser.add_argument_group("what to print").add_mutually_exclusive_group()
    form.add_argument("--reverse", action="store_true", help="ADDRESS is physical: print what is mapped to it")
    form.add_argument("--walk", action="store_true", help="print the page-table entries on the way")
    add_chain_options(parser, process=True)


def run(arguments: argparse.Namespace) -> int:
    """Print the translations."""
    words = words_of(arguments, SHAPE)
    output = Output("translate", json=arguments.json, no_color=arguments.no_color)
    addresses = list(_addresses(words.rest[0]))
    assert words.process is not None, "the shape requires one"
    is_process = arguments.process is not None
    with (
        opened(arguments, words) as target,
        address_space_of(target, words.process, is_process=is_process) as (_, memory),
    ):
        columns: tuple[Column, ...] = COLUMNS
        if arguments.reverse:
            rows, columns = _reverse(memory, addresses), REVERSE_COLUMNS
        elif arguments.walk:
            rows, columns = [row for address in addresses for row in _walk(memory, address)], WALK_COLUMNS
        else:
            modules = modules_of(target, words.process, is_process=is_process)
            rows = [_translated(memory, address, modules) for address in addresses]
    if output.json:
        output.document(rows)
    elif rows:
        output.table(map(_for_people, rows) if output.terminal else rows, columns)
    missing = [row for row in rows if row.get("fault")] if not arguments.reverse else []
    if missing:
        output.say(f"{len(missing)} of {len(addresses)} addresses lie nowhere: {missing[0]['fault']}")
    if arguments.reverse and len({row["physical"] for row in rows}) < len(set(addresses)):
        output.say("nothing is mapped to some of these page frames")
        return Exit.PARTIAL
    return Exit.PARTIAL if missing else Exit.DONE


def _addresses(word: str) -> Iterator[int]:
    lines = sys.stdin if word == "-" else word.split(",")
    for line in lines:
        if line.strip():
            yield address_of(line.strip())


def _translated(memory: VirtualMemory, address: int, modules: ModuleNames) -> Record:
    try:
        record = translation_record(memory.walk(address))
    except FaultError as error:
        record = untranslated_record(address, str(error))
    return {**record, "module": modules.at(address) or None}


def _reverse(memory: VirtualMemory, frames: list[int]) -> list[Record]:
    rows, found = memory.phys_to_virt_many(frames)
    return [
        {"physical": address_text(frames[row]), "address": address_text(address)}
        for row, address in zip(rows.tolist(), found.tolist(), strict=True)
    ]


def _walk(memory: VirtualMemory, address: int) -> list[Record]:
    keys = ("address", "level", "entry_address", "entry", "kind", "fault")
    rows: list[Record] = []
    fault: str | None = None
    try:
        for level, entry_address, entry, kind in memory.path(address):
            fault = None
            name = kind.name if kind else "absent"
            values = (address_text(address), level, address_text(entry_address), address_text(entry), name, None)
            rows.append(dict(zip(keys, values, strict=True)))
        memory.walk(address)
    except FaultError as error:
        fault = str(error)
    if fault and rows:
        rows[-1]["fault"] = fault
    elif fault:
        rows.append(dict(zip(keys, (address_text(address), None, None, None, "absent", fault), strict=True)))
    return rows


def _for_people(row: Record) -> Record:
    """A row with its page's size as people say it."""
    size = row.get("page_size")
    return {**row, "page_size": page_size_text(size)} if size else row
