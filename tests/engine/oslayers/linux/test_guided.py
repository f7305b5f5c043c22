"""Page tables that registers name, and that are no kernel's: looked through in bounded work, and nothing found."""

from __future__ import annotations

import numpy as np
import pytest

from engine.bytes_memory import BytesMemory
from engine.memory import Memory
from engine.middleware import MeteredMemory
from engine.oslayers.linux.guided import guided_kernels, guided_texts, kernel_spaces

SIZE = 4 << 20
TABLE = 0x1000
REGISTERS = {
    "x86_64": {"cr3": TABLE, "cr0": 1 << 31, "cr4": 0x20, "efer": 0x500},
    "i386": {"cr3": TABLE, "cr0": 1 << 31, "cr4": 0},
    "aarch64": {"ttbr0_el1": TABLE, "ttbr1_el1": TABLE, "tcr_el1": 0x8000_0000 | 16 << 16 | 16},
    "arm": {"ttbr0": 0x4000, "ttbr1": 0x4000, "ttbcr": 0},
    "riscv64": {"satp": 8 << 60 | TABLE >> 12},
}
LEADS_ON = {"x86_64": 0x63, "i386": 0x63, "aarch64": 0x3, "arm": 0x1, "riscv64": 0x1}
"""The bits of an entry that leads to another table."""


def looping(architecture: str) -> Memory:
    """Memory in which every table leads to itself, and to the one behind it, all over."""
    data = np.zeros(SIZE // 8, "<u8")
    entry = (TABLE >> 12 << 10 if architecture == "riscv64" else TABLE) | LEADS_ON[architecture]
    if architecture in ("i386", "arm"):
        entry |= entry << 32
    data[TABLE // 8 :] = entry
    return BytesMemory(data.tobytes())


def noise() -> Memory:
    return BytesMemory(np.random.default_rng(5).bytes(SIZE))


@pytest.mark.parametrize("architecture", REGISTERS)
@pytest.mark.parametrize("what", ["loops", "noise", "nothing"])
def test_tables_that_are_no_kernels_lead_to_none(architecture: str, what: str) -> None:
    made = {"loops": lambda: looping(architecture), "noise": noise, "nothing": lambda: BytesMemory(bytes(SIZE))}
    metered = MeteredMemory(made[what]())
    registers = [REGISTERS[architecture]]
    assert list(guided_texts(metered, architecture, registers)) == []
    assert list(guided_kernels(metered, architecture, registers, keep=True)) == []
    assert metered.figures()["bytes_read"] < 512 * SIZE


def test_no_more_than_sixteen_address_spaces_are_looked_into() -> None:
    registers = [REGISTERS["x86_64"] | {"cr3": 0x1000 * number} for number in range(1, 1000)]
    assert len(list(kernel_spaces(noise(), "x86_64", registers))) == 16


def test_from_user_mode_the_kernels_own_tables_are_guessed_beside() -> None:
    user = REGISTERS["x86_64"] | {"cr3": 0x5000, "cs": 0x33}
    assert [space.roots[0][1] for space in kernel_spaces(noise(), "x86_64", [user])] == [0x5000, 0x4000]
    kernel = user | {"cs": 0x10}
    assert [space.roots[0][1] for space in kernel_spaces(noise(), "x86_64", [kernel])] == [0x5000]
