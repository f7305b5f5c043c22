"""The kernel's symbols and its modules', as /proc/kallsyms shows them."""

from __future__ import annotations

from collections.abc import Iterator

from engine.errors import NotFoundError
from engine.oslayer import Symbols
from engine.oslayers.linux.kernel import Kernel
from engine.oslayers.linux.modules import kernel_modules
from engine.types import SymbolInfo


class LinuxSymbols(Symbols):
    """kallsyms, and the tables that the kernel keeps of its modules."""

    def __init__(self, kernel: Kernel) -> None:
        assert kernel.profile.kallsyms is not None  # asked before it is offered
        self.kernel = kernel
        self.kallsyms = kernel.profile.kallsyms

    def symbols(self) -> Iterator[SymbolInfo]:
        """See `Symbols.symbols`. Raises TargetGoneError where another kernel runs."""
        self.kernel.check()
        for symbol in self.kallsyms:
            yield SymbolInfo(symbol.name, symbol.kind, symbol.address)
        try:
            for module in kernel_modules(self.kernel):
                for name, address, kind, _ in module.symbols():
                    yield SymbolInfo(name, kind, address, module.name)
        except NotFoundError:
            self.kernel.skipped["module list"] += 1

    def find(self, name: str) -> list[int]:
        """See `Symbols.find`: of the kernel itself."""
        return self.kallsyms.find(name)

    def at(self, address: int) -> SymbolInfo | None:
        """See `Symbols.at`: of the kernel itself."""
        symbol = self.kallsyms.at(address)
        return None if symbol is None else SymbolInfo(symbol.name, symbol.kind, symbol.address)
