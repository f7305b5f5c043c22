"""Dumps of a guest, by QEMU and by makedumpfile: their bytes are those of its RAM, and its processes are the same."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from guests.dumps import Dumps, dumped
from guests.kernels import MissingError
from support import require

from engine.connector import Connector
from engine.errors import FaultKind
from engine.machine import Machine
from engine.memory import Memory
from engine.oslayer import Base, KernelLog, OsLayer
from engine.oslayers.raw_dtb import RawDtbLayer
from engine.targets import image_link, open_target

PAGE = 4096
HOLES = ((0, 0x1000), (0xA0000, 0x100000))
"""What our vmcore does not have: the first page, and where a PC has its devices."""
PACKED = {
    "zlib": ("-c", "-d", "0"),
    "lzo": ("-l", "-d", "1"),
    "plain": ("-d", "1"),
    "flattened": ("-F", "-c", "-d", "1"),
    "split": ("--split", "-c", "-d", "1"),
    "elf": ("-E", "-d", "1"),
}
"""Nothing is left out of these but pages of zeros."""
REGISTER = re.compile(r"\b(R[A-Z0-9]{1,2}|E[A-Z]{2}|CR[0-4]|X\d\d|PC|SP|pc|x[1-9]\d*/\w+) *=? *([0-9a-f]{8,16})\b")
"""A register as the monitor prints it on x86, ARM and RISC-V."""
FLAGS = ("RFL", "EFL")
LESS = {"zlib": ("-c", "-d", "31"), "lzo": ("-l", "-d", "31"), "plain": ("-d", "31"), "user": ("-c", "-d", "8")}


GUEST = "amd64-6.1-4level"
OTHERS = ("i386-6.1", "arm64-6.1", "riscv64-6.12")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "by_qemu" in metafunc.fixturenames:
        names = [GUEST, *(OTHERS if metafunc.config.getoption("--all-guests") else ())]
        metafunc.parametrize("by_qemu", names, indirect=True, scope="module")


def dumps_of(name: str) -> Dumps:
    try:
        return dumped(name)
    except MissingError as error:
        require(False, str(error))
        raise


@pytest.fixture(scope="module")
def dumps() -> Dumps:
    return dumps_of(GUEST)


@pytest.fixture(scope="module")
def by_qemu(request: pytest.FixtureRequest) -> Dumps:
    return dumps_of(request.param)


@pytest.fixture
def made(dumps):
    def make(*options: str) -> str:
        try:
            files = dumps.made(*options)
        except MissingError as error:
            require(False, str(error))
            raise
        if len(files) == 1:
            return str(files[0])
        return f"kdump:{files[0]}:parts={files[0].parent}/part*"

    return make


@pytest.fixture(scope="module")
def opened():
    """The connector of a target, and the OS layer over it; opened once, closed in the end."""
    machines: dict[str, Machine] = {}

    def open_it(target: str | Path) -> tuple[Connector, OsLayer]:
        name = str(target)
        if name not in machines:
            machines[name] = open_target(name, need_os=True)
        return machines[name].instances("connector")[0].connector, machines[name].instances("oslayer")[0].layer

    yield open_it
    for machine in machines.values():
        machine.close()


def differing(memory: Memory, dumps: Dumps) -> list[int]:
    """Pages whose bytes are not those of RAM: one word of each, and every page of some of the memory."""
    truth = np.fromfile(dumps.ram, np.uint8).reshape(-1, PAGE)
    places = np.arange(len(truth), dtype=np.uint64) * np.uint64(PAGE) + np.uint64(dumps.base)
    words, faults = memory.words(places + np.uint64(40))
    wrong = words != truth[:, 40:48].copy().view("<u8")[:, 0]
    wrong[faults.rows] = True
    buffer = np.zeros((512, PAGE), np.uint8)
    for first in range(0, len(truth), 4096):
        memory.readinto_padded(dumps.base + first * PAGE, memoryview(buffer).cast("B"))
        wrong[first : first + 512] |= (buffer != truth[first : first + 512]).any(axis=1)
    return [int(page) for page in np.flatnonzero(wrong)]


def in_holes(pages: list[int]) -> bool:
    return all(any(low <= page * PAGE < high for low, high in HOLES) for page in pages)


def listing(layer: OsLayer) -> list[tuple[object, ...]]:
    infos = [process.info for process in layer.processes()]
    return [(info.pid, info.ppid, info.name, info.uid, info.state, info.threads, info.command_line) for info in infos]


def log(layer: OsLayer) -> list[str]:
    found = layer.capability(KernelLog)
    assert found is not None
    return [record.text for record in found.records()]


@pytest.fixture(scope="module")
def plainly(dumps, opened):
    """What the layer says over the RAM itself: processes, modules, log."""
    _, layer = opened(f"raw:{dumps.ram}")
    return listing(layer), [module.info for module in layer.modules()], log(layer)


@pytest.mark.parametrize("name", ["elf", "kdump"])
def test_what_qemu_dumps_is_its_ram(by_qemu, opened, name):
    connector, _ = opened(getattr(by_qemu, name))
    assert differing(connector.memory, by_qemu) == []


@pytest.mark.parametrize("name", ["elf", "kdump"])
def test_what_qemu_dumps_lists_the_same_processes(by_qemu, opened, name):
    _, layer = opened(getattr(by_qemu, name))
    _, of_ram = opened(f"raw:{by_qemu.ram}:base={by_qemu.base:#x}")
    assert (listing(layer), log(layer)) == (listing(of_ram), log(of_ram))


@pytest.mark.parametrize("name", ["elf", "kdump"])
def test_registers_of_qemus_dumps_are_those_of_its_monitor(by_qemu, opened, name):
    (registers,) = opened(getattr(by_qemu, name))[0].hints().registers
    shown = {named(word): int(value, 16) for word, value in REGISTER.findall(by_qemu.registers)}
    assert len(shown) >= 10
    assert {word: registers.get(word) for word in shown} == shown


def named(word: str) -> str:
    """A register by the name that notes have for it: of X05 x5, of x10/a0 a0."""
    if word in FLAGS:
        return "eflags"
    return re.sub(r"^x0+(?=\d)", "x", word.rpartition("/")[2].lower())


@pytest.mark.parametrize("name", ["elf", "kdump"])
def test_the_page_table_of_a_dumps_cpu_leads_to_where_it_stood(dumps, opened, name):
    """It was stopped in the loop in which our program waits: `jmp .`, whose bytes are eb fe."""
    connector, _ = opened(getattr(dumps, name))
    hints = connector.hints()
    layer = RawDtbLayer.open(Base(connector.memory, hints), {"dtb": hex(hints.dtb or 0), "arch": "x86-64"})
    assert layer.process(1).memory.read(hints.registers[0]["rip"], 2) == b"\xeb\xfe"


@pytest.mark.parametrize("name", PACKED)
def test_what_makedumpfile_makes_is_the_ram(dumps, made, opened, name):
    connector, _ = opened(made(*PACKED[name]))
    assert in_holes(differing(connector.memory, dumps))
    assert connector.hints().vmcoreinfo == dumps.vmcoreinfo


@pytest.mark.parametrize("name", PACKED)
def test_what_makedumpfile_makes_lists_the_same_processes(made, opened, plainly, name):
    _, layer = opened(made(*PACKED[name]))
    assert listing(layer) == plainly[0]


@pytest.mark.parametrize("name", LESS)
def test_a_dump_without_user_pages_lists_tasks_modules_and_the_log(made, opened, plainly, name):
    _, layer = opened(made(*LESS[name]))
    assert [row[:-1] for row in listing(layer)] == [row[:-1] for row in plainly[0]]
    assert [module.info for module in layer.modules()] == plainly[1]
    assert log(layer) == plainly[2]


@pytest.mark.parametrize("name", LESS)
def test_pages_that_makedumpfile_left_out_are_said_to_be(dumps, made, opened, name):
    connector, _ = opened(made(*LESS[name]))
    truth = np.fromfile(dumps.ram, np.uint8).reshape(-1, PAGE)
    words, faults = connector.memory.words(np.arange(len(truth), dtype=np.uint64) * np.uint64(PAGE) + np.uint64(8))
    wrong = words != truth[:, 8:16].copy().view("<u8")[:, 0]
    left_out = faults.rows[faults.kinds == FaultKind.LEFT_OUT]
    assert set(np.flatnonzero(wrong).tolist()) <= {*faults.rows.tolist()}
    assert len(left_out) > 1000
    assert in_holes([int(page) for page in faults.rows[faults.kinds != FaultKind.LEFT_OUT]])


def test_command_lines_that_were_left_out_are_unknown_and_not_empty(made, opened, plainly):
    _, layer = opened(made("-c", "-d", "31"))
    had = {row[0] for row in plainly[0] if row[-1]}
    assert {row[-1] for row in listing(layer) if row[0] in had} == {None}


def test_a_dump_is_recognised_whatever_makes_it(dumps, made):
    of_kdump = [dumps.kdump, made(*LESS["zlib"]), made(*PACKED["flattened"])]
    assert {image_link(str(target))[1].plugin for target in of_kdump} == {"kdump"}
    assert {image_link(str(target))[1].plugin for target in (dumps.elf, made(*PACKED["elf"]))} == {"elfcore"}
