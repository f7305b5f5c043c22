"""Connector `vmware`: the memory of a VMware machine that was suspended or of which a snapshot was taken.

    vmware:machine.vmem                     with machine.vmss or machine.vmsn beside it
    vmware:machine.vmss                     the same from the other side; or a state file that holds the memory itself
    vmware:memory.vmem:state=other.vmsn     a state file of another name

The state file says where in physical memory the parts of the .vmem lie, and the registers of the CPUs. A .vmem alone
is taken for memory as it is addressed, which above 3 GiB it is not: `info` warns then.

The format is known by descriptions of others alone: see `engine.formats.vmss`.
"""

from __future__ import annotations

import os
from typing import Self

from engine.errors import InvalidArgumentError, NotFoundError, NotRecognisedError, UnusableTargetError
from engine.file_memory import FRESHNESS_HELP
from engine.formats.vmss import MachineState, is_state, read_state
from engine.image_connector import ImageConnector
from engine.image_source import ImageSource, open_source
from engine.memory_map import MappedMemory, MapRange, MemoryMap
from engine.oslayer import Options, OsLayer
from engine.types import TargetHints

MEMORY_SUFFIX = ".vmem"
STATE_SUFFIXES = (".vmss", ".vmsn")
LOW_MEMORY = 3 << 30
"""VMware's machines have no memory from here to 4 GiB: what exceeds it lies above."""
ENCRYPTED = bytes.fromhex("9edd4389")
"""0x8943dd9e: the files of an encrypted machine begin so."""
_CR3_ADDRESS = 0x000F_FFFF_FFFF_F000
"""CR3 without PCID and flags (Intel SDM volume 3, 4.5.2)."""


class VmwareConnector(ImageConnector):
    """The memory of a VMware machine at rest."""

    kind = "vmware"
    summary = "the memory of a suspended VMware machine or of its snapshot: .vmem, .vmss, .vmsn"
    options_help = {"state": "the .vmss or .vmsn file, where it does not lie beside the .vmem", **FRESHNESS_HELP}
    @classmethod
    def open(cls, target: str, options: Options, *, parent: OsLayer | None, writable: bool) -> Self:
        """Open the files. Raises NotFoundError, NotRecognisedError, or OSError as open(2) does."""
        if parent is not None:
            raise InvalidArgumentError("vmware stands on files of this host, not on an OS layer: leave -c out")
        if not target:
            raise InvalidArgumentError("vmware wants a file: vmware:PATH")
        source = open_source(target, options, writable=writable)
        state, notes = None, list(source.notes)
        try:
            if is_state(_head(source)):
                state = _read(source, target)
                notes += state.notes
                if state.memory is None:
                    source.close()
                    source = _memory_beside(target, options, writable)
            elif (path := options.get("state") or _state_beside(target)) is not None:
                state = _state_of(path, required="state" in options, notes=notes)
            return cls._of(source, state, notes)
        except BaseException:
            source.close()
            raise

    @classmethod
    def _of(cls, source: ImageSource, state: MachineState | None, notes: list[str]) -> Self:
        size = source.memory.size
        if not size:
            raise UnusableTargetError(f"{source.path} is empty: there is no memory in it")
        if _head(source) == ENCRYPTED:
            raise NotRecognisedError(f"{source.path} is a file of an encrypted VMware machine, which cannot be read")
        memory_map = _map_of(source, state)
        if state is None and size > LOW_MEMORY:
            notes.append(
                f"without its .vmss or .vmsn it is not known where memory above {LOW_MEMORY >> 30} GiB lies: it is "
                "taken as it stands; put the file of the same name beside it"
            )
        short = max(one.real_base + one.length for one in memory_map.ranges) - size
        if short > 0:
            notes.append(f"the file is {short} bytes shorter than its state says; what is missing faults")
        memory = MappedMemory(source.memory, memory_map)
        return cls(source, memory, memory_map, notes, _hints(state))


def _hints(state: MachineState | None) -> TargetHints:
    """The registers that the state file has."""
    registers = () if state is None else state.registers
    cr3 = next((each["cr3"] for each in registers if "cr3" in each), None)
    return TargetHints(
        architecture=None if cr3 is None else "x86_64",
        dtb=None if cr3 is None else cr3 & _CR3_ADDRESS,
        registers=registers,
    )


def _head(source: ImageSource) -> bytes:
    return source.memory.read(0, min(4, source.memory.size))


def _read(source: ImageSource, path: str) -> MachineState:
    try:
        return read_state(source.memory)
    except NotRecognisedError as error:
        raise NotRecognisedError(f"{path} cannot be used as a state file of VMware: {error}") from None


def _state_of(path: str, *, required: bool, notes: list[str]) -> MachineState | None:
    """What a state file says; one that lies beside the memory by chance may be damaged."""
    source = open_source(path, {}, writable=False)
    try:
        state = _read(source, path)
    except NotRecognisedError as error:
        if required:
            raise
        notes.append(str(error))
        return None
    finally:
        source.close()
    notes += [f"laid out as {os.path.basename(path)} says", *state.notes]
    return state


def _memory_beside(path: str, options: Options, writable: bool) -> ImageSource:
    found = _beside(path, (MEMORY_SUFFIX,))
    if found is None:
        raise NotFoundError(f"{path} holds no memory, and there is no file of its name with {MEMORY_SUFFIX} beside it")
    return open_source(found, options, writable=writable)


def _state_beside(path: str) -> str | None:
    return _beside(path, STATE_SUFFIXES) if path.lower().endswith(MEMORY_SUFFIX) else None


def _beside(path: str, suffixes: tuple[str, ...]) -> str | None:
    """The file of the same stem with one of the suffixes."""
    stem = os.path.splitext(path)[0]
    candidates = (stem + each for suffix in suffixes for each in (suffix, suffix.upper()))
    return next((each for each in candidates if os.path.isfile(each)), None)


def _map_of(source: ImageSource, state: MachineState | None) -> MemoryMap:
    size = source.memory.size
    block = None if state is None else state.memory
    start = 0 if block is None else block.offset
    if block is not None:
        if block.compressed or block.stored != block.size:
            raise NotRecognisedError(f"{source.path} holds its memory compressed, in a way that is not known")
        size = min(block.size, max(0, size - start))
        if not size:
            raise UnusableTargetError(f"{source.path} is cut off: the memory that it should hold is missing")
    if state is None or not state.regions:
        return MemoryMap([MapRange(0, size, start)])
    try:
        return MemoryMap(MapRange(one.start, one.length, start + one.offset) for one in state.regions)
    except InvalidArgumentError as error:
        raise NotRecognisedError(f"the state of {source.path} is damaged: {error}") from None
