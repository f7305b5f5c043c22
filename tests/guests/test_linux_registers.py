"""Registers of threads that wait in the kernel, against what the guest's own words and code say of the same moment."""

from __future__ import annotations

import pytest
from guests.recording import Recording

from engine.errors import NotFoundError
from engine.file_memory import FileMemory
from engine.oslayer import Base, ThreadRegisters
from engine.oslayers.linux import LinuxLayer

CALL = {"amd64": (b"\x0f\x05", "rip", "rsp", "orig_rax"), "arm64": (b"\x01\0\0\xd4", "pc", "sp", "x8"),
        "riscv64": (b"\x73\0\0\0", "pc", "sp", "a7")}  # fmt: skip
"""Architecture → the instruction that enters the kernel, and where pc, stack pointer and number of the call stand."""
NUMBERS = {"amd64": {"nanosleep": 230, "poll": 7}, "arm64": {"nanosleep": 115}, "riscv64": {"nanosleep": 115}}
"""Part of a line of /proc/PID/stack → number of the system call (arch/x86/entry/syscalls/syscall_64.tbl,
include/uapi/asm-generic/unistd.h).
"""


@pytest.fixture(scope="module")
def layers():
    """Each guest's layer, opened once."""
    kept: dict[str, LinuxLayer] = {}

    def of(recording: Recording) -> LinuxLayer:
        name = str(recording.image)
        if name not in kept:
            kept[name] = LinuxLayer.open(Base(FileMemory(name, immutable=True)), {})
        return kept[name]

    yield of
    kept.clear()


@pytest.fixture
def layer(typed, layers):
    return layers(typed)


def waiting(typed, layer):
    """(process, thread, its registers) of all threads that have them."""
    for process in layer.processes():
        source = process.capability(ThreadRegisters)
        for thread in process.threads():
            try:
                yield process, thread, source.registers(thread.tid)
            except NotFoundError:
                continue


def test_every_thread_that_waits_stands_behind_an_instruction_that_enters_the_kernel(typed, layer):
    instruction, pc, _, _ = CALL[typed.guest.architecture]
    states = []
    for process, thread, registers in waiting(typed, layer):
        at = registers[pc] - (0 if thread.state == "T" and typed.guest.architecture != "amd64" else len(instruction))
        assert process.memory.read(at, len(instruction)) == instruction, thread
        states.append(thread.state)
    assert states.count("S") >= 20  # of the stopped one the call is to be entered again


def test_stack_pointers_lie_in_the_stacks_that_maps_tells(typed, layer):
    _, _, sp, _ = CALL[typed.guest.architecture]
    for process, thread, registers in waiting(typed, layer):
        pid = process.record.pid
        if thread.tid == pid and f"/proc/{pid}/maps" in typed.truth:
            start, stop = next((a, b) for a, b, _, path in typed.truth.maps(pid) if path == "[stack]")
            assert start <= registers[sp] < stop, thread


def test_the_number_of_the_call_is_that_of_the_function_in_the_guest_s_own_proc_stack(typed, layer):
    *_, number = CALL[typed.guest.architecture]
    found = 0
    for process, thread, registers in waiting(typed, layer):
        stack = typed.truth.get(f"/proc/{process.record.pid}/task/{thread.tid}/stack", b"").decode()
        for part, expected in NUMBERS[typed.guest.architecture].items():
            if part in stack and thread.name == "sleep":
                assert registers[number] == expected, thread
                found += 1
    assert found >= 8


def test_a_thread_s_own_text_lies_above_its_stack_pointer_and_beside_its_thread_pointer(typed, layer):
    truth = typed.truth
    _, _, sp, _ = CALL[typed.guest.architecture]
    pointer = {"amd64": "fs_base", "arm64": "tpidr", "riscv64": "tp"}[typed.guest.architecture]
    process = layer.process(truth.keeper)
    names = {thread.name: thread.tid for thread in process.threads()}
    for name in ("keeper-one", "keeper-two"):
        registers = process.registers(names[name])
        assert 0 <= truth.secrets[f"stack-of-{name}"] - registers[sp] < 4096
        assert abs(truth.secrets[f"local-of-{name}"] - registers[pointer]) < 4096


def test_running_and_kernel_threads_have_none(typed, layer):
    with pytest.raises(NotFoundError, match="was running"):
        layer.process(typed.truth.keeper).registers(typed.truth.keeper)
    with pytest.raises(NotFoundError, match="thread of the kernel"):
        layer.process(2).registers(2)
    with pytest.raises(NotFoundError, match="no thread"):
        layer.process(1).registers(2)
