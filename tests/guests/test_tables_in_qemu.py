"""QEMU's processors walk the tables that PageTableBuilder made: every mode that QEMU has, without any guest.

An oracle for what no guest here uses: 64K pages, LPA2, supersections, PSE-36, Sv32, Svnapot, halves of any size.
"""

from __future__ import annotations

import re

import numpy as np
import pytest
from guests.bare_machine import PROCESSORS, TABLES, Switch, aarch64, arm, bare_machine, riscv, x86
from guests.kernels import MissingError
from support import require

from engine.errors import FaultError
from engine.testing import PageTableBuilder
from engine.translate.bulk import translate
from engine.translate.mmu import MmuSpec, Walker
from engine.translate.modes import mode

ALWAYS = ("x86", "aarch64-64k-52", "arm-short-1")
"""The others with --all-guests."""
MODES = (
    "x86", "x86-pae", "x86-64", "x86-64-la57", "aarch64-4k-25", "aarch64-4k-39", "aarch64-4k-48", "aarch64-4k-52",
    "aarch64-4k-48-lpa2", "aarch64-4k-48-tbi", "aarch64-4k-52-high", "aarch64-16k-36", "aarch64-16k-47",
    "aarch64-16k-48-lpa2", "aarch64-16k-52", "aarch64-16k-47-high-tbi", "aarch64-64k-42", "aarch64-64k-48",
    "aarch64-64k-52", "aarch64-64k-52-high", "arm-short", "arm-short-1", "arm-short-2-high", "arm-short-7", "arm-lpae",
    "arm-lpae-0-2", "arm-lpae-0-2-high", "arm-lpae-3-0-high", "arm-lpae-1-1", "riscv-sv32", "riscv-sv39", "riscv-sv48",
    "riscv-sv57",
)  # fmt: skip
PAGES, LOOKS = 60, 250


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "name" in metafunc.fixturenames:
        metafunc.parametrize("name", MODES if metafunc.config.getoption("--all-guests") else ALWAYS)


def machine_of(spec: MmuSpec) -> tuple[str, Switch]:
    """The kind of processor, and what its registers must say for this mode; by the manuals, apart from `roots_of`."""
    if spec.name in X86:
        return X86[spec.name]
    high = "-high" in spec.name
    if found := re.match(r"aarch64-(\w+)-(\d+)", spec.name):
        size, bits = found[1], int(found[2])
        granules = {"4k": 2, "16k": 1, "64k": 3} if high else {"4k": 0, "16k": 2, "64k": 1}
        half = (1 << 7, 16, 30, 38) if high else (1 << 23, 0, 14, 37)  # EPD of the other half, TxSZ, TGx, TBIx
        wide = size != "64k" and ("lpa2" in spec.name or bits > 48)
        tcr = half[0] | 64 - bits << half[1] | granules[size] << half[2] | ("tbi" in spec.name) << half[3]
        tcr |= 6 << 32 | wide << 59  # IPS: 52 bits; DS

        def register(table: int) -> int:
            return table & (1 << 48) - 1 | table >> 48 << 2

        return "arm64", aarch64(tcr, register, high)
    if found := re.match(r"arm-short-?(\d?)", spec.name):
        split = int(found[1] or 0)
        return "armhf", arm(split | (0 if not split else 1 << 4 if high else 1 << 5), high)
    if found := re.match(r"arm-lpae-?(\d?)-?(\d?)", spec.name):
        t0sz, t1sz = int(found[1] or 0), int(found[2] or 0)
        off = (1 << 7 if high else 1 << 23) if t0sz or t1sz else 0
        return "armhf", arm(1 << 31 | off | t0sz | t1sz << 16, high)
    number = {"riscv-sv32": 1 << 31, "riscv-sv39": 8 << 60, "riscv-sv48": 9 << 60, "riscv-sv57": 10 << 60}[spec.name]
    return "riscv32" if spec.entry_size == 4 else "riscv64", riscv(number)


X86 = {
    "x86": ("i386", x86(0x10, 0)),
    "x86-pae": ("i386", x86(0x30, 0x800)),
    "x86-64": ("amd64", x86(0x30, 0x900)),
    "x86-64-la57": ("amd64", x86(0x1030, 0x900)),
}
"""CR4.PSE, PAE, LA57; EFER.LME, NXE."""


def test_qemu_finds_what_was_built_and_so_does_a_walk(name: str) -> None:
    spec = mode(name)
    kind, switch = machine_of(spec)
    ram = PROCESSORS[kind].ram
    # QEMU faults on reserved bits of RISC-V that these rows ignore, and on what it cannot update: no noise there.
    builder = PageTableBuilder(spec, base=ram + TABLES, seed=7, noise=kind not in ("riscv32", "riscv64"))
    builder.populate(PAGES)
    walker = Walker(builder.memory, spec, builder.dtb)
    addresses = list(builder.addresses(LOOKS))
    batch = translate(builder.memory, [(spec, builder.dtb)], np.array(addresses, np.uint64))
    in_batch = [None if kind else physical
                for physical, kind in zip(batch.physical.tolist(), batch.kinds.tolist(), strict=True)]  # fmt: skip
    wrong = {}
    mapped = 0
    try:
        with bare_machine(kind) as machine:
            machine.put(builder.base, bytes(builder.data))
            switch(machine, builder.dtb)
            for address, batched in zip(addresses, in_batch, strict=True):
                page, said = builder.find(address), machine.translate(address)
                wanted = page.physical + (address & page.size - 1) if page else None
                mapped += page is not None
                if not wanted == said == walked(walker, address) == batched:
                    wrong[hex(address)] = (wanted, said, walked(walker, address), batched)
    except MissingError as error:
        require(False, str(error))
    assert wrong == {}
    assert mapped > LOOKS // 4


def walked(walker: Walker, address: int) -> int | None:
    try:
        return walker.find(address)[0]
    except FaultError:
        return None
