"""kallsyms: the symbols that a Linux kernel carries of itself, found and read in its image.

    symbols = load_kallsyms(memory, virtual_base, references=vmcoreinfo.symbols)
    symbols.find("init_task")        its addresses: names repeat
    symbols.at(address)              the symbol at or below

Every layout since Linux 3: both orders of the tables, lengths of one and of two bytes, markers of four and of eight;
addresses absolute, relative, per-CPU and place-relative; 32 and 64 bit, both byte orders; with data symbols or without.
"""

from engine.formats.kallsyms.addresses import AddressMode
from engine.formats.kallsyms.finding import Tables, find_tables
from engine.formats.kallsyms.kept import from_kept, kept_form
from engine.formats.kallsyms.table import Kallsyms, load_kallsyms
from engine.formats.symbol_table import Symbol

__all__ = ["AddressMode", "Kallsyms", "Symbol", "Tables", "find_tables", "from_kept", "kept_form", "load_kallsyms"]
