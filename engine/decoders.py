"""Decompression by libraries that are only needed for some dumps, and loaded when one of them is opened.

    unpack = decoder("snappy", "lime")      # or PluginError: what to install
    count = unpack(packed, buffer)          # ValueError: damaged, or more than the buffer holds

The buffer bounds what comes out, whatever the packed bytes claim.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Literal

from engine.errors import PluginError

Unpack = Callable[[bytes | memoryview, bytearray | memoryview], int]
"""Unpacks into a buffer and gives how many bytes it filled. Raises ValueError."""
Packing = Literal["snappy", "raw snappy", "zstd", "lz4"]

LIBRARY = "cramjam"
INSTALL = "pip install 'cloudfs[dumps]'"
_FUNCTIONS: dict[Packing, tuple[str, str]] = {
    "snappy": ("snappy", "decompress_into"),
    "raw snappy": ("snappy", "decompress_raw_into"),
    "zstd": ("zstd", "decompress_into"),
    "lz4": ("lz4", "decompress_into"),
}
"""`snappy`, `zstd` and `lz4` are framed, checksums and all."""


def decoder(packing: Packing, plugin: str) -> Unpack:
    """What unpacks it. Raises PluginError in the name of `plugin` where the library is missing."""
    try:
        library = importlib.import_module(LIBRARY)
    except ImportError as error:
        what = packing.removeprefix("raw ")
        raise PluginError(plugin, f"data packed by {what} need the library {LIBRARY} ({error}): {INSTALL}") from error
    module, name = _FUNCTIONS[packing]
    function: Callable[[bytes | memoryview, bytearray | memoryview], int] = getattr(getattr(library, module), name)
    damaged: type[Exception] = library.DecompressionError

    def unpack(packed: bytes | memoryview, buffer: bytearray | memoryview) -> int:
        try:
            return int(function(packed, buffer))
        except damaged as error:
            raise ValueError(str(error)) from None

    return unpack
