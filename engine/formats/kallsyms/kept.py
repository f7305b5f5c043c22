"""Symbols in a form that can be kept: what took time to find, and nothing that KASLR moves.

The names are written out once and kept; addresses are read anew, where they were found, in the way that proved right.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.errors import BadDataError, FaultError
from engine.formats.kallsyms.addresses import AddressMode, read_addresses
from engine.formats.kallsyms.finding import Tables
from engine.formats.kallsyms.names import Starts
from engine.formats.kallsyms.table import Kallsyms
from engine.memory import Memory
from engine.types import Extent

Columns = Mapping[str, npt.NDArray[Any]]

_NUMBERS = ("count", "count_address", "names", "markers", "marker_size", "token_table", "token_index")


def kept_form(symbols: Kallsyms) -> tuple[list[Extent], dict[str, Any], Columns] | None:
    """What the symbols were made of (extents of the memory), facts and columns; None where they should not be kept.

    A damaged table is not, nor one of whole addresses, of which each boot has others.
    """
    tables = symbols.tables
    address, base = symbols.places
    if symbols.skipped or tables.starts.damaged or symbols.mode is AddressMode.ABSOLUTE:
        return None
    facts = {name: getattr(tables, name) for name in _NUMBERS}
    facts |= {"order": tables.order, "mode": symbols.mode.value, "word": symbols.word_size}
    facts |= {"addresses": address, "base": base}
    block, begins = symbols.written_out
    made_of = [Extent(tables.count_address, tables.behind - tables.count_address), Extent(address, 4 * tables.count)]
    return made_of, facts, {"block": np.frombuffer(block, np.uint8), "begins": begins}


def from_kept(memory: Memory, virtual_base: int, facts: Mapping[str, Any], columns: Columns) -> Kallsyms:
    """The symbols again, from memory that holds the very same tables; see `load_kallsyms` for `virtual_base`.

    Raises BadDataError where the addresses cannot be read in that way.
    """
    numbers = {name: int(facts[name]) for name in _NUMBERS}
    count = numbers["count"]
    tables = Tables(order=str(facts["order"]), starts=Starts.forgotten(count), **numbers)
    base = facts["base"]
    block, begins = columns["block"].tobytes(), columns["begins"].astype(np.int32, copy=False)
    inside = bool(((begins >= 0) & (begins < len(block))).all()) and block.endswith(b"\0")
    try:
        read = read_addresses(
            memory, tables, AddressMode(facts["mode"]), int(facts["addresses"]), None if base is None else int(base),
            int(facts["word"]), virtual_base,
        )  # fmt: skip
    except FaultError:
        read = None
    if read is None or read.damaged or not inside or len(begins) != count:
        raise BadDataError(tables.count_address, detail="kept names do not fit the addresses of kallsyms")
    return Kallsyms(tables, block, begins, read)
