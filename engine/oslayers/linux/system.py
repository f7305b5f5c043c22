"""What a kernel says of the machine as a whole: its names, its clock, its command line.

Sources: Linux include/linux/utsname.h, init/main.c, init/version.c; releases 5.10 to 7.x.
"""

from __future__ import annotations

from engine.errors import EngineError, FaultError, NotFoundError
from engine.oslayers.linux.clock import Clock, Timekeeper
from engine.oslayers.linux.kernel import Kernel
from engine.oslayers.linux.log import PrintkLog
from engine.oslayers.linux.objects import decoded

COMMAND_LINE_LIMIT = 4096
"""COMMAND_LINE_SIZE is at the most that (arch/s390); bootconfig may make it longer."""
LOGGED = "Kernel command line: "
LOG_LINE = 900
"""A line of the log that is shorter was not cut (PRINTKRB_RECORD_MAX is 1024)."""
NAMES = ("sysname", "nodename", "release", "version", "machine", "domainname")
SYSTEM, _NAME, _NAMESPACE = b"Linux\0", 65, 1024
"""sysname; bytes of each field (__NEW_UTS_LEN and a NUL, include/uapi/linux/utsname.h); more than the structure has."""
_BANNER = b"Linux version "
_BANNER_LIMIT = 1024


class System:
    """Facts of the whole system; those that cannot change are kept."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self._timekeeper: Timekeeper | None = None
        self._asked_for_clock = False
        self._clock: Clock | None = None
        self._banner: str | None = None
        self._command_line: str | None = None

    def names(self) -> dict[str, str]:
        """The fields of uname(2) in the first namespace of names; those that cannot be read are missing."""
        address, told = self.kernel.profile.symbol("init_uts_ns"), self.kernel.found.vmcoreinfo
        if address is None:
            return {}
        data = self.kernel.found.memory.read_padded(address, _NAMESPACE)
        offset = told.offset("uts_namespace.name")
        start = data.find(SYSTEM) if offset is None else offset  # not told before 5.12
        if start < 0:
            return {}
        parts = (data[start + _NAME * index :][:_NAME].partition(b"\0")[0] for index in range(len(NAMES)))
        return {name: decoded(part) for name, part in zip(NAMES, parts, strict=True)}

    def clock(self) -> Clock | None:
        """The clock now, or as it was; None where it is not found."""
        if self._clock is not None and not self.kernel.live:
            return self._clock
        if not self._asked_for_clock:
            self._asked_for_clock = True
            try:
                self._timekeeper = Timekeeper(self.kernel)
            except (NotFoundError, FaultError):
                return None
        self._clock = None if self._timekeeper is None else self._timekeeper.read()
        return self._clock

    def boot_time(self) -> int | None:
        """Nanoseconds since 1970 UTC; None where the clock is not found."""
        clock = self.clock()
        return None if clock is None else clock.boot

    def command_line(self) -> str | None:
        """What the kernel was started with; None where it does not tell."""
        if self._command_line is None:
            self._command_line = self._read_command_line()
        return self._command_line

    def _read_command_line(self) -> str | None:
        address = self.kernel.profile.symbol("saved_command_line")
        if address is not None:
            try:
                word = self.kernel.profile.word
                memory = self.kernel.found.memory
                at = int.from_bytes(memory.read(address, word), "little")
                return decoded(memory.cstring(at, 2 * COMMAND_LINE_LIMIT)).rstrip("\n")
            except FaultError:
                pass
        return self._logged_command_line()

    def _logged_command_line(self) -> str | None:
        """As the log has it, if that still goes back to the start."""
        found = self._in_log(LOGGED)
        return None if found is None or len(found) > LOG_LINE else found.removeprefix(LOGGED)

    def _in_log(self, start: str) -> str | None:
        kernel = self.kernel
        try:
            log = PrintkLog(kernel.found.memory, kernel.found.vmcoreinfo, kernel.profile.word)
            return next((record.text for record in log.records() if record.text.startswith(start)), None)
        except (EngineError, FaultError):
            return None

    def banner(self) -> str | None:
        """The line of /proc/version; None where it is not found."""
        if self._banner is None:
            self._banner = self._read_banner()
        return self._banner

    def _read_banner(self) -> str | None:
        address, memory = self.kernel.profile.symbol("linux_banner"), self.kernel.found.memory
        if address is not None:
            try:
                return decoded(memory.cstring(address, _BANNER_LIMIT)).rstrip("\n")
            except FaultError:
                return None
        names, image = self.names(), self.kernel.found.image
        whole = memory.read_padded(image.start, image.size)
        mark = _BANNER + names.get("release", "?").encode() + b" ("
        at = whole.find(mark)
        while at >= 0:
            text = decoded(whole[at : at + _BANNER_LIMIT].partition(b"\0")[0])
            if text.endswith(names.get("version", "?") + "\n"):
                return text.rstrip("\n")
            at = whole.find(mark, at + 1)
        return None
