"""Connector `vmware`, on files made after descriptions of the format: none of VMware's own was to be had."""

from __future__ import annotations

import os
import struct
from contextlib import suppress
from pathlib import Path

import pytest
from dump_samples import vmss_block, vmss_file, vmss_memory, vmss_tag
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.connectors.vmware import VmwareConnector
from engine.errors import EngineError, FaultError, NotFoundError, NotRecognisedError
from engine.targets import chain_of, open_target
from engine.testing import Truth, check_connector
from engine.types import Extent

LOW, HIGH = os.urandom(8 * 4096), os.urandom(4 * 4096)
REGIONS = [(0, 0, 8), (0x100000, 8, 4)]
"""8 pages at 0, 4 pages at 4 GiB."""
TRUTH = Truth(known=[(0, LOW), (1 << 32, HIGH)], holes=[Extent(8 * 4096, 1 << 20)])
CPU = [
    vmss_tag("cpu:numVCPUs", (), struct.pack("<I", 2)),
    vmss_tag("rip", (0,), struct.pack("<Q", 0xFFFFFFFF81000000)),
    vmss_tag("CR64", (0, 0), struct.pack("<Q", 0x80050033)),
    vmss_tag("CR64", (0, 3), struct.pack("<Q", 0x1AE003)),
    vmss_tag("CR64", (0, 4), struct.pack("<Q", 0x3506F8)),
    vmss_block("CR64", (1,), struct.pack("<9Q", 0x80050033, 0, 0, 0x2BE000, 0x3506F8, 0, 0, 0, 0)),
]
CHECKPOINT = [vmss_tag("fileversion", (), b"\1\0\0\0")]
STATE = vmss_file({"Checkpoint": CHECKPOINT, "cpu": CPU, "memory": vmss_memory(REGIONS)})


def machine(folder: Path, state: bytes | None = STATE, suffix: str = ".vmss", memory: bytes = LOW + HIGH) -> Path:
    path = folder / "machine.vmem"
    path.write_bytes(memory)
    if state is not None:
        (folder / f"machine{suffix}").write_bytes(state)
    return path


def opened(path: Path, **options: str) -> VmwareConnector:
    return VmwareConnector.open(str(path), options, parent=None, writable=False)


@pytest.mark.parametrize("suffix", [".vmss", ".vmsn", ".VMSS"])
def test_memory_lies_where_the_state_file_says(tmp_path, suffix):
    connector = opened(machine(tmp_path, suffix=suffix))
    assert [(one.base, one.length, one.real_base) for one in connector.memory_map.ranges] == [
        (0, 8 * 4096, 0),
        (1 << 32, 4 * 4096, 8 * 4096),
    ]
    check_connector(connector, TRUTH)


@pytest.mark.parametrize("name", ["machine.vmem", "machine.vmss"])
def test_it_is_opened_by_any_of_its_files(tmp_path, name):
    machine(tmp_path)
    with open_target(str(tmp_path / name)) as opening:
        connector = opening.instances("connector")[0].connector
        assert connector.kind == "vmware"
        assert connector.memory.read(1 << 32, 100) == HIGH[:100]


def test_registers_of_all_cpus_are_hints(tmp_path):
    hints = opened(machine(tmp_path)).hints()
    assert hints.architecture == "x86_64"
    assert hints.dtb == 0x1AE000
    assert hints.registers == (
        {"rip": 0xFFFFFFFF81000000, "cr0": 0x80050033, "cr3": 0x1AE003, "cr4": 0x3506F8},
        {"cr0": 0x80050033, "cr1": 0, "cr2": 0, "cr3": 0x2BE000, "cr4": 0x3506F8},
    )


@pytest.mark.parametrize(
    "magic", [0xBED2BED2, 0xBED3BED3, 0xBAD1BAD1, 0xBAD2BAD2], ids=lambda magic: f"{magic:#x}"
)
def test_a_state_file_may_hold_the_memory_itself(tmp_path, magic):
    path = tmp_path / "machine.vmsn"
    tags = [*vmss_memory(REGIONS), vmss_block("Memory", (0, 0), LOW + HIGH, padding=77)]
    path.write_bytes(vmss_file({"memory": tags, "cpu": CPU}, magic))
    with open_target(str(path)) as opening:
        memory = opening.instances("connector")[0].memory
        assert memory.read(0, len(LOW)) == LOW
        assert memory.read(1 << 32, len(HIGH)) == HIGH


def test_memory_without_regions_is_one_range(tmp_path):
    path = tmp_path / "machine.vmss"
    path.write_bytes(vmss_file({"memory": [vmss_block("Memory", (0, 0), LOW, padding=5)]}))
    connector = opened(path)
    assert connector.memory.size == len(LOW)
    assert connector.memory.read(0, len(LOW)) == LOW


def test_memory_that_is_compressed_says_so(tmp_path):
    path = tmp_path / "machine.vmss"
    path.write_bytes(vmss_file({"memory": [vmss_block("Memory", (0, 0), LOW, kind=62)]}))
    with pytest.raises(NotRecognisedError, match="compressed"):
        opened(path)


def test_a_state_file_without_its_memory_names_what_is_missing(tmp_path):
    (tmp_path / "machine.vmss").write_bytes(STATE)
    with pytest.raises(NotFoundError, match=r"\.vmem beside it"):
        opened(tmp_path / "machine.vmss")


def test_a_state_file_of_another_name_can_be_named(tmp_path):
    path = machine(tmp_path, None)
    (tmp_path / "other").write_bytes(STATE)
    assert opened(path, state=str(tmp_path / "other")).memory.read(1 << 32, 4) == HIGH[:4]
    with pytest.raises(NotFoundError):
        opened(path, state=str(tmp_path / "nothing"))


def test_memory_alone_above_3_gib_warns(tmp_path):
    path = machine(tmp_path, None)
    assert not opened(path).info.notes
    os.truncate(path, (3 << 30) + 4096)
    connector = opened(path)
    assert "above 3 GiB" in connector.info.notes[0]
    assert connector.memory.size == (3 << 30) + 4096


def test_memory_that_is_shorter_than_its_state_says_faults_there(tmp_path):
    connector = opened(machine(tmp_path, memory=LOW + HIGH[:4096]))
    assert connector.memory.read(1 << 32, 4096) == HIGH[:4096]
    with pytest.raises(FaultError):
        connector.memory.read((1 << 32) + 4096, 1)
    assert any("12288 bytes shorter" in note for note in connector.info.notes)


@pytest.mark.parametrize(
    ("state", "says"),
    [
        (b"rubbish", "cut off"),
        (b"rubbish" * 100, "does not begin as"),
        (STATE[:100], "cut off"),
        (vmss_file({"cpu": CPU}), "says nothing of memory"),
        (vmss_file({"memory": vmss_memory(REGIONS)[:-1]}), "where region 1 of 2 lies"),
        (struct.pack("<III", 0xBED2BED2, 8, 1 << 30), "1073741824 groups"),
    ],
)
def test_a_state_file_that_is_damaged_leaves_the_memory_as_it_stands(tmp_path, state, says):
    connector = opened(machine(tmp_path, state))
    assert connector.memory.read(0, len(LOW + HIGH)) == LOW + HIGH
    assert says in connector.info.notes[0]


def test_regions_that_overlap_are_no_layout(tmp_path):
    with pytest.raises(NotRecognisedError, match="overlap"):
        opened(machine(tmp_path, vmss_file({"memory": vmss_memory([(0, 0, 8), (4, 8, 4)])})))


def test_the_files_of_an_encrypted_machine_say_so(tmp_path):
    path = machine(tmp_path, None, memory=bytes.fromhex("9edd4389") + bytes(8192))
    with pytest.raises(NotRecognisedError, match="encrypted"):
        chain_of(str(path))


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, len(STATE) - 1), st.integers(0, 255)), max_size=8), st.integers(0, 600))
def test_no_damage_raises_anything_but_the_errors_of_the_engine(tmp_path, changes, cut):
    state = bytearray(STATE)
    for at, value in changes:
        state[at] = value
    path = machine(tmp_path, bytes(state[: len(state) - cut]))
    with suppress(EngineError):
        connector = opened(path)
        for one in connector.memory_map.ranges:
            with suppress(FaultError):
                connector.memory.read(one.base, min(one.length, 1 << 20))
        connector.close()
