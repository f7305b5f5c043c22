"""QEMU's processors walk the tables that PageTableBuilder made: every mode that QEMU has, without any guest.

An oracle for what no guest here uses: 64K pages, LPA2, supersections, PSE-36, Sv32, Svnapot, halves of any size.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import pytest
from guests.bare_machine import (
    PROCESSORS,
    TABLES,
    Switch,
    aarch64,
    arm,
    bare_machine,
    become_user,
    riscv,
    x86,
)
from guests.kernels import MissingError
from support import applies, require

from engine.errors import FaultError
from engine.testing import MappedPage, PageTableBuilder
from engine.translate.bulk import translate
from engine.translate.mmu import MmuSpec, Walker
from engine.translate.modes import mode
from engine.types import Rights

ALWAYS = ("x86", "aarch64-64k-52", "arm-short-1")
"""The others with --all-guests."""
MODES = (
    "x86", "x86-pae", "x86-64", "x86-64-la57", "aarch64-4k-25", "aarch64-4k-39", "aarch64-4k-48",
    "aarch64-4k-52", "aarch64-4k-48-lpa2", "aarch64-4k-48-tbi", "aarch64-4k-48-hpd", "aarch64-4k-52-high",
    "aarch64-16k-36", "aarch64-16k-47", "aarch64-16k-48-lpa2", "aarch64-16k-52", "aarch64-16k-47-high-tbi",
    "aarch64-64k-42", "aarch64-64k-48", "aarch64-64k-52", "aarch64-64k-52-high", "arm-short", "arm-short-1",
    "arm-short-2-high", "arm-short-7", "arm-lpae", "arm-lpae-0-2", "arm-lpae-0-2-high", "arm-lpae-3-0-high",
    "arm-lpae-1-1", "riscv-sv32", "riscv-sv39", "riscv-sv48", "riscv-sv57",
)  # fmt: skip
PAGES, LOOKS = 60, 250


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "name" in metafunc.fixturenames:
        chosen = MODES if metafunc.config.getoption("--all-guests") else ALWAYS
        metafunc.parametrize("name", chosen, scope="module")


def machine_of(spec: MmuSpec, everything: bool) -> tuple[str, Switch]:
    """The kind of processor, and what its registers must say for this mode: by the manuals, apart from `roots_of`.

    `everything`: the kernel may read whatever is mapped.
    """
    if spec.name in X86:
        return X86[spec.name]
    high = "-high" in spec.name
    if found := re.match(r"aarch64-(\w+)-(\d+)", spec.name):
        size, bits = found[1], int(found[2])
        granules = {"4k": 2, "16k": 1, "64k": 3} if high else {"4k": 0, "16k": 2, "64k": 1}
        half = (1 << 7, 16, 30, 38) if high else (1 << 23, 0, 14, 37)  # EPD of the other half, TxSZ, TGx, TBIx
        wide = size != "64k" and ("lpa2" in spec.name or bits > 48)
        tcr = half[0] | 64 - bits << half[1] | granules[size] << half[2] | ("tbi" in spec.name) << half[3]
        tcr |= 6 << 32 | wide << 59 | ("hpd" in spec.name) << 41 + high  # IPS: 52 bits; DS; HPDx

        def register(table: int) -> int:
            return table & (1 << 48) - 1 | table >> 48 << 2

        return "arm64", aarch64(tcr, register, high)
    if found := re.match(r"arm-short-?(\d?)", spec.name):
        split = int(found[1] or 0)
        return "armhf", arm(split | (0 if not split else 1 << 4 if high else 1 << 5), high, everything)
    if found := re.match(r"arm-lpae-?(\d?)-?(\d?)", spec.name):
        t0sz, t1sz = int(found[1] or 0), int(found[2] or 0)
        off = (1 << 7 if high else 1 << 23) if t0sz or t1sz else 0
        return "armhf", arm(1 << 31 | off | t0sz | t1sz << 16, high, everything)
    number = {"riscv-sv32": 1 << 31, "riscv-sv39": 8 << 60, "riscv-sv48": 9 << 60, "riscv-sv57": 10 << 60}[spec.name]
    return "riscv32" if spec.entry_size == 4 else "riscv64", riscv(number, everything)


X86 = {
    "x86": ("i386", x86(0x10, 0)),
    "x86-pae": ("i386", x86(0x30, 0x800)),
    "x86-64": ("amd64", x86(0x30, 0x900)),
    "x86-64-la57": ("amd64", x86(0x1030, 0x900)),
}
"""CR4.PSE, PAE, LA57; EFER.LME, NXE."""


@dataclass
class Looked:
    """One address: what was built there, and what QEMU said to the kernel's load of it and to a user's."""

    address: int
    page: MappedPage | None
    kernel: int | None
    user: int | None
    anyone: int | None
    """With all rights that a kernel can have."""

    @property
    def physical(self) -> int | None:
        return None if self.page is None else self.page.physical + (self.address & self.page.size - 1)

    def let(self, wanted: Rights, without: Rights = Rights.NONE) -> int | None:
        """Where it is for whom needs these rights, and fails where there are the others."""
        rights = self.page.rights if self.page else Rights.NONE
        return self.physical if wanted in rights and not rights & without else None


@pytest.fixture(scope="module")
def looks(name: str) -> tuple[PageTableBuilder, list[Looked]]:
    """A random tree, and QEMU's answers."""
    spec = mode(name)
    kind, _ = machine_of(spec, True)
    # QEMU faults on reserved bits of RISC-V that these rows ignore: no noise there.
    builder = PageTableBuilder(spec, base=PROCESSORS[kind].ram + TABLES, seed=7, noise=not kind.startswith("riscv"))
    builder.populate(PAGES)
    addresses = list(builder.addresses(LOOKS))
    answers: dict[str, list[int | None]] = {"user": [None] * LOOKS}
    try:
        for everything in (True, False):
            with bare_machine(kind) as machine:
                machine.put(builder.base, bytes(builder.data))
                machine_of(spec, everything)[1](machine, builder.dtb)
                answers["anyone" if everything else "kernel"] = [machine.translate(address) for address in addresses]
                if not everything and name not in X86:
                    become_user(machine, kind)
                    answers["user"] = [machine.translate(address) for address in addresses]
    except MissingError as error:
        require(False, str(error))
    pages = map(builder.find, addresses)
    columns = (answers[whose] for whose in ("kernel", "user", "anyone"))
    return builder, [Looked(*row) for row in zip(addresses, pages, *columns, strict=True)]


def test_qemu_finds_what_was_built(looks: tuple[PageTableBuilder, list[Looked]]) -> None:
    _, rows = looks
    assert sum(look.page is not None for look in rows) > LOOKS // 4
    assert [(look.address, look.anyone) for look in rows] == [(look.address, look.physical) for look in rows]


def test_a_walk_and_a_batch_find_what_qemu_finds(looks: tuple[PageTableBuilder, list[Looked]]) -> None:
    builder, rows = looks
    walker = Walker(builder.memory, builder.spec, builder.dtb)
    assert [walked(walker, look.address) for look in rows] == [look.anyone for look in rows]
    addresses = np.array([look.address for look in rows], np.uint64)
    batch = translate(builder.memory, [(builder.spec, builder.dtb)], addresses)
    found = zip(batch.physical.tolist(), batch.kinds.tolist(), strict=True)
    assert [None if kind else physical for physical, kind in found] == [look.anyone for look in rows]


def test_the_rights_say_whose_loads_qemu_lets_pass(looks: tuple[PageTableBuilder, list[Looked]], name: str) -> None:
    applies(name not in X86, "x86 translations of QEMU's monitor look at no rights")
    _, rows = looks
    of_users = Rights.USER if name.startswith("riscv") else Rights.NONE
    wrong = {
        hex(look.address): look
        for look in rows
        if look.user != look.let(Rights.READ | Rights.USER) or look.kernel != look.let(Rights.READ, of_users)
    }
    assert wrong == {}


def walked(walker: Walker, address: int) -> int | None:
    try:
        return walker.find(address)[0]
    except FaultError:
        return None
