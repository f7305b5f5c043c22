"""Registers of threads that do not run: what the kernel saved of user mode when they entered it.

They stand in a `struct pt_regs` at the top of the thread's kernel stack. How large a stack is, and whether room is
left above, no type tells: it is found once, by the first threads' frames, which must be of user mode.

Sources: Linux arch/x86/include/asm/{processor,thread_info,ptrace}.h (TOP_OF_KERNEL_STACK_PADDING, 16 with FRED),
arch/arm64/include/asm/{processor,ptrace}.h, arch/riscv/include/asm/{processor,ptrace}.h; releases 5.10 to 7.x.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import Literal

from engine.errors import FaultError, NotFoundError
from engine.layout import StructLayout
from engine.oslayers.linux.kernel import Kernel
from engine.oslayers.linux.objects import Objects
from engine.oslayers.linux.tasks import PF_KTHREAD, Tasks

STACK_BITS = range(12, 18)
"""Log2 of the sizes that kernel stacks have: 8 KiB (32 bits) to 64 KiB (64K pages), twice that with KASAN."""
PADDINGS = (0, 16, 8)
ASKED, AGREEING = 32, 3
"""Threads that are asked for the place of their frame, and how many must agree."""
_PLACE = "top of user frames"
_X86 = {"orig_ax": "orig_rax", "ip": "rip", "flags": "eflags", "cs": "cs", "ss": "ss"}
_X86_32 = {"orig_ax": "orig_eax", "ip": "eip", "flags": "eflags", "cs": "cs", "ss": "ss"}
_X86_ORDER = "ax bx cx dx si di bp sp r8 r9 r10 r11 r12 r13 r14 r15 ip flags cs ss orig_ax".split()
USER_CS, USER_CS_32, USER_SS = 0x33, 0x23, 0x2B
"""Selectors of user mode on x86-64 (arch/x86/include/asm/segment.h)."""
_SPP = 0x100
"""riscv: sstatus.SPP, set where the trap came from the kernel."""


class Frames:
    """Reads frames of user mode in one operation."""

    def __init__(self, kernel: Kernel, tasks: Tasks) -> None:
        """Raises NotFoundError where this kernel's frames are not understood."""
        self.kernel = kernel
        self.objects: Objects = kernel.objects()
        self.tasks = tasks
        self.layout = self.objects.struct("pt_regs")
        self.machine = kernel.found.machine
        self._is_user = _CHECKS.get(self.machine)
        if self._is_user is None:
            raise NotFoundError(f"the registers that a kernel of {self.machine} saves are not understood")

    def registers(self, task: int) -> Mapping[str, int]:
        """The registers of user mode of the thread whose `struct task_struct` lies at `task`, by the names gdb uses.

        Raises NotFoundError where memory does not have them, FaultError where it cannot be read.
        """
        layout = self.tasks.task
        if self.objects.value(task, layout["flags"]) & PF_KTHREAD:
            raise NotFoundError("a thread of the kernel has no registers of user mode")
        running = layout.get("on_cpu")
        if running is not None and self.objects.value(task, running):
            raise NotFoundError("the thread was running: its registers were in a processor, not in memory")
        stack = self.objects.pointer(task + layout["stack"].offset)
        if not self.objects.is_pointer(stack):
            raise NotFoundError("the thread has ended: its kernel stack was given back")
        size, padding = self._place()
        frame = self._frame(stack, size, padding)
        if frame is None:
            raise NotFoundError("at the top of the thread's kernel stack stands no frame of user mode")
        return _NAMERS[self.machine](frame) | dict(self._kept_elsewhere(task))

    def _frame(self, stack: int, size: int, padding: int) -> dict[str, int] | None:
        """The members of the frame at the top of a stack of `size` bytes; None where that is none of user mode."""
        layout = self.layout
        room = layout.size + 15 & ~15 if self.machine == "riscv64" else layout.size  # STACK_ALIGN
        at = stack + size - padding - room
        data = self.objects.memory.read(at, layout.size)
        values = dict(_values(layout, data, self.objects))
        return values if self._is_user is not None and self._is_user(values) else None

    def _place(self) -> tuple[int, int]:
        """(size of a kernel stack, room above the frame), which all threads share."""
        kept = self.kernel.profile.known(_PLACE)
        if kept is not None:
            return kept >> 8, kept & 0xFF
        stacks = list(islice(self._stacks(), ASKED))
        counts = {
            (1 << bits, padding): self._agreeing(stacks, 1 << bits, padding)
            for bits in STACK_BITS
            for padding in (PADDINGS if self.machine == "x86_64" else PADDINGS[:1])
        }
        best = max(counts, key=lambda place: counts[place])
        if counts[best] < min(AGREEING, len(stacks)) or not counts[best]:
            raise NotFoundError("it cannot be told where this kernel saves the registers of user mode")
        self.kernel.profile.learn(_PLACE, best[0] << 8 | best[1])
        return best

    def _agreeing(self, stacks: list[int], size: int, padding: int) -> int:
        count = 0
        for stack in stacks:
            try:
                count += self._frame(stack, size, padding) is not None
            except FaultError:
                continue
        return count

    def _stacks(self) -> Iterator[int]:
        """Kernel stacks of threads that have been in user mode."""
        layout = self.tasks.task
        for task in self.tasks.addresses(self.objects):
            try:
                if self.objects.pointer(task + layout["mm"].offset):
                    yield self.objects.pointer(task + layout["stack"].offset)
            except FaultError:
                continue

    def _kept_elsewhere(self, task: int) -> Iterator[tuple[str, int]]:
        """What a thread has beside its frame: where its thread-local memory lies."""
        for name, path in _ELSEWHERE.get(self.machine, ()):
            member = self.tasks.task.get(path)
            if member is not None:
                yield name, self.objects.value(task, member) & (1 << 64) - 1


def _values(layout: StructLayout, data: bytes, objects: Objects) -> Iterator[tuple[str, int]]:
    """The members of a frame that are numbers; the elements of arm64's array of registers by their names."""
    order: Literal["little", "big"] = "little" if objects.types.order == "<" else "big"
    members = [*layout, *(layout.get(f"regs[{number}]") for number in range(31))]
    for number, member in enumerate(members, -len(layout)):
        if member is not None and member.size in (2, 4, 8) and not member.bit_size:
            name = member.name if number < 0 else f"x{number}"
            yield name, int.from_bytes(data[member.offset : member.stop], order)


# -- x86-64 ---------------------------------------------------------------------------------------------


def _is_user_x86(frame: Mapping[str, int]) -> bool:
    selectors = frame.get("cs", 0) & 0xFFFF, frame.get("ss", 0) & 0xFFFF
    return selectors in ((USER_CS, USER_SS), (USER_CS_32, USER_SS)) and frame.get("ip", 1 << 63) < 1 << 56


def _named_x86(frame: Mapping[str, int]) -> dict[str, int]:
    narrow = frame["cs"] & 0xFFFF == USER_CS_32
    names, letter, mask = (_X86_32, "e", (1 << 32) - 1) if narrow else (_X86, "r", (1 << 64) - 1)
    found = {}
    for name in _X86_ORDER:
        if name in frame and not (narrow and name[1:].isdigit()):
            plain = name if name[1:].isdigit() else letter + name
            selector = 0xFFFF if name in ("cs", "ss") else mask
            found[names.get(name, plain)] = frame[name] & selector
    return found


# -- arm64 ----------------------------------------------------------------------------------------------


def _is_user_arm64(frame: Mapping[str, int]) -> bool:
    state = frame.get("pstate", 15)
    return state & 0x1F in (0, 0x10) and state >> 32 == 0 and 0 < frame.get("pc", 0) < 1 << 56


def _named_arm64(frame: Mapping[str, int]) -> dict[str, int]:
    if frame["pstate"] & 0x10:  # AArch32: PSR_MODE32_BIT; the registers lie in x0 to x14
        found = {f"r{number}": frame[f"x{number}"] & 0xFFFF_FFFF for number in range(13)}
        found |= {"sp": frame["x13"] & 0xFFFF_FFFF, "lr": frame["x14"] & 0xFFFF_FFFF, "pc": frame["pc"] & 0xFFFF_FFFF}
        return found | {"cpsr": frame["pstate"]}
    found = {f"x{number}": frame[f"x{number}"] for number in range(31)}
    return found | {"sp": frame["sp"], "pc": frame["pc"], "cpsr": frame["pstate"], "orig_x0": frame["orig_x0"]}


# -- riscv64 --------------------------------------------------------------------------------------------


def _is_user_riscv(frame: Mapping[str, int]) -> bool:
    return not frame.get("status", _SPP) & _SPP and 0 < frame.get("epc", 0) < 1 << 56 and frame.get("sp", 0) != 0


def _named_riscv(frame: Mapping[str, int]) -> dict[str, int]:
    found = {name: value for name, value in frame.items() if name not in ("epc", "badaddr", "cause")}
    return {"pc": frame["epc"], **found}


_CHECKS: dict[str, Callable[[Mapping[str, int]], bool]] = {
    "x86_64": _is_user_x86, "aarch64": _is_user_arm64, "riscv64": _is_user_riscv,
}  # fmt: skip
_NAMERS: dict[str, Callable[[Mapping[str, int]], dict[str, int]]] = {
    "x86_64": _named_x86, "aarch64": _named_arm64, "riscv64": _named_riscv,
}  # fmt: skip
_ELSEWHERE = {
    "x86_64": (("fs_base", "thread.fsbase"), ("gs_base", "thread.gsbase")),
    "aarch64": (("tpidr", "thread.uw.tp_value"),),
}
"""Register → member of `struct task_struct` (arch/*/include/asm/processor.h)."""
