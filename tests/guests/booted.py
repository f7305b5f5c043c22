"""A Linux guest that runs for a test, under a QEMU of its own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from guests.kernels import MissingError
from guests.living import Living, boot_words, qemu
from guests.machine import BOOT_LIMIT, RunningGuest
from guests.monitor import Serial
from support import require


class Booted(RunningGuest):
    """A guest whose memory is read by QEMU itself."""

    def __init__(self, living: Living) -> None:
        self.living = living
        self.serial = Serial(living.folder / "serial")

    def read_physical(self, address: int, size: int) -> bytes:
        """See `RunningGuest.read_physical`."""
        return self.living.saved(address, size)


@contextlib.contextmanager
def booted(ram: str, *, reboots: bool = False) -> Iterator[Booted]:
    """One that has started; where it `reboots` a reset has it boot anew, else it ends QEMU."""
    try:
        words, put = boot_words()
        words = [word for word in words if not (reboots and word == "-no-reboot")]
        words += ["-cpu", "max,la57=off", "-serial", "unix:{folder}/serial,server=on,wait=off"]
        with qemu(ram, size=512, more=words, prepare=put) as living:
            found = Booted(living)
            with contextlib.closing(found.serial):
                found.serial.said("booted", BOOT_LIMIT)
                yield found
    except MissingError as error:
        require(False, str(error))
