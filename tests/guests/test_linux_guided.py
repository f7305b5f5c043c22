"""What registers tell narrows the search for a kernel, and never changes what is found."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

import pytest
from guests.recording import Recording

from engine.file_memory import FileMemory
from engine.formats.vmcoreinfo import find_vmcoreinfo
from engine.memory import Memory
from engine.memory_map import MappedMemory, MapRange, MemoryMap
from engine.middleware import MeteredMemory
from engine.oslayer import Base
from engine.oslayers.linux import LinuxLayer
from engine.oslayers.linux.finding import Found, described
from engine.oslayers.linux.guided import guided_kernels, guided_texts
from engine.oslayers.linux.searching import find_kernel, runs
from engine.overlay import OverlayMemory
from engine.types import TargetHints

PART = 16
"""Of what a whole search reads no more than one in so many bytes is needed where registers tell."""
TRIES = 8
REGISTERS = ("cr3", "ttbr1_el1", "ttbr0", "ttbr1", "satp")
"""Those that say where page tables lie."""


def memory_of(recording: Recording) -> MappedMemory:
    """Physical memory as the guest has it."""
    ranges = [MapRange(start, length, offset) for start, length, offset in recording.extents]
    return MappedMemory(FileMemory(str(recording.image), immutable=True), MemoryMap(ranges))


def registers_of(recording: Recording) -> list[Mapping[str, int]]:
    return [{name.lower(): value for name, value in recording.registers.items()}]


def by_searching(recording: Recording, memory: Memory) -> Found:
    found = find_kernel(memory, find_vmcoreinfo(memory), keep=True)
    assert isinstance(found, Found)
    return found


def facts(found: Found) -> tuple[object, ...]:
    """What makes a kernel, but the places where its text lies."""
    names = found.candidate.machine, found.candidate.spec.name
    return *names, found.candidate.dtb, found.image, found.memory.roots, found.vmcoreinfo.raw, found.unaided


def guided(recording: Recording, memory: Memory, registers: Sequence[Mapping[str, int]]) -> Found | None:
    texts = guided_texts(memory, recording.guest.architecture, registers)
    return next((found for found in described(memory, texts, keep=True) if runs(found, registers)), None)


def test_registers_lead_to_the_kernel_that_a_whole_search_finds(recording):
    memory = memory_of(recording)
    found = guided(recording, memory, registers_of(recording))
    assert found is not None
    assert facts(found) == facts(by_searching(recording, memory))


def test_with_registers_a_sixteenth_of_memory_is_enough(recording):
    memory = MeteredMemory(memory_of(recording))
    assert guided(recording, memory, registers_of(recording)) is not None
    assert 0 < memory.figures()["bytes_read"] < memory_of(recording).memory_map.real_size // PART


def test_a_kernel_without_vmcoreinfo_is_the_one_that_a_whole_search_finds(recording):
    memory = OverlayMemory(memory_of(recording))
    for text in find_vmcoreinfo(memory):
        for place in (*text.pages, *text.notes):
            memory.write(place, bytes(4096))
    registers = registers_of(recording)
    near = guided_kernels(memory, recording.guest.architecture, registers, keep=True)
    found = next((found for found in near if runs(found, registers)), None)
    assert found is not None
    assert found.unaided
    assert facts(found) == facts(by_searching(recording, memory))


def test_registers_that_lie_lead_to_the_kernel_that_a_whole_search_finds(recording):
    memory, chance = memory_of(recording), random.Random(7)
    wanted = facts(by_searching(recording, memory))
    top = max(base + length for base, length, _ in recording.extents)
    for number in range(TRIES):
        lies = registers_of(recording)[0] | {
            name: value & ~0xFFFF_FFFF_FFFF | chance.randrange(top) & ~0xFFF | value & 0xFFF
            for name, value in registers_of(recording)[0].items()
            if name in REGISTERS
        }
        registers = [lies] if number % 2 else [lies, *registers_of(recording)]
        texts = (*guided_texts(memory, recording.guest.architecture, registers), *find_vmcoreinfo(memory))
        found = find_kernel(memory, texts, keep=True, registers=registers, architecture=recording.guest.architecture)
        assert isinstance(found, Found)
        assert facts(found) == wanted


@pytest.mark.parametrize(
    "registers",
    [({},), ({"cr3": -1},), ({"cr3": (1 << 64) - 1, "cr4": (1 << 64) - 1, "efer": 0x500},), ({"CR3": 0},) * 100],
    ids=["none", "negative", "all ones", "many"],
)
def test_registers_that_say_nothing_cost_nothing_but_the_search(guest, registers):
    recording = guest("amd64-6.1-4level")
    hints = TargetHints(architecture="x86-64", registers=registers)
    layer = LinuxLayer.open(Base(memory_of(recording), hints), {})
    assert layer.info.version == recording.truth.text("/proc/sys/kernel/osrelease").strip()


@pytest.mark.parametrize("architecture", [None, "", "powerpc:common64", "aarch64", "riscv:rv64", "i386"])
def test_a_wrong_architecture_leads_to_the_same_processes(guest, architecture):
    recording = guest("amd64-6.1-4level")
    hints = TargetHints(architecture=architecture, registers=tuple(registers_of(recording)))
    layer = LinuxLayer.open(Base(memory_of(recording), hints), {})
    assert layer.pids() == LinuxLayer.open(Base(memory_of(recording)), {}).pids()


def test_the_processes_are_the_same_with_registers_and_without(recording):
    hints = TargetHints(architecture=recording.guest.architecture, registers=tuple(registers_of(recording)))
    memory = memory_of(recording)
    with_hints, without = (LinuxLayer.open(Base(memory, each), {}) for each in (hints, TargetHints()))
    assert [process.info for process in with_hints.processes()] == [process.info for process in without.processes()]
