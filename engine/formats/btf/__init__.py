"""BTF: the types of a kernel as the kernel itself carries them (Linux: Documentation/bpf/btf.rst).

    btf = Btf(data)                      the types of a blob; Btf(data, base=btf) for a module's split BTF
    btf.struct("task_struct")["comm"]    layouts, see engine.layout
    btf.check()                          whether every type, member and name of it is sound
    find_btf(memory)                     where blobs may lie in a kernel's image
    load_btf(memory)                     the soundest of them

All kinds up to ENUM64, both byte orders. A blob is indexed by columns: 126,000 types in 15 ms. Nothing in it is
believed: what the index needs is checked at once, all else when it is used, or beforehand by `check`.
"""

from engine.formats.btf.finding import Candidate, find_btf, load_btf
from engine.formats.btf.records import Header, Kind, parse_header
from engine.formats.btf.types import Btf, Variable

__all__ = ["Btf", "Candidate", "Header", "Kind", "Variable", "find_btf", "load_btf", "parse_header"]
