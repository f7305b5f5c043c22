"""Public fakes and contracts: what every leaf is measured against.

    from engine.testing import Truth, check_memory
    check_memory(make, Truth(known=[(0, b"…")], holes=[Extent(0x2000, 0x1000)]))

    from engine.testing import PageTableBuilder
    builder = PageTableBuilder(mode("x86-64"))                # page tables of any mode; its record is the truth
    builder.map(0x40_0000, 0x1_2000, rights=Rights.READ | Rights.USER)
"""

from engine.testing.contracts import Truth, check_connector, check_memory, check_oslayer, check_writes
from engine.testing.fakes import SlowMemory
from engine.testing.page_tables import MappedPage, PageTableBuilder

__all__ = [
    "MappedPage", "PageTableBuilder", "SlowMemory", "Truth", "check_connector", "check_memory", "check_oslayer",
    "check_writes",
]  # fmt: skip
