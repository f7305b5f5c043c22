"""Every registered connector and OS layer holds its contract: the list is the registry's, so none is forgotten."""

from __future__ import annotations

import contextlib
import os
import weakref
from collections.abc import Callable

import pytest
from bare_qemu import PLACE, RAM, bare_machine
from dump_samples import lime_image, vmss_file, vmss_memory
from hand_made_dumps import Kdump, Load, deflated, elf_core, kdump, note
from hand_made_tables import DTB, image
from support import require

from engine import registry
from engine.bytes_memory import BytesMemory
from engine.connector import Connector
from engine.connectors.dummy import made_bytes
from engine.file_memory import FileMemory
from engine.oslayer import Base
from engine.testing import Truth, check_connector, check_oslayer
from engine.types import Extent

Sample = Callable[[type[Connector], str, bool], tuple[Connector, Truth]]


def raw_sample(connector: type[Connector], folder: str, writable: bool) -> tuple[Connector, Truth]:
    """A file of three pages at 0x10000."""
    data = os.urandom(3 * 4096)
    path = os.path.join(folder, "image.raw")
    with open(path, "wb") as file:
        file.write(data)
    opened = connector.open(path, {"base": "0x10000"}, parent=None, writable=writable)
    return opened, Truth(known=[(0x10000, data)], holes=[Extent(0, 0x10000)])


def lime_sample(connector: type[Connector], folder: str, writable: bool) -> tuple[Connector, Truth]:
    """Three ranges of LiME, the first of which stops within a page."""
    ranges = [(0x1000, os.urandom(0x1C00)), (0x10000, os.urandom(3 * 4096)), (1 << 32, os.urandom(4096))]
    path = os.path.join(folder, "image.lime")
    with open(path, "wb") as file:
        file.write(lime_image(ranges))
    opened = connector.open(path, {}, parent=None, writable=writable)
    return opened, Truth(known=ranges, holes=[Extent(0, 0x1000), Extent(0x20000, 1 << 20)])


def vmware_sample(connector: type[Connector], folder: str, writable: bool) -> tuple[Connector, Truth]:
    """Three pages at 0 and one at 4 GiB, as the state file beside them says."""
    data = os.urandom(4 * 4096)
    path = os.path.join(folder, "machine.vmem")
    state = vmss_file({"memory": vmss_memory([(0, 0, 3), (0x100000, 3, 1)])})
    for name, content in ((path, data), (os.path.join(folder, "machine.vmss"), state)):
        with open(name, "wb") as file:
            file.write(content)
    opened = connector.open(path, {}, parent=None, writable=writable)
    return opened, Truth(known=[(0, data[:12288]), (1 << 32, data[12288:])], holes=[Extent(12288, 1 << 20)])


def dummy_sample(connector: type[Connector], folder: str, writable: bool) -> tuple[Connector, Truth]:
    """Pages 0 to 14 of every 16, with the gap of a PC below 4 GiB."""
    opened = connector.open("", {"size": "5G", "seed": "9", "holes": "yes"}, parent=None, writable=writable)
    places = ((0, 15 * 4096), (0x20000 - 10 * 4096, 9 * 4096), (4 << 30, 4096), ((6 << 30) - 4 * 4096, 3 * 4096))
    known = [(address, made_bytes(address, size, 9)) for address, size in places]
    return opened, Truth(known, [Extent(15 * 4096, 4096), Extent(3 << 30, 1 << 30), Extent(0x1F000, 4096)])


def qemu_sample(connector: type[Connector], folder: str, writable: bool) -> tuple[Connector, Truth]:
    """A QEMU that stands still, with private RAM; its own monitor puts the bytes there."""
    from guests.kernels import MissingError
    from guests.living import qemu

    held = contextlib.ExitStack()
    try:
        living = held.enter_context(qemu("private", more=["-S"]))
    except MissingError as error:
        require(False, str(error))
        raise
    data = os.urandom(3 * 4096)
    living.put(0x100000, data)
    host = registry.load_oslayer("native").open(Base(live=True, writable=writable), {})
    opened = connector.open(living.name, {}, parent=host, writable=writable)
    weakref.finalize(opened, held.close)
    return opened, Truth([(0x100000, data)], [Extent(64 << 20, 1 << 20), Extent(1 << 40, 4096)])


def elfcore_sample(connector: type[Connector], folder: str, writable: bool) -> tuple[Connector, Truth]:
    """Two segments, the first of which has a page of memory more than of file; never writable."""
    data = os.urandom(3 * 4096)
    path = os.path.join(folder, "vmcore")
    loads = [Load(0x10000, data[:8192], more=4096), Load(0x20000, data[8192:])]
    with open(path, "wb") as file:
        file.write(elf_core(loads, note(b"VMCOREINFO", 0, b"OSRELEASE=6.1\n")))
    opened = connector.open(path, {}, parent=None, writable=writable)
    return opened, Truth([(0x10000, data[:8192] + bytes(4096)), (0x20000, data[8192:])], [Extent(0, 0x10000)])


def kcore_sample(connector: type[Connector], folder: str, writable: bool) -> tuple[Connector, Truth]:
    """A file as /proc/kcore is: RAM, and segments of virtual memory that has no physical address; never writable."""
    data = os.urandom(2 * 4096)
    path = os.path.join(folder, "kcore")
    notes = b"".join(note(b"CORE", kind, bytes(336)) for kind in (1, 3, 4)) + note(b"VMCOREINFO", 0, b"OSRELEASE=6.1\n")
    loads = [Load((1 << 64) - 1, os.urandom(4096), virtual=0xFFFF_C900_0000_0000), Load(0x100000, data)]
    with open(path, "wb") as file:
        file.write(elf_core(loads, notes))
    opened = connector.open(path, {}, parent=None, writable=writable)
    return opened, Truth([(0x100000, data)], [Extent(0, 0x100000)])


def kdump_sample(connector: type[Connector], folder: str, writable: bool) -> tuple[Connector, Truth]:
    """Pages 16 to 18, packed; page 19 was left out of the dump; never writable."""
    data = os.urandom(3 * 4096)
    path = os.path.join(folder, "vmcore")
    pages = {16 + row: data[4096 * row : 4096 * (row + 1)] for row in range(3)}
    with open(path, "wb") as file:
        file.write(kdump(pages, Kdump(pack=deflated, level=8), left_out=[19]))
    opened = connector.open(path, {}, parent=None, writable=writable)
    return opened, Truth([(0x10000, data)], [Extent(0, 0x10000), Extent(0x13000, 0x1000)])


def gdb_sample(connector: type[Connector], folder: str, writable: bool) -> tuple[Connector, Truth]:
    """A machine in QEMU that was never started."""
    held = contextlib.ExitStack()
    machine = held.enter_context(bare_machine("-S", known=os.urandom(3 * 4096)))
    opened = connector.open(machine.stub, {"timeout": "60"}, parent=None, writable=writable)
    weakref.finalize(opened, held.close)
    return opened, Truth(known=[(PLACE, machine.known)], holes=[Extent(RAM, 1 << 20)])


CONNECTORS: dict[str, Sample] = {
    "raw": raw_sample, "lime": lime_sample, "vmware": vmware_sample,
    "dummy": dummy_sample, "qemu": qemu_sample, "elfcore": elfcore_sample,
    "gdb": gdb_sample, "kdump": kdump_sample, "kcore": kcore_sample,
}  # fmt: skip


@pytest.mark.parametrize("writable", [False, True], ids=["read-only", "writable"])
@pytest.mark.parametrize("name", [plugin.name for plugin in registry.plugins("connector")])
def test_every_connector_holds_its_contract(name, writable, tmp_path):
    assert name in CONNECTORS, f"give the connector {name!r} a sample here"
    connector, truth = CONNECTORS[name](registry.load_connector(name), str(tmp_path), writable)
    check_connector(connector, truth)


def linux_guest() -> Base:
    """A recorded guest, which is made on first use."""
    from guests import recorder
    from guests.kernels import MissingError

    try:
        return Base(FileMemory(str(recorder.recorded("amd64-6.1-4level").image), immutable=True))
    except MissingError as error:
        require(False, str(error))
        raise


LAYERS: dict[str, tuple[Callable[[], Base], dict[str, str], list[int]]] = {
    "native": (lambda: Base(live=True), {}, [os.getpid()]),  # not 1: even root may not look into it in a container
    "linux": (linux_guest, {}, [1, 2]),
    "raw-dtb": (lambda: Base(BytesMemory(bytes(image()))), {"dtb": hex(DTB)}, [1]),
}


@pytest.mark.parametrize("name", [plugin.name for plugin in registry.plugins("oslayer")])
def test_every_oslayer_holds_its_contract(name):
    assert name in LAYERS, f"give the OS layer {name!r} a sample here"
    base, options, alive = LAYERS[name]
    layer = registry.load_oslayer(name).open(base(), options)
    check_oslayer(layer, alive=alive)
    layer.close()
