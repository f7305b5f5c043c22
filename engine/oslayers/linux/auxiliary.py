"""The auxiliary vector: what the kernel told a program at its start.

Sources: Linux fs/proc/base.c (proc_pid_auxv), fs/binfmt_elf.c (create_elf_tables); releases 5.10 to 7.x.
"""

from __future__ import annotations

from engine.errors import FaultError, NotFoundError
from engine.oslayers.linux.objects import Objects


def auxiliary_vector(objects: Objects, mm: int | None) -> bytes:
    """What the kernel told a program at its start, as /proc/PID/auxv gives it; empty for a kernel thread.

    Pairs of words of the program, up to and with one of type 0 (AT_NULL); of a program of 32 bits too the kernel looks
    at its own words for the end (auxv_read of fs/proc/base.c). Raises NotFoundError.
    """
    if mm is None:
        raise NotFoundError("where the address space of the process is described is not known")
    if not mm:
        return b""
    member = objects.struct("mm_struct")["saved_auxv"]
    try:
        data = objects.memory.read(mm + member.offset, member.size)
    except FaultError:
        raise NotFoundError("the auxiliary vector lies in memory that cannot be read") from None
    word = objects.word
    for at in range(0, len(data) - 2 * word + 1, 2 * word):
        if not any(data[at : at + word]):
            return data[: at + 2 * word]
    return data


def is_narrow(objects: Objects, vector: bytes) -> bool:
    """Whether an auxiliary vector is one of 32-bit words on a kernel of 64 bits.

    As 64 bits its first type, which is small, has the first value beside it.
    """
    first = int.from_bytes(vector[:8], "little" if objects.types.order == "<" else "big")
    return objects.word == 8 and first >> 32 != 0
