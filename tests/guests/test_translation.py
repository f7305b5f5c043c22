"""Translation of real guests' page tables: what QEMU, the guests' own kernels and the bytes in their memory say.

The roots come from the recorded registers alone. QEMU's `gva2gpa` is asked for 2,000 to 3,000 addresses of each guest,
its `info tlb` and `info mem` tell whole trees, and pagemap(5) tells every resident page of a process.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import pytest
from guests.recording import Recording
from guests.truth import SECRET_SIZE, secret_text
from support import applies

from engine.errors import FaultError
from engine.file_memory import FileMemory
from engine.memory import Memory
from engine.memory_map import MappedMemory, MapRange, MemoryMap
from engine.translate.bulk import Blocks, WalkReport, blocks, translate
from engine.translate.linux_rows import linux_mode
from engine.translate.mmu import Root, Translation, Walker
from engine.translate.modes import roots_of
from engine.types import PageFlags, Rights

Column = npt.NDArray[np.uint64]
MODES = {
    "x86, 2 levels": ["x86"],
    "x86, PAE": ["x86-pae"],
    "x86-64, 4 levels": ["x86-64"],
    "x86-64, 5 levels": ["x86-64-la57"],
    "AArch64, 4K, 48 bits": ["aarch64-4k-48-tbi", "aarch64-4k-48-high-tbi"],
    "AArch64, 16K, 52 bits": ["aarch64-16k-52-tbi", "aarch64-16k-52-high-tbi"],
    "ARM, short descriptors": ["arm-short"],
    "ARM, LPAE": ["arm-lpae-0-2", "arm-lpae-0-2-high"],
    "RISC-V, Sv39": ["riscv-sv39"],
    "RISC-V, Sv48": ["riscv-sv48"],
    "RISC-V, Sv57": ["riscv-sv57"],
}
NO_FRAMES = ("[vvar]", "[vvar_vclock]", "[vdso]", "[vectors]", "[vsyscall]", "[sigpage]")
"""Of these pagemap tells nothing."""
UNREADABLE = ("no-access", "no-access-among-many", "hugetlb-no-access")


@dataclass
class Space:
    """The address space in which a guest was stopped."""

    recording: Recording

    @cached_property
    def memory(self) -> Memory:
        ranges = [MapRange(start, length, offset) for start, length, offset in self.recording.extents]
        return MappedMemory(FileMemory(str(self.recording.image), immutable=True), MemoryMap(ranges))

    @cached_property
    def roots(self) -> tuple[Root, ...]:
        return roots_of(self.recording.guest.architecture, self.recording.registers)

    @cached_property
    def linux_roots(self) -> tuple[Root, ...]:
        """With the rows that Linux adds."""
        first, second = re.findall(r"\d+", self.recording.truth.vmcoreinfo["OSRELEASE"])[:2]
        return tuple((linux_mode(spec, (int(first), int(second))), dtb) for spec, dtb in self.roots)

    def walk(self, address: int, *, linux: bool = False) -> Translation | None:
        for spec, dtb in self.linux_roots if linux else self.roots:
            if spec.canonical(address) is not None:
                try:
                    return Walker(self.memory, spec, dtb).walk(address)
                except FaultError:
                    return None
        return None

    def chunks(self, *, linux: bool = False) -> Iterator[Blocks]:
        for root in self.linux_roots if linux else self.roots:
            report = WalkReport()
            yield from blocks(self.memory, root, report=report)
            assert not report.unreadable
            assert not report.repeated or self.has_clones

    @cached_property
    def has_clones(self) -> bool:
        """Whether the kernel names tables again and again on purpose (arch/x86/kernel/espfix_64.c)."""
        return b" init_espfix_bsp\n" in self.recording.truth["/proc/kallsyms"]

    def is_clone(self, address: int) -> bool:
        """Whether an address lies where such a kernel's tables are listed once, and counted as repeated after that."""
        return self.has_clones and ESPFIX <= address < ESPFIX + (1 << 39)

    @cached_property
    def leaves(self) -> list[tuple[int, int, int, Rights, PageFlags]]:
        """(address, size, physical address, rights, flags) of all leaf entries, ascending."""
        found = []
        for chunk in self.chunks():
            rows = np.flatnonzero(chunk.kinds == 0)
            columns = (chunk.starts, chunk.sizes, chunk.physical, chunk.rights, chunk.flags)
            found += [(va, size, pa, Rights(rights), PageFlags(flags)) for va, size, pa, rights, flags
                      in zip(*(column[rows].tolist() for column in columns), strict=True)
                      if not self.is_clone(va)]  # fmt: skip
        return sorted(found)


ESPFIX = (1 << 64) - (2 << 39)
"""ESPFIX_BASE_ADDR (arch/x86/include/asm/pgtable_64_types.h): stacks of 16-bit code, 512 GiB of them."""


@pytest.fixture(scope="session")
def space(recording: Recording) -> Space:
    return Space(recording)


def answers(space: Space) -> list[tuple[int, int | None]]:
    found = space.recording.translations
    assert len(found) >= 1000
    return found


def resident(space: Space) -> tuple[Column, Column]:
    """Addresses and physical addresses of all resident pages of the keeper, by its pagemap."""
    truth, page = space.recording.truth, space.recording.truth.page_size
    rows = [
        (start + number * page, (frame + number) * page)
        for start, count, frame, flags in truth.pagemap(truth.keeper)
        if flags & truth.PRESENT
        for number in range(count)
    ]
    table = np.array(rows, np.uint64)
    return np.ascontiguousarray(table[:, 0]), np.ascontiguousarray(table[:, 1])


def test_the_registers_give_the_mode_that_the_guest_was_made_for(space: Space) -> None:
    assert [spec.name for spec, _ in space.roots] == MODES[space.recording.guest.paging]


def test_a_walk_finds_what_qemu_finds(space: Space) -> None:
    found = {va: space.walk(va) for va, _ in answers(space)}
    wrong = {hex(va): (pa, found[va]) for va, pa in answers(space) if pa != (found[va].physical if found[va] else None)}
    assert wrong == {}


def test_a_batch_finds_what_qemu_finds(space: Space) -> None:
    pairs = answers(space)
    found = translate(space.memory, space.roots, np.array([va for va, _ in pairs], np.uint64))
    got = [None if kind else pa for pa, kind in zip(found.physical.tolist(), found.kinds.tolist(), strict=True)]
    assert got == [pa for _, pa in pairs]


def test_a_listing_finds_what_qemu_finds(space: Space) -> None:
    starts = [leaf[0] for leaf in space.leaves]
    where = np.searchsorted(np.array(starts, np.uint64), np.array([va for va, _ in answers(space)], np.uint64), "right")
    wrong = []
    for (va, pa), row in zip(answers(space), where.tolist(), strict=True):
        start, size, physical, _, _ = space.leaves[row - 1] if row else (0, 0, 0, 0, 0)
        if pa != (physical + va - start if va < start + size else None) and not space.is_clone(va):
            wrong.append(hex(va))
    assert wrong == []


def test_user_mode_reads_what_qemu_lets_it_read(space: Space) -> None:
    pairs = space.recording.translations_as_user
    applies(pairs, "x86 translations of QEMU's monitor look at no rights: none was recorded")
    for va, pa in pairs:
        found = space.walk(va)
        readable = found and Rights.USER | Rights.READ in found.rights
        assert (found.physical if found and readable else None) == pa, hex(va)


def test_the_guests_kernel_says_the_same_of_every_resident_page(space: Space) -> None:
    addresses, frames = resident(space)
    assert len(addresses) > 100
    found = translate(space.memory, space.linux_roots, addresses)
    wrong = np.flatnonzero((found.kinds != 0) | (found.physical != frames))
    if space.recording.guest.paging == "ARM, short descriptors":  # a PROT_NONE page is 0 in the hardware's tables
        hidden = [(start, stop) for start, stop, rights, _ in space.recording.truth.maps(space.recording.truth.keeper)
                  if rights.startswith("---")]  # fmt: skip
        wrong = np.array([row for row in wrong if not any(a <= int(addresses[row]) < b for a, b in hidden)], np.intp)
    assert [hex(address) for address in addresses[wrong].tolist()] == []


def test_no_page_is_found_in_a_process_that_its_kernel_does_not_tell(space: Space) -> None:
    truth, page = space.recording.truth, space.recording.truth.page_size
    told = set(resident(space)[0].tolist())
    maps = [(start, stop) for start, stop, _, path in truth.maps(truth.keeper) if path not in NO_FRAMES]
    extra = [
        hex(at)
        for start, size, _, _, _ in space.leaves
        for at in range(start, start + size, page)
        if at not in told and any(first <= at < stop for first, stop in maps)
    ]
    assert extra == []


@pytest.mark.parametrize("name", UNREADABLE)
def test_a_page_that_nobody_may_read_is_found_read_and_flagged(space: Space, name: str) -> None:
    truth = space.recording.truth
    applies(name in truth.secrets, "this guest's kernel was built without transparent huge pages")
    va = truth.secrets[name]
    assert space.walk(va) is None
    found = space.walk(va, linux=True)
    if space.recording.guest.paging == "ARM, short descriptors":
        assert found is None
        return
    assert found is not None
    assert PageFlags.INACCESSIBLE in found.flags
    assert found.rights == Rights.NONE
    assert space.memory.read(found.physical, SECRET_SIZE) == secret_text(name)
    assert truth.read_back[name] in (b"", secret_text(name))  # /proc/PID/mem of 7.2 forces nothing


def test_the_secrets_are_read_where_they_are(space: Space) -> None:
    for name, va in space.recording.truth.secrets.items():
        if name not in UNREADABLE:
            pieces = [space.walk(va + offset) for offset in range(SECRET_SIZE)]
            data = b"".join(space.memory.read(found.physical, 1) for found in pieces if found)
            assert data == secret_text(name), name


# -- whole trees, told by QEMU's monitor ---------------------------------------------------------------------------


def monitor(space: Space, name: str) -> list[str]:
    told = name in space.recording.monitor
    applies(told, f"QEMU has no `info {name}` for this processor, or it takes minutes (5 levels): none was recorded")
    return space.recording.monitor[name].decode().splitlines()


def test_all_leaves_are_those_of_info_tlb(space: Space) -> None:
    """`ADDRESS: PHYSICAL XGPDACTUW`; with PAE QEMU 7.2 prints bit 63, no-execute, as part of the address."""
    told = []
    for line in monitor(space, "tlb"):
        va, pa, flags = re.fullmatch(r"([0-9a-f]{16}): ([0-9a-f]{16}) (\S{9})", line).groups()
        if not space.is_clone(int(va, 16)):
            told.append((int(va, 16), int(pa, 16) & ~(1 << 63), flags[1] + flags[3] + flags[4]))
    marks = {"G": PageFlags.GLOBAL, "D": PageFlags.DIRTY, "A": PageFlags.ACCESSED}
    found = [(va, pa, "".join(mark if flag in flags else "-" for mark, flag in marks.items()))
             for va, _, pa, _, flags in space.leaves]  # fmt: skip
    assert found == sorted(told)


def test_rights_are_those_of_info_mem(space: Space) -> None:
    """x86: `START-STOP SIZE urw`, rights of all levels together; RISC-V: `ADDRESS PHYSICAL SIZE rwxugad` of leaves.

    Of RISC-V QEMU begins a new line with every table (target/riscv/monitor.c), so its lines are joined too.
    """
    lines = monitor(space, "mem")
    told: list[Row]
    found: list[Row]
    if space.recording.guest.architecture == "riscv64":
        told = [(int(va, 16), int(size, 16), int(pa, 16), marks)
                for va, pa, size, marks in (line.split() for line in lines[2:])]  # fmt: skip
        found = [(va, size, pa, riscv_marks(rights, flags)) for va, size, pa, rights, flags in space.leaves]
    else:
        ranges = [re.fullmatch(r"([0-9a-f]+)-([0-9a-f]+) ([0-9a-f]+) (\S{3})", line).groups() for line in lines]
        told = [(int(start, 16), int(size, 16), None, marks) for start, _, size, marks in ranges
                if not space.is_clone(int(start, 16))]  # fmt: skip
        found = [(va, size, None, x86_marks(rights)) for va, size, _, rights, _ in space.leaves]
    assert joined(found) == joined(told)


Row = tuple[int, int, int | None, str]
"""(address, size, physical address if it matters, marks)"""


def x86_marks(rights: Rights) -> str:
    return ("u" if Rights.USER in rights else "-") + "r" + ("w" if Rights.WRITE in rights else "-")


def riscv_marks(rights: Rights, flags: PageFlags) -> str:
    execute = bool((Rights.EXECUTE | Rights.USER_EXECUTE) & rights)
    given = (Rights.READ in rights, Rights.WRITE in rights, execute, Rights.USER in rights,
             PageFlags.GLOBAL in flags, PageFlags.ACCESSED in flags, PageFlags.DIRTY in flags)  # fmt: skip
    return "".join(letter if there else "-" for there, letter in zip(given, "rwxugad", strict=True))


def joined(rows: list[Row]) -> list[Row]:
    """Rows with equal marks that touch made one, where frames matter only if these touch as well."""
    found: list[Row] = []
    for va, size, pa, marks in rows:
        start, length, frame, last = found[-1] if found else (0, 0, None, "")
        if found and va == start + length and marks == last and (pa is None or frame is None or pa == frame + length):
            found[-1] = (start, length + size, frame, marks)
        else:
            found.append((va, size, pa, marks))
    return found
