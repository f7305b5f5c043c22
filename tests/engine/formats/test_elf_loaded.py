"""Which images are found in an address space: made-up spaces, drawn above each case.

    head | text | data      regions of one file as a loader maps its segments
    ....                    anonymous memory
"""

from __future__ import annotations

import struct
from dataclasses import replace

import pytest
from elf_samples import MadeSymbol, compiled, load, make_elf

from engine.bytes_memory import BytesMemory
from engine.errors import AccessDeniedError, FaultError
from engine.file_memory import FileMemory
from engine.formats.elf import VDSO, ElfFile, ElfImage, loaded, loaded_images, mapped_images
from engine.memory import Memory
from engine.types import ADDRESS_SPACE, Region, Rights

BASE = 0x7F0000000000
R, RX, RW = Rights.READ, Rights.READ | Rights.EXECUTE, Rights.READ | Rights.WRITE
BIG = 'char big[20000]; int f(void) { return big[1]; } int number = 7; char *pointer = big; const char text[] = "t";'


class Space(Memory):
    """Bytes at addresses, and a count of what was asked for."""

    size = ADDRESS_SPACE

    def __init__(self, *parts: tuple[int, bytes]) -> None:
        self.parts = dict(parts)
        self.gathers = self.reads = 0

    def readinto(self, address, buffer):
        self.reads += 1
        for start, data in self.parts.items():
            if start <= address and address + len(buffer) <= start + len(data):
                buffer[:] = data[address - start : address - start + len(buffer)]
                return
        raise FaultError(address)

    def gather(self, addresses, out):
        self.gathers += 1
        faults = super().gather(addresses, out)
        self.reads -= len(addresses)
        return faults


def regions_of(elf: ElfFile, base: int, path: str = "/lib/x.so", inode: int = 7) -> list[Region]:
    """The file as a loader maps it, without the anonymous part of .bss."""
    found = []
    for segment in elf.loads:
        start, offset = segment.address & -4096, segment.offset & -4096
        stop = segment.address + segment.file_size + 4095 & -4096
        rights = (R if segment.flags & 4 else Rights.NONE) | (RX if segment.flags & 1 else R)
        rights |= Rights.WRITE if segment.flags & 2 else Rights.NONE
        found.append(
            Region(base + start - elf.link_base, stop - start, rights, False, offset, (8, 1), inode, path)
        )
    return found


@pytest.fixture(scope="module")
def elf() -> ElfFile:
    return ElfFile(FileMemory(compiled("loaded.so", "-shared", "-Wl,--build-id=sha1", "-Wl,-z,separate-code",
                                       source=BIG)))  # fmt: skip


@pytest.fixture(scope="module")
def image(elf) -> bytes:
    return bytes(load(elf, BASE))


@pytest.fixture
def mapped(elf) -> list[Region]:
    return regions_of(elf, BASE)


def file_bytes(elf: ElfFile) -> bytes:
    return elf.memory.read(0, elf.memory.size)


def test_a_loaded_library_is_one_image(elf, image, mapped):
    # | head | text | rodata | data |
    (found,) = loaded_images(Space((BASE, image)), mapped)
    assert (found.base, found.region, found.architecture) == (BASE, mapped[0], elf.header.architecture)
    assert found.stop == mapped[-1].stop


def test_its_build_id_is_read_with_its_header(elf, image, mapped):
    space = Space((BASE, image))
    (found,) = loaded_images(space, mapped)
    assert found.build_id == elf.build_id() != ""
    assert (space.gathers, space.reads) == (1, 0)


def test_the_anonymous_rest_of_bss_belongs_to_it(elf, image, mapped):
    # | head | text | rodata | data |....|
    bss = Region(mapped[-1].stop, 0x10000, RW)
    (found,) = loaded_images(Space((BASE, image)), [*mapped, bss])
    assert found.size == elf.load_size > mapped[-1].stop - BASE


def test_two_loads_of_a_file_are_two_images(elf, image, mapped):
    # | head | text | data |        | head | text | data |
    other = BASE + (1 << 30)
    space = Space((BASE, image), (other, bytes(load(elf, other))))
    found = loaded_images(space, [*mapped, *regions_of(elf, other)])
    assert [image.base for image in found] == [BASE, other]


def test_two_loads_side_by_side_are_two_images(elf, image, mapped):
    # | head | text | data | head | text | data |
    other = mapped[-1].stop
    space = Space((BASE, image[: other - BASE]), (other, image))
    found = loaded_images(space, [*mapped, *regions_of(elf, other)])
    assert [image.base for image in found] == [BASE, other]


def test_a_library_that_is_mapped_to_be_looked_at_is_none(elf):
    # | the whole file, flat |
    data = file_bytes(elf)
    flat = Region(BASE, len(data) + 4095 & -4096, R, False, 0, (8, 1), 7, "/lib/x.so")
    assert loaded_images(Space((BASE, data)), [flat]) == []


def test_a_library_that_is_mapped_flat_in_front_of_anonymous_memory_is_none(elf):
    # | the whole file, flat |........|
    data = file_bytes(elf)
    flat = Region(BASE, len(data) + 4095 & -4096, R, False, 0, (8, 1), 7, "/lib/x.so")
    assert loaded_images(Space((BASE, data)), [flat, Region(flat.stop, 1 << 20, RW)]) == []


def test_code_that_was_moved_to_huge_pages_leaves_an_image(image, mapped):
    # | head |....| rodata | data |
    anonymous = replace(mapped[1], offset=0, device=(0, 0), inode=0, path="")
    (found,) = loaded_images(Space((BASE, image)), [mapped[0], anonymous, *mapped[2:]])
    assert found.stop == mapped[-1].stop


def test_regions_split_by_mprotect_leave_one_image(image, mapped):
    # | head | text | rodata | relro | data |
    last = mapped[-1]
    first = replace(last, size=4096, rights=R)
    rest = replace(last, start=last.start + 4096, size=last.size - 4096, offset=last.offset + 4096)
    parts = [part for part in (first, rest) if part.size]
    (found,) = loaded_images(Space((BASE, image)), [*mapped[:-1], *parts])
    assert found.stop == last.stop


def test_a_shared_mapping_is_no_image(image, mapped):
    assert loaded_images(Space((BASE, image)), [replace(region, shared=True) for region in mapped]) == []


def test_anonymous_memory_with_an_elf_header_is_no_image(image, mapped):
    plain = [Region(region.start, region.size, region.rights) for region in mapped]
    assert loaded_images(Space((BASE, image)), plain) == []


def test_a_data_file_is_no_image():
    archive = Region(BASE, 0x2000, R, False, 0, (8, 1), 9, "/usr/lib/locale/locale-archive")
    assert loaded_images(Space((BASE, bytes(0x2000))), [archive]) == []


@pytest.mark.parametrize("kind", [0, 1, 4, 0xFE00])
def test_objects_and_cores_are_no_images(image, mapped, kind):
    changed = image[:16] + struct.pack("<H", kind) + image[18:]
    assert loaded_images(Space((BASE, changed)), mapped) == []


def test_the_vdso_is_an_image():
    data = bytes(load(ElfFile(BytesMemory(make_elf([MadeSymbol(b"clock_gettime", 16)])))))
    (found,) = loaded_images(Space((BASE, data)), [Region(BASE, len(data), RX, path=VDSO)])
    assert (found.base, found.size) == (BASE, len(data))


def test_an_unreadable_header_hides_no_other_image(elf, mapped):
    other = BASE + (1 << 30)
    space = Space((other, bytes(load(elf, other))))
    found = loaded_images(space, [*mapped, *regions_of(elf, other)])
    assert [image.base for image in found] == [other]


def test_an_image_whose_headers_were_overwritten_is_listed_by_its_mappings(image, mapped):
    broken = image[:54] + b"\xff" * 10 + image[64:]
    (found,) = loaded_images(Space((BASE, broken)), mapped)
    assert (found.base, found.stop, found.build_id) == (BASE, mapped[-1].stop, None)


def test_program_headers_that_were_moved_behind_the_first_region_are_found(elf, image, mapped):
    table = image[64 : 64 + 56 * len(elf.segments)]
    place = mapped[2].start - BASE + 0x800
    moved = bytearray(image)
    moved[place : place + len(table)] = table
    moved[64 : 64 + len(table)] = bytes(len(table))
    struct.pack_into("<Q", moved, 32, mapped[2].offset + 0x800)
    (found,) = loaded_images(Space((BASE, bytes(moved))), mapped)
    view = ElfImage(Space((0, bytes(moved))).window(0, found.size), BASE, segments_at=found.segments_at)
    assert list(view.exports()) == list(elf.exports())


def test_a_hundred_files_cost_one_column(elf, image):
    parts, regions = [], []
    for number in range(100):
        base = BASE + number * (1 << 24)
        parts.append((base, image))
        regions += regions_of(elf, base, f"/lib/{number}.so", number + 1)
    space = Space(*parts)
    assert len(loaded_images(space, regions)) == 100
    assert (space.gathers, space.reads) == (1, 0)


def test_a_listing_ends_at_a_stated_count_of_images(elf, image, monkeypatch):
    monkeypatch.setattr(loaded, "IMAGES_LIMIT", 3)
    bases = [BASE + number * (1 << 24) for number in range(5)]
    regions = [region for base in bases for region in regions_of(elf, base)]
    space = Space(*[(base, image) for base in bases])
    assert [found.base for found in loaded_images(space, regions)] == bases[:3]


def test_errors_that_are_no_faults_come_through(mapped):
    class Denied(Space):
        def gather(self, addresses, out):
            raise AccessDeniedError("no")

    with pytest.raises(AccessDeniedError):
        loaded_images(Denied(), mapped)


def test_without_memory_files_mapped_with_code_in_them_count_as_images(mapped):
    data = Region(BASE - 0x100000, 0x2000, R, False, 0, (8, 1), 9, "/usr/share/data")
    (found,) = mapped_images([data, *mapped])
    assert (found.base, found.stop, found.architecture) == (BASE, mapped[-1].stop, None)
