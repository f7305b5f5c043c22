"""The vDSO as the kernel keeps it: what an access to a page of it would find that a process never touched.

Sources: Linux mm/mmap.c (special_mapping_fault), arch/x86/entry/vdso/vma.c (vdso_fault: `vdso_image.data`),
arch/arm64/kernel/vdso.c and arch/riscv/kernel/vdso.c (`vm_special_mapping.pages`); releases 5.10 to 7.x.
"""

from __future__ import annotations

import numpy as np

from engine.errors import EngineError, FaultError, NotFoundError
from engine.memory import Memory
from engine.memory_map import MappedMemory, MapRange, MemoryMap
from engine.oslayers.linux.kernel import Kernel
from engine.oslayers.linux.objects import Objects
from engine.oslayers.linux.page_frames import page_frames

NAMES = ("[vdso]", "[vdso32]")
SIZE_LIMIT = 1 << 20
"""Bytes; vDSOs have one to four pages of code."""


def special_pages(kernel: Kernel, objects: Objects, mm: int, private: int, size: int) -> Memory | None:
    """The pages of a special mapping of `size` bytes by its `vm_private_data`; None where it is no vDSO."""
    try:
        layout = objects.struct("vm_special_mapping")
        if not objects.is_pointer(private) or size > SIZE_LIMIT:
            return None
        if objects.text(objects.pointer(private + layout["name"].offset), 16) not in NAMES:
            return None
        pages = objects.pointer(private + layout["pages"].offset)
        return _listed(kernel, objects, pages, size) if objects.is_pointer(pages) else _image(kernel, objects, mm, size)
    except (EngineError, ValueError):
        return None


def _listed(kernel: Kernel, objects: Objects, pages: int, size: int) -> Memory:
    """Pages by an array of pointers to their structures. Raises FaultError, NotFoundError."""
    frames = page_frames(kernel)
    count = size >> frames.page_bits
    structures = np.frombuffer(objects.memory.read(pages, count * objects.word), objects.word_type).astype(np.uint64)
    physical, good = frames.physical(structures)
    if not good.all():
        raise NotFoundError("the vDSO's pages are not known")
    page = 1 << frames.page_bits
    ranges = [MapRange(number * page, page, int(at)) for number, at in enumerate(physical.tolist())]
    return MappedMemory(kernel.found.physical, MemoryMap(ranges))


def _image(kernel: Kernel, objects: Objects, mm: int, size: int) -> Memory:
    """x86: the image in the kernel's own data. Raises FaultError, NotFoundError."""
    image = objects.pointer(mm + objects.struct("mm_struct")["context.vdso_image"].offset)
    layout = objects.struct("vdso_image")
    data, length = objects.pointer(image + layout["data"].offset), objects.value(image, layout["size"])
    if not objects.is_pointer(data) or not 0 < length <= SIZE_LIMIT:
        raise FaultError(image)
    return kernel.found.memory.window(data, min(length, size))
