"""`struct mm_struct`: where a process's arguments stand, and its top page table.

    start_code … env_end   eleven words side by side, all inside user space, each start not behind its stop; in most
                           address spaces the arguments lie above the stack's start and the environment behind them
    pgd                    page tables, different in every address space, that translate `arg_start`
    saved_auxv             behind env_end: pairs of a small type and a value, the page's size among them, up to a zero

Sources: Linux include/linux/mm_types.h, fs/exec.c, fs/binfmt_elf.c, kernel/sys.c (prctl_set_mm: a process may move
its arguments elsewhere), releases 5.10 to 7.x.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from engine.errors import FaultError, FaultKind
from engine.memory import Memory
from engine.oslayers.linux.finding import Found
from engine.oslayers.linux.shape.sample import Column, Sample, one
from engine.oslayers.linux.shape.types import Members, array, number, pointer
from engine.translate.mmu import Walker

MM_BYTES = 1280
AT_PAGESZ = 6
VECTOR_PAIRS = 64
"""More than any architecture's AT_VECTOR_SIZE, and than any type that is used (include/uapi/linux/auxvec.h)."""
PLACES = (
    "start_code", "end_code", "start_data", "end_data", "start_brk", "brk", "start_stack",
    "arg_start", "arg_end", "env_start", "env_end",
)  # fmt: skip
_NOT_BEHIND = (("start_code", "end_code"), ("start_data", "end_data"), ("start_brk", "brk"),
               ("arg_start", "arg_end"), ("env_start", "env_end"))  # fmt: skip
_IN_ORDER = ("start_stack", "arg_start", "arg_end", "env_start", "env_end")
STRINGS_LIMIT = 1 << 27
"""Bytes from the stack's start to the environment's end; exec takes a quarter of the stack's limit at the most."""


def find_space(found: Found, memory: Memory, spaces: list[int]) -> Members:
    """The members of `mm_struct`, of which these are addresses; empty where they prove nothing."""
    for lenient in (False, True):
        sample = Sample.read(memory, spaces, MM_BYTES, found.candidate.kernel_start)
        sample = sample.lenient() if lenient else sample
        if not len(sample):
            return {}
        first = _places(sample)
        if first is None:
            continue
        word = sample.word
        members: Members = {name: (first + place * word, number(word)) for place, name in enumerate(PLACES)}
        table = _tables(found, sample, members["arg_start"][0])
        if table is not None:
            members["pgd"] = table, pointer(word)
            auxiliary = members["env_end"][0] + word
            length = _vector(sample, auxiliary, 1 << found.candidate.user.page_bits)
            if length is not None:
                members["saved_auxv"] = auxiliary, array(pointer(word), length)
            return members
    return {}


def _places(sample: Sample) -> int | None:
    """The offset of `start_code`."""
    words, limit = sample.words().astype(np.uint64), np.uint64(min(sample.kernel_start, 1 << 57))
    count = words.shape[1] - len(PLACES) + 1

    def column(name: str) -> Column:
        start = PLACES.index(name)
        return words[:, start : start + count]

    claim = np.ones((len(sample), count), bool)
    for name in PLACES:
        claim &= (column(name) < limit) & (column(name) >= np.uint64(4096))
    for low, high in _NOT_BEHIND:
        claim &= column(low) <= column(high)
    claim &= column("start_code") < column("end_code")
    usual = np.ones((len(sample), count), bool)
    for low, high in pairwise(_IN_ORDER):
        usual &= column(low) <= column(high)
    usual &= column("env_end") - column("start_stack") < np.uint64(STRINGS_LIMIT)
    usual &= column("start_stack") < column("env_end")
    found = [index for index in sample.agreed(claim).tolist() if int(usual[:, index].sum()) * 2 > len(sample)]
    place = one(found)
    return None if place is None else place * sample.word


def _vector(sample: Sample, start: int, page_size: int) -> int | None:
    """Words of the longest auxiliary vector; None where these are none."""
    pairs = np.zeros((len(sample), VECTOR_PAIRS, 2), np.uint64)
    there = sample.words()[:, start // sample.word :][:, : 2 * VECTOR_PAIRS]
    pairs.reshape(len(sample), -1)[:, : there.shape[1]] = there
    kinds, values = pairs[:, :, 0], pairs[:, :, 1]
    inside = np.cumsum(kinds == 0, axis=1) == 0
    claim = ~inside[:, -1] & ((kinds < VECTOR_PAIRS) | ~inside).all(axis=1)
    claim &= (inside & (kinds == AT_PAGESZ) & (values == np.uint64(page_size))).any(axis=1)
    return 2 * int(inside.sum(axis=1)[claim].max() + 1) if sample.holds(claim) and claim.any() else None


def _tables(found: Found, sample: Sample, arguments: int) -> int | None:
    """The offset of `pgd`."""
    words = sample.words().astype(np.uint64)
    addresses = sample.column(arguments).tolist()
    level = found.candidate.user.levels[0]
    aligned = words & np.uint64((found.candidate.user.entry_size << level.bits) - 1) == 0
    good = []
    for index in sample.agreed(sample.pointers(words) & aligned).tolist():
        pointers = words[:, index].tolist()
        if len(set(pointers)) < len(pointers) - sample.slack:
            continue
        answers = [_maps(found, table, address) for table, address in zip(pointers, addresses, strict=True)]
        if sum(answer is False for answer in answers) <= sample.slack and answers.count(True) * 2 > len(answers):
            good.append(index)
    place = one(good)
    return None if place is None else place * sample.word


def _maps(found: Found, table: int, address: int) -> bool | None:
    """Whether the page tables at `table` map the address into RAM; None where its page is not in memory."""
    try:
        dtb = found.memory.virt_to_phys(table)
        physical, _ = Walker(found.physical, found.candidate.user, dtb).find(address)
        found.physical.u8(physical)
    except FaultError as error:
        return None if error.kind == FaultKind.PAGED_OUT else False
    return True
