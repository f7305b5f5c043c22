"""Recordings of guests are right in themselves: QEMU, the guest's kernel and the image say the same.

Three that know nothing of one another: QEMU's walk of the page tables (gva2gpa), the page frames that the guest's own
kernel tells (/proc/PID/pagemap), and the bytes in the image.
"""

from __future__ import annotations

import os
import re

from guests.recording import Recording
from guests.truth import SECRET_SIZE, secret_text

UNREADABLE = {"no-access", "no-access-among-many", "hugetlb-no-access"}


def frames(recording: Recording, pid: int) -> dict[int, int]:
    """Virtual page address → physical address, of all resident pages of a process by its pagemap."""
    truth, page = recording.truth, recording.truth.page_size
    return {
        start + number * page: (first + number) * page
        for start, count, first, flags in truth.pagemap(pid)
        if flags & truth.PRESENT
        for number in range(count)
    }


def bytes_at(recording: Recording, pid: int, address: int, size: int) -> bytes:
    """A process's memory by its pagemap alone."""
    page, resident, found = recording.truth.page_size, frames(recording, pid), b""
    while len(found) < size:
        at = address + len(found)
        part = min(size - len(found), page - at % page)
        found += recording.read_physical(resident[at // page * page] + at % page, part)
    return found


def x86_paging(recording: Recording) -> str:
    registers = recording.registers
    cr4 = registers["CR4"]
    if registers["EFER"] & 1 << 10:
        return "x86-64, 5 levels" if cr4 & 1 << 12 else "x86-64, 4 levels"
    return "x86, PAE" if cr4 & 1 << 5 else "x86, 2 levels"


def arm_paging(recording: Recording) -> str:
    registers = recording.registers
    if "TTBCR" in registers:
        return "ARM, LPAE" if registers["TTBCR"] & 1 << 31 else "ARM, short descriptors"
    tcr = registers["TCR_EL1"]  # Arm ARM D19.2.139: TG1 bits 31:30, T1SZ bits 21:16
    granule = {1: "16K", 2: "4K", 3: "64K"}[tcr >> 30 & 3]
    return f"AArch64, {granule}, {64 - (tcr >> 16 & 63)} bits"


def riscv_paging(recording: Recording) -> str:
    return {8: "RISC-V, Sv39", 9: "RISC-V, Sv48", 10: "RISC-V, Sv57"}[recording.registers["satp"] >> 60]


def test_the_registers_tell_the_paging_that_the_guest_was_made_for(recording: Recording) -> None:
    kinds = {"amd64": x86_paging, "i386": x86_paging, "arm64": arm_paging, "armhf": arm_paging, "riscv64": riscv_paging}
    assert kinds[recording.guest.architecture](recording) == recording.guest.paging


def test_the_extents_hold_all_that_the_kernel_calls_ram(recording: Recording) -> None:
    found = re.findall(r"^([0-9a-f]+)-([0-9a-f]+) : System RAM$", recording.truth.iomem, re.MULTILINE)
    assert found
    for first, last in ((int(first, 16), int(last, 16)) for first, last in found):
        assert any(start <= first and last < start + length for start, length, _ in recording.extents)


def test_the_extents_name_each_byte_of_the_image_at_most_once(recording: Recording) -> None:
    size = recording.image.stat().st_size
    assert size == recording.guest.memory << 20
    last = 0
    for _, length, offset in sorted(recording.extents, key=lambda extent: extent[2]):
        assert last <= offset
        last = offset + length
    assert last <= size


def test_the_image_takes_no_room_for_zeros(recording: Recording) -> None:
    assert recording.image.stat().st_blocks * 512 < recording.image.stat().st_size // 2


def test_qemu_translated_a_thousand_addresses_mapped_and_unmapped(recording: Recording) -> None:
    mapped = sum(pa is not None for _, pa in recording.translations)
    assert len(recording.translations) >= 1000
    assert mapped >= 300
    assert len(recording.translations) - mapped >= 300


def test_what_qemu_found_mapped_lies_in_ram_or_is_a_device(recording: Recording) -> None:
    devices = re.findall(r"^ *([0-9a-f]+)-([0-9a-f]+) \(prio", recording.monitor["mtree"].decode(), re.MULTILINE)
    ranges = [(int(first, 16), int(last, 16)) for first, last in devices]
    ranges += [(start, start + length - 1) for start, length, _ in recording.extents]
    holes = [pa for _, pa in recording.translations if pa is not None and not _inside(pa, ranges)]
    assert len(holes) < len(recording.translations) // 50  # ACPI tables and buses are mapped where nothing answers


def _inside(address: int, ranges: list[tuple[int, int]]) -> bool:
    return any(first <= address <= last for first, last in ranges)


def test_the_kernels_page_frames_of_the_keeper_are_those_that_qemu_found(recording: Recording) -> None:
    truth = recording.truth
    page, resident = truth.page_size, frames(recording, truth.keeper)
    hidden = [(start, stop) for start, stop, rights, _ in truth.maps(truth.keeper) if rights.startswith("---")]
    compared = 0
    for va, pa in recording.translations:
        if va // page * page in resident and not any(start <= va < stop for start, stop in hidden):
            assert pa == resident[va // page * page] + va % page
            compared += 1
    assert compared >= 100


def test_what_qemu_found_mapped_in_the_keeper_the_kernel_tells_too(recording: Recording) -> None:
    truth = recording.truth
    page, resident = truth.page_size, frames(recording, truth.keeper)
    special = ("[vvar]", "[vvar_vclock]", "[vdso]", "[vectors]", "[vsyscall]", "[sigpage]")  # pagemap tells no frames
    for start, stop, _, path in truth.maps(truth.keeper):
        if path not in special:
            inside = [va for va, pa in recording.translations if pa is not None and start <= va < stop]
            assert all(va // page * page in resident for va in inside)


def test_nothing_is_mapped_between_the_maps_of_the_keeper(recording: Recording) -> None:
    maps = recording.truth.maps(recording.truth.keeper)
    gaps = [(maps[i][1], maps[i + 1][0]) for i in range(len(maps) - 1) if maps[i + 1][0] < 1 << 63]
    if maps[-1][3] == "[vectors]":  # of 32-bit ARM, behind the kernel's own half
        gaps.pop()
    between = [pa for va, pa in recording.translations if any(start <= va < stop for start, stop in gaps)]
    assert len(between) >= 20
    assert set(between) == {None}


def test_the_secrets_stand_where_qemu_says(recording: Recording) -> None:
    answers, page = dict(recording.translations), recording.truth.page_size
    for name, va in recording.truth.secrets.items():
        pa = answers[va]
        if name not in UNREADABLE:
            assert pa is not None
            size = min(SECRET_SIZE, page - va % page)
            assert recording.read_physical(pa, size) == secret_text(name)[:size]


def test_the_secrets_stand_where_the_kernels_pagemap_says(recording: Recording) -> None:
    for name, va in recording.truth.secrets.items():
        assert bytes_at(recording, recording.truth.keeper, va, SECRET_SIZE) == secret_text(name)


def test_a_page_that_nobody_may_read_is_resident_and_not_mapped(recording: Recording) -> None:
    truth, answers = recording.truth, dict(recording.translations)
    for name in UNREADABLE & set(truth.secrets):
        assert truth.read_back[name] in (b"", secret_text(name))  # /proc/PID/mem of 7.2 forces nothing
        assert bytes_at(recording, truth.keeper, truth.secrets[name], SECRET_SIZE) == secret_text(name)
        assert answers[truth.secrets[name]] is None


def test_the_twin_has_bytes_of_its_own_at_the_same_address(recording: Recording) -> None:
    pid, va = recording.truth.twin
    assert bytes_at(recording, pid, va, SECRET_SIZE) == secret_text("twin")
    assert bytes_at(recording, recording.truth.keeper, va, SECRET_SIZE) == secret_text("data")


def test_a_page_that_was_only_read_shows_the_page_of_zeros(recording: Recording) -> None:
    line = re.search(r"^zero ([0-9a-f]+) (\d+)$", recording.truth.text("/tmp/secrets"), re.MULTILINE)
    assert line is not None
    assert not any(bytes_at(recording, recording.truth.keeper, int(line[1], 16), int(line[2])))


def test_a_page_that_was_never_touched_has_no_frame(recording: Recording) -> None:
    line = re.search(r"^untouched ([0-9a-f]+) (\d+)$", recording.truth.text("/tmp/secrets"), re.MULTILINE)
    assert line is not None
    resident, page = frames(recording, recording.truth.keeper), recording.truth.page_size
    start = int(line[1], 16) // page * page
    assert not any(start + at in resident for at in range(0, int(line[2]), page))


def test_a_huge_page_is_whole(recording: Recording) -> None:
    truth = recording.truth
    if "hugetlb" not in truth.secrets:
        assert recording.guest.paging == "ARM, short descriptors"  # Linux has no huge pages there
        return
    va = truth.secrets["hugetlb"]
    start, stop = next((start, stop) for start, stop, _, _ in truth.maps(truth.keeper) if start <= va < stop)
    run = [(first, count) for at, count, first, _ in truth.pagemap(truth.keeper) if at == start]
    assert [count * truth.page_size for _, count in run] == [stop - start]
    assert run[0][0] * truth.page_size % (stop - start) == 0


def test_user_mode_sees_nothing_of_the_kernel(recording: Recording) -> None:
    answers = dict(recording.translations_as_user)
    symbols = [va for va in recording.truth.symbol_addresses() if va in answers]
    if recording.guest.architecture in ("amd64", "i386"):
        assert not answers  # QEMU's answer looks at no rights there
    else:
        assert len(symbols) >= 100
    assert {answers[va] for va in symbols} <= {None}


def test_what_user_mode_sees_the_kernel_sees_alike(recording: Recording) -> None:
    answers = dict(recording.translations)
    assert all(answers[va] == pa for va, pa in recording.translations_as_user if pa is not None)


def test_the_guest_told_of_each_process_it_started(recording: Recording) -> None:
    truth = recording.truth
    told = [truth[f"/proc/{pid}/cmdline"] for pid in truth.pids]
    for number in (*range(100001, 100013), 100014):
        assert any(b"sleep\0%d\0" % number == cmdline for cmdline in told), number
    assert b"renamed one\0--idle\0" in told
    assert any(b"an argument with spaces\0\0" in cmdline for cmdline in told)
    states = {pid: truth.text(f"/proc/{pid}/stat").rpartition(")")[2].split()[0] for pid in truth.pids}
    assert {"S", "T", "Z"} <= set(states.values())
    assert "R" not in {state for pid, state in states.items() if truth[f"/proc/{pid}/cmdline"]}


def test_the_kernel_log_and_symbols_and_types_are_told(recording: Recording) -> None:
    truth = recording.truth
    assert truth["dmesg"].startswith(b"<")
    assert truth.text("/proc/version").split()[2] in truth.text("dmesg")
    assert truth.symbol("_stext") in truth.symbol_addresses()
    assert truth.vmcoreinfo["OSRELEASE"] == truth.text("/proc/sys/kernel/osrelease").strip()
    assert truth.vmcoreinfo["PAGESIZE"] == str(truth.page_size)


def test_the_truth_left_no_copy_in_the_image(recording: Recording) -> None:
    with open(recording.image, "rb") as image:
        size, stop = os.fstat(image.fileno()).st_size, 0
        while stop < size:
            try:
                start = os.lseek(image.fileno(), stop, os.SEEK_DATA)
            except OSError:  # a hole up to the end
                return
            stop = os.lseek(image.fileno(), start, os.SEEK_HOLE)
            for at in range(start, stop, 1 << 24):
                assert b"/proc/kallsyms 00" not in os.pread(image.fileno(), min((1 << 24) + 64, stop - at), at)
