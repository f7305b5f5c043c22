"""Which kernel is taken of several that all prove themselves, as they do in a machine that was booted again."""

from __future__ import annotations

import pytest

from engine.bytes_memory import BytesMemory
from engine.errors import InvalidArgumentError
from engine.formats.vmcoreinfo import Vmcoreinfo, find_vmcoreinfo
from engine.oslayers.linux.finding import Found
from engine.oslayers.linux.searching import find_kernel, slides
from engine.testing import PageTableBuilder
from engine.translate.modes import mode

START = 0xFFFF_FFFF_8100_0000
SIZE = 1 << 20
LONG_MODE = {"cr0": 0x8000_0001, "cr4": 0x20, "efer": 0x500}


def kernel(slide: int, place: int) -> tuple[PageTableBuilder, bytes]:
    """(its page tables, its VMCOREINFO): 1 MiB of image at a place, mapped as KASLR has moved it."""
    builder = PageTableBuilder(mode("x86-64"), base=place + SIZE, noise=False)
    start = START + slide
    for at in range(0, SIZE + (16 << 12), 1 << 12):
        builder.map(start + at, place + at, "4K")
    top = start + builder.dtb - place
    text = (
        f"OSRELEASE=6.1.0-{slide:x}\nPAGESIZE=4096\nSYMBOL(_stext)={start:x}\nSYMBOL(swapper_pg_dir)={top:x}\n"
        f"SYMBOL(init_uts_ns)={start + 0x2000:x}\nNUMBER(phys_base)={place - slide - (16 << 20)}\n"
        f"KERNELOFFSET={slide:x}\n"
    )
    return builder, text.encode()


@pytest.fixture(scope="module")
def booted_again() -> tuple[BytesMemory, list[PageTableBuilder]]:
    """A machine in which all of the kernel before is left, its VMCOREINFO in front of the other's."""
    data, builders = bytearray(16 << 20), []
    for number, (slide, place) in enumerate([(0x20_0000, 4 << 20), (0x60_0000, 8 << 20)]):
        builder, text = kernel(slide, place)
        builders.append(builder)
        for at, part in ((0x4000 + 0x1000 * number, text), (place + 0x2000, b"Linux\0"), (builder.base, builder.data)):
            data[at : at + len(part)] = part
    return BytesMemory(bytes(data)), builders


def found(machine: tuple[BytesMemory, list[PageTableBuilder]], **given: object) -> Found:
    memory = machine[0]
    kernel = find_kernel(memory, find_vmcoreinfo(memory), keep=True, **given)
    assert isinstance(kernel, Found)
    return kernel


def test_both_prove_themselves(booted_again):
    memory, builders = booted_again
    for number, text in enumerate(find_vmcoreinfo(memory)):
        kernel = find_kernel(memory, [text], keep=True)
        assert isinstance(kernel, Found)
        assert kernel.candidate.dtb == builders[number].dtb


@pytest.mark.parametrize("number", [0, 1])
def test_the_one_is_taken_that_a_processor_is_in(booted_again, number):
    registers = [LONG_MODE | {"cr3": 0}, LONG_MODE | {"cr3": booted_again[1][number].dtb}]
    assert found(booted_again, registers=registers).candidate.dtb == booted_again[1][number].dtb


@pytest.mark.parametrize("registers", [[], [{}], [{"cr3": 1}], [LONG_MODE | {"cr3": 0x7000}]], ids=str)
def test_where_no_register_tells_it_is_the_first(booted_again, registers):
    assert found(booted_again, registers=registers).candidate.dtb == booted_again[1][0].dtb


@pytest.mark.parametrize(("slide", "number"), [(0x20_0000, 0), (0x60_0000, 1)])
def test_a_given_slide_tells_which_of_them_is_meant(booted_again, slide, number):
    assert found(booted_again, slide=slide).candidate.dtb == booted_again[1][number].dtb


@pytest.mark.parametrize("number", [0, 1])
def test_a_given_page_table_tells_it_too(booted_again, number):
    assert found(booted_again, dtb=booted_again[1][number].dtb).candidate.dtb == booted_again[1][number].dtb


def test_a_slide_that_fits_none_is_answered_with_those_that_there_are(booted_again):
    with pytest.raises(InvalidArgumentError, match=r"kaslr=0x40000 fits no kernel here: .*0x200000; .*0x600000"):
        found(booted_again, slide=0x40000)


def test_texts_are_looked_for_only_until_one_proves_itself(booted_again):
    memory, asked = booted_again[0], []

    def texts():
        for text in find_vmcoreinfo(memory):
            asked.append(text)
            yield text

    find_kernel(memory, texts(), keep=True)
    assert len(asked) == 1


def test_the_slide_of_a_kernel_that_does_not_tell_it_is_that_of_its_place(booted_again):
    kernel = found(booted_again)
    lines = kernel.vmcoreinfo.raw.split(b"\n")
    silent = Vmcoreinfo.parse(b"\n".join(line for line in lines if b"KERNELOFFSET" not in line))
    assert slides(Found(kernel.candidate, silent, kernel.physical, kernel.memory, kernel.image)) == [0x20_0000]
