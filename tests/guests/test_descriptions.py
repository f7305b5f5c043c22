"""What the engine reads of a kernel's own description, in the RAM of recorded guests, is what the guest says itself."""

from __future__ import annotations

import collections
import zlib

import pytest
from guests.recording import Recording

from engine.errors import NotFoundError
from engine.file_memory import FileMemory
from engine.formats.btf import Candidate, load_btf
from engine.formats.kallsyms import Kallsyms, load_kallsyms
from engine.formats.ksymtab import load_ksymtab
from engine.formats.vmcoreinfo import Vmcoreinfo, find_vmcoreinfo
from engine.memory import Memory
from engine.memory_map import MappedMemory, MapRange, MemoryMap


def physical_memory(recording: Recording) -> Memory:
    ranges = [MapRange(start, size, offset) for start, size, offset in recording.extents]
    return MappedMemory(FileMemory(str(recording.image)), MemoryMap(ranges))


def kernel_range(recording: Recording) -> tuple[int, int]:
    """Physical addresses from the first to the last byte of the kernel, by the guest's /proc/iomem."""
    rows = [line.split(" : ")[0].split("-") for line in recording.truth.iomem.splitlines() if "Kernel" in line]
    return min(int(start, 16) for start, _ in rows), max(int(stop, 16) + 1 for _, stop in rows)


def own_symbols(recording: Recording) -> collections.Counter[tuple[str, str, int]]:
    """(name, letter, address) of /proc/kallsyms without those of modules, with how often each comes."""
    rows = (line.split() for line in recording.truth.text("/proc/kallsyms").splitlines())
    return collections.Counter((row[2], row[1], int(row[0], 16)) for row in rows if len(row) == 3)


def texts(recording: Recording) -> list[Vmcoreinfo]:
    return find_vmcoreinfo(physical_memory(recording))


def symbols(recording: Recording) -> Kallsyms:
    start, stop = kernel_range(recording)
    references = texts(recording)[0].symbols
    return load_kallsyms(physical_memory(recording), references=references, start=start, stop=stop)


def test_vmcoreinfo_is_what_the_kernel_tells(recording):
    (found,) = texts(recording)
    address, size = recording.truth.text("/sys/kernel/vmcoreinfo").split()
    assert dict(found.values) == recording.truth.vmcoreinfo
    assert found.notes == (int(address, 16),)
    assert len(found.pages) == 1
    assert len(found.raw) <= int(size, 16)
    assert found.release == recording.truth.text("/proc/sys/kernel/osrelease").strip()
    assert found.page_size == recording.truth.page_size


def test_every_symbol_is_that_of_proc_kallsyms(recording):
    found = collections.Counter((each.name, each.kind, each.address) for each in symbols(recording))
    assert found == own_symbols(recording)


def test_a_name_gives_the_addresses_that_proc_kallsyms_has(recording):
    found = symbols(recording)
    wanted = collections.defaultdict(list)
    for (name, _, address), times in own_symbols(recording).items():
        wanted[name] += [address] * times
    for name in list(wanted)[::997]:
        assert found.find(name) == sorted(wanted[name])


def loaded_types(recording: Recording) -> Candidate:
    start, stop = kernel_range(recording)
    memory = physical_memory(recording)
    btf, candidate = load_btf(memory, start, stop)
    btf.check()
    return candidate


def test_the_types_are_those_of_sys_kernel_btf(recording):
    if "btf" not in recording.truth:
        with pytest.raises(NotFoundError):
            loaded_types(recording)
        return
    told = dict(line.split() for line in recording.truth.text("btf").splitlines())
    candidate = loaded_types(recording)
    data = physical_memory(recording).read(candidate.address, candidate.header.size)
    assert (len(data), zlib.crc32(data)) == (int(told["size"]), int(told["crc32"], 16))


def virtual_base(recording: Recording, known: Kallsyms) -> int:
    """The virtual address that physical address 0 has in the kernel's image."""
    if known.word_size == 4:  # all of low memory is mapped as one
        return 0xC0000000 - recording.extents[0][0]
    code = next(line for line in recording.truth.iomem.splitlines() if "Kernel code" in line)
    text = known.first("_text", "_stext")
    assert text is not None
    return text - int(code.split("-")[0], 16)


def test_exported_symbols_lie_where_proc_kallsyms_says(recording):
    """Data among them: /proc/kallsyms lacks it without KALLSYMS_ALL, so that only the rest is compared then."""
    start, stop = kernel_range(recording)
    known = symbols(recording)
    base = virtual_base(recording, known)
    memory = physical_memory(recording)
    exports = load_ksymtab(memory, base, word_size=known.word_size, start=start, stop=stop)
    compared = [(each.address, known.find(each.name)) for each in exports if known.find(each.name)]
    assert len(compared) > 5000
    assert all(address in addresses for address, addresses in compared)
    (task,) = exports.find("init_task")
    assert memory.read(task - base, 1 << 14).count(b"swapper") == 1
