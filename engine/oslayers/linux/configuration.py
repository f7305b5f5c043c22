"""The configuration that a kernel was built with, where it carries it (CONFIG_IKCONFIG): as /proc/config.gz has it.

Built in, it lies in the kernel's image; as a module called `configs`, in that module's.

Sources: Linux kernel/configs.c (IKCFG_ST, IKCFG_ED around a gzip stream); releases 5.10 to 7.x.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from functools import cached_property

from engine.errors import EngineError, NotFoundError
from engine.memory import Memory
from engine.oslayer import KernelConfig
from engine.oslayers.linux.kernel import Kernel
from engine.oslayers.linux.modules import kernel_modules

START, STOP, GZIP = b"IKCFG_ST", b"IKCFG_ED", b"\x1f\x8b\x08"
PACKED_LIMIT, PLAIN_LIMIT = 4 << 20, 32 << 20
"""Bytes; a configuration with everything in it has 0.3 MB, packed 0.07 MB."""
_CHUNK = 1 << 20
MODULE = "configs"
READER = "ikconfig_read_current"
"""The function behind /proc/config.gz: where kallsyms has it the configuration is built in."""


class LinuxConfig(KernelConfig):
    """The configuration of a kernel."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel

    @property
    def is_there(self) -> bool:
        """Whether the kernel carries it."""
        return self._found is not None

    def config(self) -> bytes:
        """See `KernelConfig.config`."""
        if self._found is None:
            raise NotFoundError("this kernel carries no configuration (it was built without CONFIG_IKCONFIG)")
        return self._found

    @cached_property
    def _found(self) -> bytes | None:
        return next((found for memory in self._places() if (found := embedded(memory)) is not None), None)

    def _places(self) -> Iterator[Memory]:
        image, kallsyms, memory = self.kernel.found.image, self.kernel.profile.kallsyms, self.kernel.found.memory
        if kallsyms is None or kallsyms.first(READER) is not None:
            yield memory.window(image.start, image.size)
        try:
            for module in kernel_modules(self.kernel):
                if module.name == MODULE:
                    yield from (memory.window(part.base, part.size) for part in module.parts)
        except EngineError:
            return


def embedded(memory: Memory) -> bytes | None:
    """The configuration in the image of a kernel or of a module, unpacked; None where there is none.

    The marks may stand elsewhere too (in a program that looks for them): only what unpacks as gzip to its end counts.
    """
    for at in _marks(memory):
        data = memory.read_padded(at + len(START), min(PACKED_LIMIT, memory.size - at - len(START)))
        unpacker = zlib.decompressobj(zlib.MAX_WBITS | 16)
        try:
            found = unpacker.decompress(data, PLAIN_LIMIT)
        except zlib.error:
            continue
        if unpacker.eof and unpacker.unused_data.startswith(STOP):
            return found
    return None


def _marks(memory: Memory) -> Iterator[int]:
    """Where the first mark and a gzip stream begin."""
    mark = START + GZIP
    for start in range(0, memory.size, _CHUNK):
        data = memory.read_padded(start, min(_CHUNK + len(mark) - 1, memory.size - start))
        at = data.find(mark)
        while at >= 0:
            yield start + at
            at = data.find(mark, at + 1)
