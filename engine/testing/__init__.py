"""Public fakes and contracts: what every leaf is measured against.

    from engine.testing import Truth, check_memory
    check_memory(make, Truth(known=[(0, b"…")], holes=[Extent(0x2000, 0x1000)]))
"""

from engine.testing.contracts import Truth, check_connector, check_memory, check_oslayer, check_writes
from engine.testing.fakes import SlowMemory

__all__ = ["SlowMemory", "Truth", "check_connector", "check_memory", "check_oslayer", "check_writes"]
