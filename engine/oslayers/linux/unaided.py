"""Finding a Linux kernel of which no VMCOREINFO is left: by its names and banner, its symbols and its page tables.

    for found in unaided(memory, leads(memory), keep=True): …        each proves itself

1. Names and banners say that a kernel may lie here (`claims`), and of which architecture.
2. The tables of kallsyms near them say how far its virtual addresses are from the places in the image: by the symbols
   of the names and of the banner themselves, else by functions that it exports; without any symbols the page tables
   say it.
3. Whichever page leads those addresses to those places, in one of the architecture's modes and one of the layouts of
   RAM, is a top page table of this very kernel: nothing planted, and nothing left of another kernel, does.

Sources: Linux init/version.c, kernel/kallsyms.c, arch/*/mm (swapper_pg_dir lies in the kernel's image; on x86-64 it is
called init_top_pgt); releases 5.10 to 7.x.
"""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace

import numpy as np

from engine.errors import EngineError, FaultError, NotFoundError, NotRecognisedError
from engine.formats.kallsyms import AddressMode, Kallsyms, load_kallsyms
from engine.formats.ksymtab import Form, load_ksymtab
from engine.formats.vmcoreinfo import Vmcoreinfo
from engine.memory import Addresses, Memory
from engine.oslayers.linux.architectures import Candidate, family, image_region, paging_modes
from engine.oslayers.linux.claims import Lead
from engine.oslayers.linux.finding import IMAGE_HOLE, IMAGE_LIMIT, Found, image_extent, kernel_memory
from engine.oslayers.linux.ram import layouts, place_in
from engine.oslayers.linux.roots import addresses_of, aligned, entry_counts, mapping_roots, pages_of, table_like
from engine.records import dataclass
from engine.translate.mmu import Walker
from engine.types import ADDRESS_SPACE

NEAR = (32 << 20, 128 << 20)
"""How far from a banner kallsyms are looked for: at first, then."""
PAGE = 4096
TOP_TABLES = ("swapper_pg_dir", "init_top_pgt")
KNOWN_SYMBOLS = ("_stext", "_text", "init_uts_ns", "prb", "kallsyms_token_table", *TOP_TABLES)
"""What VMCOREINFO would tell, as far as kallsyms do."""
SAMPLE = 24
"""Exported functions that are compared with kallsyms."""
ROOT_LIMIT = 256
"""Tables that lead to the right place: that many processes at the most are ranked."""
LIKELY_LIMIT = 512
"""Pages like a top table that are tried where no address is known."""
BARE_LEADS = 2
"""Of so many banners with neither names nor symbols near them a kernel is looked for: for each in every mode of every
architecture, which takes seconds, and whoever likes may plant them."""
LARGE_IMAGE = 48 << 20
"""More than a kernel's image has."""
LEAST_IMAGE, LEAST_STEP = 1 << 20, 1 << 16
"""Around a place of an image so many bytes are mapped with it, in steps of so many."""


@dataclass(frozen=True, slots=True)
class Signs:
    """What is known of a kernel before its page tables are."""

    lead: Lead
    symbols: Kallsyms | None
    shift: int | None
    """How far virtual addresses of the image lie above the places in the file; None where that is not known."""
    anchors: tuple[int, ...]
    """Places that belong to the kernel's image for certain, or, where nothing is known, may do so."""
    top: int | None
    """Where its top table lies, if its symbols tell."""


def unaided(memory: Memory, claimed: Iterable[Lead], *, keep: bool, dtb: int | None = None) -> Iterator[Found]:
    """Kernels of these leads, found and proved without VMCOREINFO; through the top table `dtb`, where it is given."""
    bare = 0
    for lead in claimed:
        machines = {family(claim.machine or "") for claim in lead.names}
        if None in machines and len(machines) == 1:
            continue  # of an architecture whose page tables are not walked
        signs = read_signs(memory, lead)
        is_bare = signs.symbols is None and not lead.names
        bare += is_bare
        if is_bare and bare > BARE_LEADS:
            continue
        machine = machines.pop() if len(machines) == 1 else None
        try:
            found = _found(memory, signs, machine, dtb, keep=keep)
        except NotRecognisedError:  # cut off before the kernel's end
            continue
        if found is not None:
            yield found


# -- symbols -----------------------------------------------------------------------------------------------


def read_signs(memory: Memory, lead: Lead) -> Signs:
    """What kallsyms near a lead tell."""
    symbols = _symbols(memory, lead)
    if symbols is None:
        return Signs(lead, None, None, lead.places, None)
    tables = symbols.tables.token_table
    if symbols.mode is AddressMode.PLACE:  # places were read as addresses
        top = symbols.first(*TOP_TABLES)
        banners = {claim.address for claim in lead.banners}
        sure = tuple(banners & set(symbols.find("linux_banner")))
        return Signs(lead, symbols, None, (*sure, tables), top)
    shift, anchors = _shift(memory, lead, symbols)
    address = symbols.first(*TOP_TABLES)
    top = address - shift if shift is not None and address is not None else None
    return Signs(lead, symbols, shift, (*anchors, tables), top)


def _symbols(memory: Memory, lead: Lead) -> Kallsyms | None:
    for near in NEAR:
        start, stop = max(0, min(lead.places) - near), min(memory.size, max(lead.places) + near)
        start -= start % PAGE
        try:
            found = load_kallsyms(memory, start=start, stop=stop)
        except EngineError:
            continue
        return found
    return None


def _shift(memory: Memory, lead: Lead, symbols: Kallsyms) -> tuple[int | None, tuple[int, ...]]:
    """The distance of addresses from places, and the places that told it: most of what agrees on one."""
    votes: Counter[int] = Counter()
    places: dict[int, list[int]] = {}
    known = [("linux_banner", lead.banners, (0,)), ("init_uts_ns", lead.names, (0, 4, 8))]
    for name, claims, inside in known:
        for address in symbols.find(name):
            for claim in claims:
                for offset in inside:
                    shift = address - claim.address + offset
                    if shift % PAGE == 0:
                        votes[shift] += 1
                        places.setdefault(shift, []).append(claim.address)
    if not votes:
        return _shift_of_exports(memory, symbols)
    shift = votes.most_common(1)[0][0]
    return shift, tuple(places[shift])


def _shift_of_exports(memory: Memory, symbols: Kallsyms) -> tuple[int | None, tuple[int, ...]]:
    """The same by functions that are exported: their entries tell the place, kallsyms the address."""
    tables = symbols.tables.token_table
    try:
        exports = load_ksymtab(memory, start=max(0, tables - NEAR[0]), stop=min(memory.size, tables + NEAR[0]))
    except NotFoundError:
        return None, ()
    if exports.form is not Form.PLACE:  # pointers tell nothing as long as their base is not known
        return None, ()
    votes: Counter[int] = Counter()
    for row, export in enumerate(exports):
        addresses = symbols.find(export.name) if row % max(1, len(exports) // 512) == 0 else []
        if len(addresses) == 1 and (addresses[0] - export.address) % PAGE == 0:
            votes[addresses[0] - export.address] += 1
        if votes.total() == SAMPLE:
            break
    if not votes or votes.most_common(1)[0][1] * 2 < SAMPLE:
        return None, ()
    return votes.most_common(1)[0][0], (exports.address,)


# -- page tables -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Proof:
    """A top table that leads the image's addresses to where they lie."""

    candidate: Candidate
    physical: Memory
    shift: int
    """Of virtual addresses against physical ones."""
    anchor: int
    """Physical address of a place in the image."""


class _Stage(enum.Enum):
    """Where a top table is looked for, the likeliest places first."""

    TOLD = "where the symbols tell, or the user"
    IMAGE = "near the kernel"
    ANYWHERE = "in all of memory: a process's leads to the kernel, too"


def _found(memory: Memory, signs: Signs, machine: str | None, dtb: int | None, *, keep: bool) -> Found | None:
    likely: dict[str, Addresses] = {}
    for stage in _Stage if dtb is None else (_Stage.TOLD,):
        for physical, first in layouts(memory):
            anchors = [place for each in signs.anchors if (place := place_in(physical, memory, each)) is not None]
            if len(anchors) < len(signs.anchors):
                continue
            for guess in paging_modes(machine, signs.lead.release_number):  # those of more levels first: see there
                pages = _pages(memory, physical, signs, guess, anchors, stage, dtb, likely)
                proof = _proof(memory, physical, first, signs, guess, anchors, pages)
                if proof is not None:
                    return _described(proof, signs, memory, keep=keep)
    return None


def _proof(
    memory: Memory, physical: Memory, first: int, signs: Signs, guess: Candidate, anchors: list[int], pages: Addresses
) -> _Proof | None:
    """The best of the pages that is a top table of this mode in this layout; None where none is."""
    if not len(pages):
        return None
    found = []
    for shift in _shifts(memory, physical, first, signs, guess, anchors):
        found += [(root, shift, anchors[0]) for root in _leading(physical, guess, pages, shift, anchors)]
    if signs.shift is None and guess.wide:
        found += _without_shift(physical, guess, pages, anchors, certain=signs.symbols is not None)
    proofs = [_Proof(guess.at(root), physical, shift, anchor) for root, shift, anchor in found[:ROOT_LIMIT]]
    return max(filter(_is_image, proofs), key=_rank, default=None)


def _pages(
    memory: Memory, physical: Memory, signs: Signs, guess: Candidate, anchors: list[int], stage: _Stage,
    dtb: int | None, likely: dict[str, Addresses]
) -> Addresses:  # fmt: skip
    """Where a top table may lie; `likely` keeps, by mode, the places in the file of what is like one."""
    if stage is _Stage.TOLD:
        place = None
        if signs.top is not None and 0 <= signs.top < memory.size:
            place = place_in(physical, memory, signs.top)
        place = guess.spec.dtb(dtb) if dtb is not None else place
        return np.array([] if place is None else [place], np.uint64)
    if signs.shift is None and guess.wide:
        if stage is not _Stage.IMAGE:  # to look through all of memory for what is like a table takes too long
            return np.empty(0, np.uint64)
        if guess.spec.name not in likely:
            near = pages_of(memory, min(signs.anchors) - NEAR[0], max(signs.anchors) + NEAR[0])
            region = image_region(guess)
            likely[guess.spec.name] = table_like(memory, guess.spec, near, region, ADDRESS_SPACE - 1)[:LIKELY_LIMIT]
        places = [place_in(physical, memory, page) for page in likely[guess.spec.name].tolist()]
        return np.array([place for place in places if place is not None], np.uint64)
    if stage is _Stage.IMAGE:
        return aligned(pages_of(physical, anchors[0] - NEAR[1], anchors[0] + NEAR[1]), guess.spec)
    return aligned(pages_of(physical), guess.spec)


def _shifts(
    memory: Memory, physical: Memory, first: int, signs: Signs, guess: Candidate, anchors: list[int]
) -> list[int]:
    """The distances of virtual from physical addresses that come into question; none where all do."""
    if signs.shift is not None:
        place = place_in(physical, memory, signs.anchors[0])
        shift = signs.shift + signs.anchors[0] - (place or 0)
        fits = (anchors[0] + shift) % (1 << 64) in image_region(guess)
        return [shift] if fits else []
    if guess.wide:
        return []
    return [guess.split - (0 if guess.machine == "i686" else first)]


def _leading(physical: Memory, guess: Candidate, pages: Addresses, shift: int, anchors: list[int]) -> list[int]:
    """Those of the pages that lead all anchors to where they lie."""
    for anchor in anchors:
        if not len(pages):
            break
        pages = mapping_roots(physical, guess.spec, pages, (anchor + shift) % (1 << 64), anchor)
    found: list[int] = pages[:ROOT_LIMIT].tolist()
    return found


def _without_shift(
    physical: Memory, guess: Candidate, pages: Addresses, anchors: list[int], *, certain: bool
) -> list[tuple[int, int, int]]:
    """(top table, distance, anchor) where the page tables themselves say at which addresses the anchors are mapped."""
    region, found = image_region(guess), []
    likely = table_like(physical, guess.spec, pages, region, physical.size) if len(pages) > 1 else pages
    wanted = anchors[:1] if certain else anchors
    for root in likely.tolist():
        for address, place in addresses_of(physical, guess.spec, root, region, wanted):
            shift = address - place
            if not certain or _leading(physical, guess, np.array([root], np.uint64), shift, anchors):
                found.append((root, shift, place))
    return found


def _is_image(proof: _Proof) -> bool:
    """Whether what lies around the anchor is mapped in one run, as images are: beyond the very page, too.

    A table of another mode may lead to the right place by chance, and to wrong ones beside it.
    """
    candidate, mapped = proof.candidate, 0
    walker = Walker(proof.physical, candidate.spec, candidate.dtb, keep=True)
    try:
        bits = walker.find((proof.anchor + proof.shift) % (1 << 64))[1]
    except FaultError:
        return False
    own, reach = proof.anchor >> bits, max(2 * LEAST_IMAGE, 1 << bits)
    first = proof.anchor & -LEAST_STEP
    for place in range(first - reach, first + reach, LEAST_STEP):
        if place >> bits == own or place < 0:
            continue
        try:
            mapped += walker.find((place + proof.shift) % (1 << 64))[0] == place
        except FaultError:
            continue
    return mapped * LEAST_STEP >= LEAST_IMAGE


def _run(proof: _Proof) -> tuple[int, int]:
    """The virtual addresses around the anchor that are mapped with its distance, over holes of at most 8 MiB."""
    candidate, anchor = proof.candidate, (proof.anchor + proof.shift) % (1 << 64)
    walker = Walker(proof.physical, candidate.spec, candidate.dtb, keep=True)
    least, step = max(image_region(candidate).start, anchor - IMAGE_LIMIT), 1 << 16
    edges = []
    for direction in (-step, step):
        edge = at = anchor & -step
        while least <= at < anchor + IMAGE_LIMIT and abs(at - edge) <= IMAGE_HOLE:
            try:
                if walker.find(at)[0] == (at - proof.shift) % (1 << 64):
                    edge = at
            except FaultError:
                pass
            at += direction
        edges.append(edge)
    return edges[0], edges[1] + step


def _rank(proof: _Proof) -> tuple[bool, bool, int]:
    """A kernel's own top table lies in its image and maps itself there, has nothing in the low half, and most above."""
    candidate = proof.candidate
    walker = Walker(proof.physical, candidate.spec, candidate.dtb)
    try:
        own = walker.find((candidate.dtb + proof.shift) % (1 << 64))[0] == candidate.dtb
    except FaultError:
        own = False
    low, high = entry_counts(proof.physical, candidate.spec, candidate.dtb, candidate.kernel_start)
    return own and abs(candidate.dtb - proof.anchor) < IMAGE_LIMIT, not low, high


# -- what VMCOREINFO would have said -----------------------------------------------------------------------


def _described(proof: _Proof, signs: Signs, memory: Memory, *, keep: bool) -> Found:
    """The kernel that was found, with a text as VMCOREINFO would have it."""
    candidate = proof.candidate
    size = (1 << 64) if candidate.wide else (1 << 32)
    values = {"OSRELEASE": signs.lead.release, "PAGESIZE": str(1 << candidate.spec.page_bits)}
    known: dict[str, int] = {}
    if signs.symbols is not None:
        moved = 0
        if signs.symbols.mode is AddressMode.PLACE:
            place = place_in(proof.physical, memory, signs.anchors[0])
            moved = (place or 0) - signs.anchors[0] + proof.shift
        for name in KNOWN_SYMBOLS:
            address = signs.symbols.first(name)
            if address is not None:
                known[name] = (address + moved) % size
    top = (candidate.dtb + proof.shift) % size
    known.setdefault("swapper_pg_dir", known.pop("init_top_pgt", top))
    first = _run(proof)[0]
    if signs.symbols is None and not candidate.wide:  # all of low memory is one run: its table lies in the image
        first = max(first, min(top, proof.anchor + proof.shift) - LARGE_IMAGE)
    known.setdefault("_text", first)
    values |= {f"SYMBOL({name})": f"{address:x}" for name, address in known.items()}
    text = Vmcoreinfo.parse("".join(f"{key}={value}\n" for key, value in values.items()).encode())
    space = kernel_memory(proof.physical, candidate, text, keep=keep, distance=proof.shift)
    return replace(Found(candidate, text, proof.physical, space, image_extent(space, text)), unaided=True)


__all__ = ["Signs", "read_signs", "unaided"]


