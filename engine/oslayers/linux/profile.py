"""What a kernel says of itself: its types from BTF, its symbols from kallsyms and its export tables.

A profile is the kernel's own, read from its image: nothing is known beforehand of any build. What a kernel does not
carry is absent: `types` is None without BTF, and without KALLSYMS_ALL data symbols come from the export tables alone.
"""

from __future__ import annotations

from dataclasses import field
from typing import TYPE_CHECKING

from engine.errors import EngineError, NotFoundError
from engine.formats.btf import Btf, Candidate, load_btf
from engine.formats.kallsyms import Kallsyms, load_kallsyms
from engine.formats.ksymtab import Ksymtab, load_ksymtab
from engine.formats.symbol_table import SymbolTable
from engine.layout import TypeSource
from engine.memory import Memory
from engine.oslayers.linux.finding import Found
from engine.oslayers.linux.profile_cache import Parts, built_without_types, keep, recall
from engine.records import dataclass
from engine.types import Extent

if TYPE_CHECKING:
    from engine.oslayers.linux.given import Given


@dataclass(slots=True)
class Profile:
    """Types and symbols of one kernel, as it runs: addresses are those of this boot."""

    found: Found
    types: TypeSource | None
    kallsyms: SymbolTable | None
    """The kernel's own, else those of a file that was given."""
    exports: Ksymtab | None = None
    """What the kernel exports to modules, data too: looked for where kallsyms has text alone."""
    notes: list[str] = field(default_factory=list)
    """Sentences for a person: what is missing, and why."""
    given: SymbolTable | None = None
    """What a file tells that a person has given."""
    whole: bool = False
    """Whether all is there; else its types are still to be read."""
    _known: dict[str, int] = field(default_factory=dict)

    @property
    def word(self) -> int:
        """Bytes of a pointer."""
        return 8 if self.found.candidate.kernel_start >> 32 else 4

    def symbol(self, *names: str) -> int | None:
        """The address of the first of the names that is known: VMCOREINFO's, kallsyms', an exported one's."""
        for name in names:
            address = self._known.get(name)
            if address is None:
                address = self.found.vmcoreinfo.symbol(name)
            if address is None and self.given is not None:
                address = self.given.first(name)
            if address is None and self.kallsyms is not None:
                address = self.kallsyms.first(name)
            if address is None and self.exports is not None:
                address = self.exports.first(name)
            if address is not None:
                self._known[name] = address
                return address
        return None

    def learn(self, name: str, address: int) -> None:
        """Keep the address of a symbol that was found by its content."""
        self._known[name] = address

    def known(self, name: str) -> int | None:
        """What `learn` kept."""
        return self._known.get(name)

    def require(self, *names: str) -> int:
        """Like `symbol`. Raises NotFoundError where none of the names is known."""
        address = self.symbol(*names)
        if address is None:
            raise NotFoundError(f"the kernel's symbols do not tell where {' or '.join(names)} is")
        return address

    def name_at(self, address: int) -> str | None:
        """`name+0x10` of the symbol at or below an address of the kernel's image; None where there is none."""
        symbol = self.kallsyms.at(address) if self.kallsyms is not None else None
        if symbol is None:
            return None
        return f"{symbol.name}+{address - symbol.address:#x}" if address != symbol.address else symbol.name


def read_profile(found: Found, *, cache: bool = False, given: Given | None = None) -> Profile:
    """The profile of a kernel that was found. What is not there, or damaged, is noted.

    With `cache` it is taken from the user's cache folder where this very kernel was read before, and kept there.
    What was `given` goes before what the kernel tells; raises UnusableTargetError where it is another kernel's.
    """
    return finish_profile(begin_profile(found, cache=cache, given=given), cache=cache)


def begin_profile(found: Found, *, cache: bool = False, given: Given | None = None) -> Profile:
    """The symbols of a kernel, and its types where they were kept: `finish_profile` reads what is missing.

    See `read_profile`. In a wrong layout of RAM some of the types may lie elsewhere: whoever is not sure of it asks the
    symbols first.
    """
    image = found.memory.window(found.image.start, found.image.size)
    profile = Profile(found, None, None)
    parts = recall(found, image, profile.word) if cache else None
    if parts is not None:
        profile.kallsyms, profile.exports, profile.types = parts.symbols, parts.exports, parts.types
        profile.notes += parts.notes
        profile.whole = parts.whole
    else:
        _read_symbols(profile, image)
    if given is not None:
        from engine.oslayers.linux.given import fitted  # imported already, by whoever has read it

        given = fitted(given, found)
        profile.given, profile.types = given.symbols, given.types or profile.types
        profile.kallsyms = profile.kallsyms or given.symbols
        profile.notes += given.notes
    return profile


def finish_profile(profile: Profile, *, cache: bool = False) -> Profile:
    """The profile with its types; with `cache` it is kept."""
    if profile.whole:
        return profile
    found = profile.found
    image = found.memory.window(found.image.start, found.image.size)
    place: Candidate | None = None
    types: Btf | None = None
    try:
        types, place = _types(profile, image)
        if place.lost:
            profile.notes.append(f"{place.lost} types are lost with damaged pages: what needs them is not shown")
    except EngineError as error:
        profile.notes.append(f"no types: {error}")
    if cache and (place is None or not place.damaged):
        extent = None if place is None else Extent(place.address, place.header.size)
        symbols = profile.kallsyms if isinstance(profile.kallsyms, Kallsyms) else None
        keep(found, image, Parts(symbols, profile.exports, types, extent, profile.notes))
    profile.types, profile.whole = profile.types or types, True
    return profile


def _read_symbols(profile: Profile, image: Memory) -> None:
    found = profile.found
    try:
        profile.kallsyms = load_kallsyms(image, found.image.start, references=found.vmcoreinfo.symbols)
    except EngineError as error:
        profile.notes.append(f"no symbols: {error}")
    if profile.kallsyms is None or not profile.kallsyms.has_data:
        try:
            profile.exports = load_ksymtab(image, found.image.start, word_size=profile.word)
        except EngineError as error:
            profile.notes.append(f"no exported symbols: {error}")


def _types(profile: Profile, image: Memory) -> tuple[Btf, Candidate]:
    """BTF lies where __start_BTF says, or is searched for; `Candidate.address` is that in the image."""
    base = profile.found.image.start
    start, stop = profile.symbol("__start_BTF"), profile.symbol("__stop_BTF")
    if start is not None and stop is not None and base <= start < stop <= base + image.size:
        try:
            return load_btf(image, start - base, stop - base)
        except NotFoundError:
            pass
    if isinstance(profile.kallsyms, Kallsyms) and built_without_types(profile.kallsyms):
        raise NotFoundError("the kernel was built without BTF")
    return load_btf(image)
