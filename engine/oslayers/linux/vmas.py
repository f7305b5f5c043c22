"""The mapped ranges of a process, as /proc/PID/maps prints them: from its VMAs.

Sources: Linux fs/proc/task_mmu.c (show_map_vma, get_vma_name), include/linux/mm.h (flags), mm/mmap.c (special
mappings), arch/x86/entry/vsyscall; releases 5.10 to 7.x.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from engine.errors import FaultError, NotFoundError
from engine.layout import Field
from engine.oslayers.linux.kernel import Kernel
from engine.oslayers.linux.objects import Objects
from engine.oslayers.linux.paths import Paths
from engine.oslayers.linux.walks import EVERYWHERE, chain, maple_tree
from engine.types import Region, Rights

VMA_LIMIT = 1 << 18
"""Four times what vm.max_map_count allows by default."""
_READ, _WRITE, _EXECUTE, _MAY_SHARE = 1, 2, 4, 0x80
_SPECIAL = re.compile(r"\[[A-Za-z0-9_:.-]{1,64}\]")
ANON_NAME_LIMIT = 80
"""ANON_VMA_NAME_MAX_LEN of include/linux/mm.h."""


def vma_addresses(objects: Objects, mm: int, within: tuple[int, int] = EVERYWHERE) -> list[int]:
    """The `struct vm_area_struct`s of an mm, ascending: from its maple tree (6.1 on), or its list.

    Of others than those that hold an address from `within[0]` to `within[1]` some may be missing.
    """
    layout = objects.struct("mm_struct")
    tree = layout.get("mm_mt")
    if tree is not None:
        return list(maple_tree(objects, mm + tree.offset, VMA_LIMIT, within))
    following = objects.struct("vm_area_struct")["vm_next"]
    try:
        first = objects.pointer(mm + layout["mmap"].offset)
    except FaultError:
        objects.skipped["VMA list"] += 1
        return []
    return list(chain(objects, first, following, VMA_LIMIT, kind="VMA list"))


def regions_of(kernel: Kernel, mm: int) -> Iterator[Region]:
    """The mapped ranges of the mm at `mm`, ascending; those that cannot be read are counted and left out.

    Raises NotFoundError where the kernel's types lack what this needs.
    """
    objects = kernel.objects()
    found = vma_addresses(objects, mm)
    if not found:
        return
    reader = _Vmas(kernel, objects, mm)
    last = -1
    for region in reader.read(found):
        if region.start < last or region.size <= 0:
            objects.skipped["VMA"] += 1
            continue
        last = region.stop
        yield region
    gate = reader.gate()
    if gate is not None:
        yield gate


class _Vmas:
    """Reads the VMAs of one mm in one operation."""

    def __init__(self, kernel: Kernel, objects: Objects, mm: int) -> None:
        self.kernel = kernel
        self.objects = objects
        self.mm = mm
        self.page_bits = kernel.found.candidate.user.page_bits
        self.vma, self.layout = objects.struct("vm_area_struct"), objects.struct("mm_struct")
        self.paths = Paths(objects)
        self._files: dict[int, tuple[tuple[int, int], int, str]] = {}

    def _of_mm(self, *names: str) -> int:
        member = self.layout.get(*names)
        try:
            return 0 if member is None else self.objects.value(self.mm, member)
        except FaultError:
            return 0

    def read(self, addresses: list[int]) -> Iterator[Region]:
        """A region for each VMA."""
        objects, vma = self.objects, self.vma
        column = objects.addresses(addresses)
        members = [vma["vm_start"], vma["vm_end"], vma.first("vm_flags", "__vm_flags"), vma["vm_pgoff"], vma["vm_file"]]
        members += [vma["vm_private_data"], vma["vm_ops"]]
        columns, good = [], None
        for member in members:
            values, readable = objects.column(column, member)
            columns.append(values.tolist())
            good = readable if good is None else good & readable
        brk, heap, stack = self._of_mm("brk"), self._of_mm("start_brk"), self._of_mm("start_stack")
        vdso = self._of_mm("context.vdso")
        anonymous = vma.get("anon_name")
        for row, (start, stop, flags, offset, file, private, operations) in enumerate(zip(*columns, strict=True)):
            assert good is not None  # there are members
            if not good[row] or stop <= start or (start | stop) & (1 << self.page_bits) - 1:
                objects.skipped["VMA"] += 1
                continue
            device, number, path = self._file(file) if file else ((0, 0), 0, "")
            if not file:
                offset = 0
                if operations and private:
                    path = self._special(private)
                if not path and vdso and start == vdso:
                    path = "[vdso]"
                elif not path and start < brk and stop > heap:
                    path = "[heap]"
                elif not path and start <= stack <= stop:
                    path = "[stack]"
                elif not path and anonymous is not None:
                    path = self._anonymous_name(addresses[row], anonymous)
            yield Region(
                start, stop - start, _rights(flags), bool(flags & _MAY_SHARE),
                offset << self.page_bits, device, number, path,
            )  # fmt: skip

    def _file(self, file: int) -> tuple[tuple[int, int], int, str]:
        known = self._files.get(file)
        if known is None:
            try:
                device, number = self.paths.device_and_number(self.paths.inode(file))
                known = device, number, self.paths.of_file(file) or ""
            except FaultError:
                self.objects.skipped["file of a VMA"] += 1
                known = (0, 0), 0, ""
            self._files[file] = known
        return known

    def _special(self, private: int) -> str:
        """The name of a special mapping, as its `struct vm_special_mapping` has it: [vdso], [vvar], [uprobes]."""
        layout = self.objects.types.struct("vm_special_mapping")
        if layout is None or not self.objects.is_pointer(private):
            return ""
        try:
            text = self.objects.text(self.objects.pointer(private + layout["name"].offset), 80)
        except FaultError:
            return ""
        return text if _SPECIAL.fullmatch(text) else ""

    def _anonymous_name(self, vma: int, member: Field) -> str:
        """`[anon:NAME]`, which prctl(PR_SET_VMA_ANON_NAME) gives (5.17 on)."""
        layout = self.objects.types.struct("anon_vma_name")
        if layout is None:
            return ""
        try:
            named = self.objects.pointer(vma + member.offset)
            return f"[anon:{self.objects.text(named + layout['name'].offset, ANON_NAME_LIMIT)}]" if named else ""
        except FaultError:
            return ""

    def gate(self) -> Region | None:
        """x86's [vsyscall] page, which is no VMA of the process but a line of its maps."""
        address = self.kernel.profile.symbol("gate_vma")
        flag = self.layout.get("context.flags")
        if address is None or self.kernel.found.machine != "x86_64" or flag is None:
            return None
        try:
            if not self.objects.value(self.mm, flag) >> 1 & 1:  # MM_CONTEXT_HAS_VSYSCALL (arch/x86/include/asm/mmu.h)
                return None
            mode = self.kernel.profile.symbol("vsyscall_mode")
            if mode is not None and self.objects.memory.u32(mode) == 2:  # NONE
                return None
            start, stop = (self.objects.value(address, self.vma[name]) for name in ("vm_start", "vm_end"))
            flags = self.objects.value(address, self.vma.first("vm_flags", "__vm_flags"))
        except (FaultError, NotFoundError):
            return None
        return Region(start, stop - start, _rights(flags), path="[vsyscall]") if start < stop else None


def _rights(flags: int) -> Rights:
    return (
        (Rights.READ if flags & _READ else Rights.NONE)
        | (Rights.WRITE if flags & _WRITE else Rights.NONE)
        | (Rights.EXECUTE if flags & _EXECUTE else Rights.NONE)
    )
