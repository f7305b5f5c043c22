"""What kernels say of themselves in plain text, hand-made: whole, cut, hostile; and architectures known by it alone."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.bytes_memory import BytesMemory
from engine.errors import NotRecognisedError
from engine.oslayer import Base, KernelLog, Symbols
from engine.oslayers.linux import LinuxLayer, unaided
from engine.oslayers.linux.claims import HIT_LIMIT, LEAD_LIMIT, claims, leads

RELEASE = "6.1.0-50-odd"


def names(machine: str, release: str = RELEASE, host: str = "(none)") -> bytes:
    fields = ("Linux", host, release, "#1 SMP Debian 6.1.176-1", machine, "(none)")
    return b"".join(field.encode().ljust(65, b"\0") for field in fields)


def banner(release: str = RELEASE, end: bytes = b"\n\0") -> bytes:
    return f"Linux version {release} (kernel@example.org) (gcc-12 (Debian 12.2.0-14)) #1 SMP Debian".encode() + end


def memory(*parts: tuple[int, bytes], size: int = 1 << 20) -> BytesMemory:
    data = bytearray(size)
    for address, part in parts:
        data[address : address + len(part)] = part
    return BytesMemory(bytes(data))


def test_names_and_banner_of_one_release_near_each_other_are_one_lead():
    (lead,) = leads(memory((0x1000, banner()), (0x9004, names("s390x"))))
    assert (lead.release, lead.machine, lead.release_number) == (RELEASE, "s390x", (6, 1))
    assert lead.places == (0x1000, 0x9004)


def test_kernels_of_two_releases_are_two_leads_the_one_with_both_first():
    found = leads(memory((0x1000, banner("5.10.0-1")), (0x4000, banner()), (0x9004, names("x86_64"))))
    assert [lead.release for lead in found] == [RELEASE, "5.10.0-1"]


@pytest.mark.parametrize(
    "part",
    [
        banner(end=b" end of a line in a log"), banner(end=b""), banner("six"), banner()[:60],
        names("x86 64"), names(""), names("x86_64", release="%s"), names("x86_64").replace(b"#1", b"one"),
        names("x86_64").replace(b"Linux\0\0", b"Linux\0x"),
    ],
)  # fmt: skip
def test_what_is_no_banner_or_no_names_is_passed_over(part):
    assert claims(memory((0x1000, part))) == []


def test_claims_cut_off_by_the_end_of_memory_are_none():
    whole = names("x86_64")
    assert claims(BytesMemory(bytes(64) + whole[:-1])) == []
    assert len(claims(BytesMemory(bytes(64) + whole))) == 1


def test_a_memory_full_of_claims_is_searched_in_bounds():
    one = banner("9.9").ljust(128, b"\0")
    full = BytesMemory(one * (HIT_LIMIT + 100))
    assert len(claims(full)) == HIT_LIMIT
    many = BytesMemory(b"".join(banner(f"9.{number}").ljust(128, b"\0") for number in range(500)))
    assert len(leads(many)) == LEAD_LIMIT


def test_of_banners_that_stand_alone_few_are_followed(monkeypatch):
    """Each costs a search for page tables in all modes; one with names, or with symbols, is always followed."""
    followed = []
    monkeypatch.setattr(unaided, "_found", lambda memory, signs, *_, **__: followed.append(signs.lead.release))
    planted = [(number << 12, banner(f"9.{number}")) for number in range(1, 9)]
    image = memory(*planted, (0xF0000, names("x86_64", "8.8")))
    assert list(unaided.unaided(image, leads(image), keep=True)) == []
    assert followed == ["9.1", "9.2", "8.8"]


@settings(deadline=None)
@given(st.binary(max_size=700), st.integers(0, 2**32))
def test_nothing_in_the_bytes_behind_a_claim_s_beginning_raises(tail, seed):
    noise = random.Random(seed).randbytes(200)
    for begin in (b"Linux\0\0\0", b"Linux version ", names("x86_64")[:300], banner()[:40]):
        claims(BytesMemory(begin + tail + noise))


@pytest.mark.parametrize("machine", ["ppc64le", "s390x", "loongarch64", "mips64", "sparc64"])
def test_a_kernel_of_an_architecture_that_is_not_walked_is_named_and_refused_in_a_sentence(machine):
    layer = LinuxLayer.open(Base(memory((0x2000, banner()), (0x6000, names(machine)))), {})
    assert (layer.info.kind, layer.info.version, layer.info.architecture) == ("linux", RELEASE, machine)
    assert (layer.info.dtb, layer.info.kernel_base, layer.kernel_memory) == (None, None, None)
    assert layer.capability(KernelLog) is layer.capability(Symbols) is None
    for ask in (layer.pids, lambda: list(layer.modules()), lambda: layer.process(1)):
        with pytest.raises(NotRecognisedError, match=f"^Linux {RELEASE} for {machine} is recognised, [^\n]*$"):
            ask()


def test_vmcoreinfo_tells_the_page_size_of_such_a_kernel():
    text = f"OSRELEASE={RELEASE}\nPAGESIZE=65536\nNUMBER(RADIX_MMU)=1\n".encode()
    layer = LinuxLayer.open(Base(memory((0x2000, text), (0x6000, names("ppc64le")))), {})
    assert (layer.info.architecture, layer.info.page_size) == ("ppc64le", 65536)
    alone = LinuxLayer.open(Base(memory((0x2000, text))), {})
    assert (alone.info.architecture, alone.info.version) == ("ppc64le", RELEASE)


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ([], "this memory holds neither VMCOREINFO nor a kernel's banner"),
        ([(0x6000, names("s390x"))], f"this memory holds the names of Linux {RELEASE}, but no page tables"),
        ([(0x2000, banner()), (0x6000, names("x86_64"))], f"this memory holds the banner of Linux {RELEASE}, but no"),
        ([(0x2000, f"OSRELEASE={RELEASE}\nPAGE=1\n".encode())], f"this memory holds VMCOREINFO of Linux {RELEASE}")
    ],
)
def test_why_no_kernel_was_recognised_is_told_by_what_was_found(parts, said):
    with pytest.raises(NotRecognisedError) as caught:
        LinuxLayer.open(Base(memory(*parts)), {})
    assert str(caught.value).startswith(said)
