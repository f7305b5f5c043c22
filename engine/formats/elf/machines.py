"""Names of the machines that e_machine numbers stand for.

Numbers: <elf.h> of glibc 2.36 (EM_…), the registry of the generic System V ABI. Names: what `uname -m` says on
such a machine, or, where it says many things, the name of GNU and LLVM.
"""

from __future__ import annotations

S390, ALPHA = 22, 0x9026

_PLAIN = {
    2: "sparc",
    3: "i386",
    4: "m68k",
    5: "m88k",
    6: "i386",
    7: "i860",
    15: "parisc",
    18: "sparc",
    23: "spu",
    41: "alpha",
    42: "sh",
    43: "sparc64",
    44: "tricore",
    46: "h8300",
    50: "ia64",
    53: "coldfire",
    75: "vax",
    76: "cris",
    83: "avr",
    87: "v850",
    88: "m32r",
    89: "mn10300",
    92: "or1k",
    93: "arc",
    94: "xtensa",
    105: "msp430",
    106: "blackfin",
    113: "nios2",
    140: "tic6x",
    164: "hexagon",
    167: "nds32",
    188: "tilepro",
    189: "microblaze",
    190: "cuda",
    191: "tilegx",
    195: "arcv2",
    220: "z80",
    224: "amdgpu",
    244: "lanai",
    247: "bpf",
    251: "ve",
    252: "csky",
    0x9026: "alpha",
    0xABC7: "xtensa",
}

# e_machine → names by (bits, big-endian)
_VARIANTS = {
    8: {(32, False): "mipsel", (32, True): "mips", (64, False): "mips64el", (64, True): "mips64"},
    20: {(32, False): "ppcle", (32, True): "ppc", (64, False): "ppc64le", (64, True): "ppc64"},
    21: {(32, False): "ppcle", (32, True): "ppc", (64, False): "ppc64le", (64, True): "ppc64"},
    22: {(32, True): "s390", (64, True): "s390x"},
    40: {(32, False): "arm", (32, True): "armeb"},
    62: {(32, False): "x32", (64, False): "x86_64"},
    183: {(64, False): "aarch64", (64, True): "aarch64_be", (32, False): "arm64_32", (32, True): "arm64_32_be"},
    243: {(32, False): "riscv32", (64, False): "riscv64"},
    258: {(32, False): "loongarch32", (64, False): "loongarch64"},
}


def architecture_name(machine: int, bits: int, big_endian: bool) -> str:
    """The name of a machine: `x86_64`, `aarch64`, `ppc64le` …; `em_NUMBER` for one that is not known."""
    variants = _VARIANTS.get(machine)
    if variants is not None:
        return variants.get((bits, big_endian), f"em_{machine}")
    return _PLAIN.get(machine, f"em_{machine}")
