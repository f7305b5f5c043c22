"""Guests of libvirt: their monitor is libvirt's, which virsh asks; without it their memory tells."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from commandline import cloudfs
from guests.domains import domain, libvirt, virsh
from guests.kernels import MissingError
from guests.living import boot_words, wait_until
from support import require

DOMAIN = """<domain type='qemu'><name>{name}</name><memory unit='MiB'>{size}</memory><vcpu>1</vcpu>
<memoryBacking><source type='{source}'/></memoryBacking>
<os><type arch='x86_64' machine='q35'>hvm</type>{boot}</os><features><acpi/><apic/></features>
<cpu mode='custom'><model>qemu64</model></cpu>
<devices><emulator>/usr/bin/qemu-system-x86_64</emulator><memballoon model='none'/>{devices}</devices></domain>"""
BOOT = "<kernel>{folder}/kernel</kernel><initrd>{folder}/initramfs</initrd><cmdline>{words}</cmdline>"
SERIAL = "<serial type='file'><source path='{folder}/serial'/></serial>"


@pytest.fixture(scope="module", autouse=True)
def daemon() -> Iterator[None]:
    with libvirt():
        yield


@pytest.mark.parametrize("source", ["anonymous", "file"])
def test_a_domain_is_told_by_libvirt_and_paused_by_it(opened, source):
    name = f"cloudfs-test-{os.getpid()}"
    with domain(name, DOMAIN.format(name=name, size=128, source=source, boot="", devices="")) as pid:
        connector = opened(name)
        assert connector.info.target == f"{name} (pid {pid})"
        assert connector.info.notes == ("the layout of its RAM is told by libvirt",)
        assert connector.memory_map.coalesced() == opened(name, qmp="no").memory_map.coalesced()
        connector.pause()
        assert virsh("domstate", name).strip() == "paused"
        assert connector.hints().registers


def test_processes_of_a_domain_are_shown_with_virsh_and_without(tmp_path):
    try:
        words, put = boot_words()
    except MissingError as error:
        require(False, str(error))
        raise
    put(tmp_path)
    name = f"cloudfs test, {os.getpid()}"
    boot = BOOT.format(folder=tmp_path, words=words[-1])
    text = DOMAIN.format(name=name, size=256, source="memfd", boot=boot, devices=SERIAL.format(folder=tmp_path))
    serial = tmp_path / "serial"
    with domain(name, text):
        wait_until(lambda: serial.exists() and b"booted" in serial.read_bytes(), 120, "the guest")
        for options in ("", ":qmp=no"):
            shown = cloudfs("ps", "-c", f'qemu:"{name}"{options}')
            assert b"kthreadd" in shown.stdout, shown.stderr
