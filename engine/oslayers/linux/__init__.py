"""Linux from its own memory, with nothing known beforehand. One room for each part of the kernel.

`finding`: kernel, paging mode, DTB, image · `ram`, `resources`: where RAM lies · `profile`: types and symbols ·
`objects`, `walks`: fields and containers · `tasks`: processes and threads · `process`, `layer`: what the engine sees.
"""

from engine.oslayers.linux.layer import LinuxLayer

__all__ = ["LinuxLayer"]
