"""The OS layer `native`: processes and modules of the Linux host that this program runs on.

`layer` lists processes, `process` is one of them, `procfs` and `files` read its directory below /proc,
`memory` is its address space: by `transfer` (reads and writes), `columns` (many rows at a time) and
`extents`, which stand on `pagemap` (which pages are there), `mappings` and `storage` (what the others would hold),
`descriptors` (open files of one address space) and `vectors` (process_vm_readv). `modules` are images.
"""

from engine.oslayers.native.layer import NativeLayer as NativeLayer
from engine.oslayers.native.memory import NativeMemory as NativeMemory
from engine.oslayers.native.process import NativeProcess as NativeProcess
