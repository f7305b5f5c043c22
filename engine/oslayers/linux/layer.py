"""The OS layer `linux`: a Linux kernel in physical memory, understood by what it carries of itself.

What a listing of processes does not need is imported by the functions that need it: that is half of the layer.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Self

from engine.errors import (
    EngineError,
    FaultError,
    InvalidArgumentError,
    NotFoundError,
    NotRecognisedError,
    ProcessExitedError,
    TargetGoneError,
)
from engine.formats.vmcoreinfo import Vmcoreinfo, find_vmcoreinfo
from engine.machine_states import ENDED, RESTARTING, SENTENCES
from engine.memory import Memory
from engine.memory_map import MappedMemory
from engine.middleware import truth
from engine.numbers import parse_number
from engine.oslayer import (
    Base,
    C,
    Containers,
    KernelConfig,
    KernelLog,
    Module,
    Options,
    OsLayer,
    Process,
    Sockets,
    Symbols,
    SystemFiles,
)
from engine.oslayers.linux.description import with_description
from engine.oslayers.linux.finding import Found, described
from engine.oslayers.linux.guided import guided_texts
from engine.oslayers.linux.kernel import Kernel
from engine.oslayers.linux.kernel_space import kernel_space
from engine.oslayers.linux.listing import NUMBERS, Listed, PidNumbers, find_process, list_processes, pid_numbers
from engine.oslayers.linux.process import LinuxProcess
from engine.oslayers.linux.profile import Profile, begin_profile, finish_profile, read_profile
from engine.oslayers.linux.ram import by_resources, layout_note, layouts
from engine.oslayers.linux.resources import system_ram
from engine.oslayers.linux.running import Running, Watch, identity_of, is_up, latest, marks_of
from engine.oslayers.linux.searching import Recognised, Remembered, find_kernel, runs
from engine.oslayers.linux.system import System
from engine.oslayers.linux.tasks import TaskRecord, Tasks
from engine.types import Extent, OsInfo

if TYPE_CHECKING:
    from engine.oslayers.linux.configuration import LinuxConfig
    from engine.oslayers.linux.given import Given

_NEEDED: dict[type, tuple[str, ...]] = {
    Sockets: ("file", "socket", "sock"),
    Containers: ("css_set", "cgroup", "kernfs_node"),
    SystemFiles: ("task_struct",),
}
"""What has to be known of a kernel for a capability."""


RESTARTS = 3
"""How often a list is begun anew when the machine was restarted meanwhile."""
STANDS = 3.0
"""Seconds that a clock stands before it is told; an idle kernel may sleep for less."""
LIST_SHARE = 4
"""For one PID that has no number a list is not made again for so many times what it took."""
START_PATIENCE = 120.0
"""Seconds that a kernel may take to start before one is taken that tells less of itself than the last."""


class LinuxLayer(OsLayer):
    """A Linux kernel: its types from BTF and its symbols from kallsyms, both read from its own memory."""

    kind = "linux"
    summary = "Linux from its own memory: no symbols, no profile to be given"
    options_help = MappingProxyType({
        "cache": "no: neither use nor keep what was read of this kernel build before",
        "dtb": "the physical address of the kernel's top page table, where you know it; never needed",
        "kaslr": "how far KASLR has moved the kernel: tells which of several is meant; never needed",
        "symbols": "a vmlinux, BTF, System.map or Volatility ISF of this kernel, where its own description is gone",
    })  # fmt: skip

    def __init__(self, base: Base, kernel: Kernel | Recognised, options: Options = MappingProxyType({})) -> None:
        self._base = base
        self._options = options
        self._boots = 0
        self._missing_since = 0.0
        self._watch: Watch | None = None
        self._use(kernel)
        if isinstance(kernel, Kernel) and base.live:
            running = Running(kernel, self.system.clock, base.ask)
            self._watch = Watch(running, self._renew)
            self._watched(kernel)

    def _use(self, kernel: Kernel | Recognised) -> None:
        self._kernel = kernel
        self._tasks: Tasks | None = None
        self._numbers: PidNumbers | None = None
        self._listing: Mapping[int, Listed] | None = None
        self._listed: tuple[float, Mapping[int, Listed]] = (0.0, {})
        """Over live memory the last list, and from when on another may be made for one PID."""
        self._config: LinuxConfig | None = None
        self._system: System | None = None
        if isinstance(kernel, Kernel):
            self._system = System(kernel)
            kernel.boot_time = self._system.boot_time

    @classmethod
    def open(cls, base: Base, options: Options) -> Self:
        """Find the kernel and read what it says of itself. Raises NotRecognisedError with what was missing."""
        if base.memory is None:
            raise InvalidArgumentError("linux stands on a connector: name one with -c")
        found = _understood(base, base.memory, options, registers=base.hints.registers)
        return cls(base, found, options)

    def _watched(self, kernel: Kernel) -> None:
        """Let those who read without listing look after the kernel, too."""
        watch = self._watch
        if watch is not None:
            kernel.look, kernel.look_now = watch.look_seldom, watch.look
            kernel.is_look_due, kernel.marks = (lambda: watch.is_due), marks_of(kernel)

    def _renew(self, gone: bool) -> Running | None:
        """Recognise the kernel anew, and take it where it is another one: for `Watch`.

        Raises NotRecognisedError where the known one is `gone`, and there is none yet.
        """
        old, memory = self.kernel, self._base.memory
        assert memory is not None
        options = {key: value for key, value in self._options.items() if key not in ("dtb", "kaslr")}
        hints = self._base.ask()
        if hints is None and self._base.ask_hints is not None:
            hints = self._base.ask_hints()
        registers = () if hints is None else hints.registers
        self._missing_since = self._missing_since or time.monotonic()
        patient = time.monotonic() - self._missing_since < START_PATIENCE
        try:
            told = patient and not old.found.unaided
            kernel = _understood(self._base, memory, options, told=told, registers=registers)
            if isinstance(kernel, Recognised):
                raise NotRecognisedError(f"Linux {kernel.release} for {kernel.machine} is recognised, and no more")
            if not gone and identity_of(kernel) == identity_of(old):
                self._missing_since = 0.0
                return None
            gone = True
            if patient and not is_up(kernel):
                raise NotRecognisedError(f"Linux {kernel.found.release} has only begun to start")
        except (NotRecognisedError, FaultError) as error:
            if not gone:
                self._missing_since = 0.0
                return None
            old.replaced = True
            raise NotRecognisedError(f"the machine is being restarted: {error}") from None
        old.replaced = True
        self._missing_since = 0.0
        self._use(kernel)
        self._boots += 1
        kernel.boot = self._boots
        self._watched(kernel)
        return Running(kernel, self.system.clock, self._base.ask)

    def _look(self) -> None:
        """Look after the kernel, where it may be restarted; what it comes to is said by whatever is read next."""
        if self._watch is not None:
            with contextlib.suppress(EngineError):
                self._watch.look_seldom()

    @property
    def kernel(self) -> Kernel:
        """The kernel. Raises NotRecognisedError where its architecture is one that cannot be read yet."""
        if isinstance(self._kernel, Kernel):
            return self._kernel
        raise NotRecognisedError(
            f"Linux {self._kernel.release} for {self._kernel.machine} is recognised, and no more: the page tables of"
            " this architecture are not walked yet"
        )

    @property
    def system(self) -> System:
        """What the kernel says of the machine as a whole. Raises as `kernel`."""
        return self._system or System(self.kernel)

    @property
    def tasks(self) -> Tasks:
        """Reads tasks. Raises NotRecognisedError where this kernel does not carry what that needs."""
        if self._tasks is None:
            try:
                objects = self.kernel.objects()
                self._tasks = Tasks(self.kernel.profile, objects)
                self._numbers = pid_numbers(self._tasks, objects)
            except NotFoundError as error:
                raise NotRecognisedError(
                    f"the processes of this Linux {self.kernel.found.release} cannot be listed: {error}"
                ) from None
        return self._tasks

    @property
    def info(self) -> OsInfo:
        """See `OsLayer.info`."""
        if isinstance(self._kernel, Recognised):
            return self._recognised(self._kernel)
        if self._watch is None:
            return self._told()
        try:
            self._watch.look_seldom()
            return self._told()
        except NotRecognisedError as error:
            return self._nothing(RESTARTING, str(error))
        except TargetGoneError as error:
            return self._nothing(RESTARTING if self.kernel.replaced else ENDED, str(error))

    def _told(self) -> OsInfo:
        found, clock = self.kernel.found, self.system.clock()
        return OsInfo(
            self.kind,
            version=found.release,
            architecture=found.machine,
            page_size=1 << found.candidate.spec.page_bits,
            kernel_base=found.vmcoreinfo.symbol("_stext"),
            dtb=found.candidate.dtb,
            boot_time=None if clock is None else clock.boot / 1e9,
            time=None if clock is None else clock.now / 1e9,
            uptime=None if clock is None else clock.uptime / 1e9,
            hostname=self.system.names().get("nodename"),
            command_line=self.system.command_line(),
            live=self._base.live,
            writable=self._base.writable,
            state=None if self._watch is None else self._watch.state,
            skipped=self._skipped(),
            retried=dict(self.kernel.retried),
            listed=dict(self.kernel.listed),
            notes=(*self._layout(found), *self._damage(found), *self._restarts(), *self.kernel.profile.notes),
        )

    def _nothing(self, state: str, note: str) -> OsInfo:
        """What is to be said where there is no kernel."""
        return OsInfo(self.kind, live=True, writable=self._base.writable, state=state, notes=(note,))

    def _skipped(self) -> dict[str, int]:
        damaged = self.kernel.found.memory.damaged_tables
        return dict(self.kernel.skipped) | ({"damaged page table": damaged} if damaged else {})

    def _damage(self, found: Found) -> Iterator[str]:
        if damaged := found.memory.damaged_tables:
            are = "page tables of the kernel are" if damaged > 1 else "page table of the kernel is"
            yield f"{damaged} {are} damaged: its own objects behind them are read by its linear maps"

    def _layout(self, found: Found) -> Iterator[str]:
        if self._base.memory is not None and (note := layout_note(self._base.memory, found.physical)) is not None:
            yield note

    def _restarts(self) -> Iterator[str]:
        if self._boots:
            times = "once" if self._boots == 1 else f"{self._boots} times"
            yield f"the machine was restarted since it was opened, {times}: its kernel was recognised anew"
        if self._watch is None:
            return
        stands, state = self._watch.stands, self._watch.state
        if state is not None and state in SENTENCES:
            yield f"the machine does not run: {SENTENCES[state]}"
        elif stands > STANDS and state is None:
            yield f"its clock stands for {stands:.0f} s: it is paused, or being restarted"
        elif stands > STANDS:
            yield f"its clock stands for {stands:.0f} s, though a processor is in its kernel: it idles, or hangs"

    def _recognised(self, found: Recognised) -> OsInfo:
        text = found.vmcoreinfo
        size = text.number("PAGESIZE") if text is not None else None
        return OsInfo(
            self.kind, version=found.release, architecture=found.machine, page_size=size, live=self._base.live,
            writable=self._base.writable,
            notes=("recognised, and no more: the page tables of this architecture are not walked yet",),
        )  # fmt: skip

    @property
    def physical_memory(self) -> Memory | None:
        """See `OsLayer.physical_memory`: in the layout that the kernel knows."""
        return self._base.memory if isinstance(self._kernel, Recognised) else self.kernel.found.physical

    @property
    def kernel_memory(self) -> Memory | None:
        """See `OsLayer.kernel_memory`: of a live machine it ends with the kernel, and raises TargetGoneError then."""
        self._look()
        return None if isinstance(self._kernel, Recognised) else kernel_space(self.kernel)

    @property
    def tells_modules(self) -> bool:
        """See `OsLayer.tells_modules`. Where only shape could tell, that takes a search: it is taken to find them."""
        types = self._kernel.profile.types if isinstance(self._kernel, Kernel) else None
        return types is not None and (not types.whole or types.struct("module") is not None)

    def modules(self) -> Iterator[Module]:
        """See `OsLayer.modules`: those in /proc/modules, the youngest first; none where the kernel does not tell.

        Raises NotRecognisedError while there is no kernel.
        """
        from engine.oslayers.linux.modules import kernel_modules

        if self._watch is not None:
            self._watch.look_seldom()
        try:
            yield from kernel_modules(self.kernel)
        except NotFoundError:
            self.kernel.skipped["module list"] += 1

    def capability(self, kind: type[C]) -> C | None:
        """See `Capable.capability`."""
        found: object = None
        if isinstance(self._kernel, Recognised):
            return super().capability(kind)
        self._look()
        if issubclass(KernelLog, kind):
            from engine.oslayers.linux.log import PrintkLog

            try:
                found = PrintkLog(
                    kernel_space(self.kernel, mended=True), self.kernel.found.vmcoreinfo, self.kernel.profile.word
                )
            except NotFoundError:
                return None
        elif issubclass(Symbols, kind) and self.kernel.profile.kallsyms is not None:
            from engine.oslayers.linux.symbols import LinuxSymbols

            found = LinuxSymbols(self.kernel)
        elif issubclass(KernelConfig, kind):
            found = self._configuration()
        elif kind in _NEEDED and self.kernel.knows(*_NEEDED[kind]):
            try:
                found = self._of_processes(kind)
            except (NotRecognisedError, NotFoundError):
                return None
        return found if isinstance(found, kind) else super().capability(kind)

    def _of_processes(self, kind: type[C]) -> object:
        """What needs the list of processes. Raises NotRecognisedError where there is none."""

        def records() -> list[TaskRecord]:
            return [one.record for one in self._list().values()]

        if issubclass(Sockets, kind):
            from engine.oslayers.linux.sockets import LinuxSockets

            return LinuxSockets(self.kernel, self.tasks, records)
        if issubclass(Containers, kind):
            from engine.oslayers.linux.cgroups import LinuxContainers

            return LinuxContainers(self.kernel, self.tasks, records)
        from engine.oslayers.linux.sysfiles import LinuxSystemFiles

        return LinuxSystemFiles(self.kernel, self.system, self.tasks, self._thread_count)

    def _thread_count(self) -> int:
        return sum(one.record.threads or 1 for one in self._list().values())

    def _configuration(self) -> LinuxConfig | None:
        """None where this kernel carries none; looked for once."""
        if self._config is None:
            from engine.oslayers.linux.configuration import LinuxConfig

            self._config = LinuxConfig(self.kernel)
        return self._config if self._config.is_there else None

    def pids(self) -> list[int]:
        """See `OsLayer.pids`: without the idle task, which has no number that a user sees."""
        return sorted(self._list())

    def process(self, pid: int) -> Process:
        """See `OsLayer.process`."""
        found = self._find(pid)
        if found is None:
            raise ProcessExitedError(pid)
        return LinuxProcess(self.kernel, self.tasks, found.record, found.sources)

    def _find(self, pid: int) -> Listed | None:
        """One process; where nothing may be kept it is looked for alone, and all are listed only if that fails."""
        if self._watch is not None:
            self._watch.look_seldom()
        tasks = self.tasks
        if self._base.live and self._numbers is not None:
            found = find_process(tasks, self.kernel.objects(), self._numbers, pid)
            if found is not None:
                return found
            again, listing = self._listed
            known = listing.get(pid)
            if known is None and time.monotonic() < again:
                return None
            if known is not None and NUMBERS in known.sources:
                return None  # it had a number, and has ended since
        return self._list().get(pid)

    def processes(self) -> Iterator[Process]:
        """See `OsLayer.processes`: all as of one listing."""
        yield from self.listing().values()

    def listing(self) -> Mapping[int, Process]:
        """See `OsLayer.listing`: the list of tasks tells all that one begins with."""
        return {
            pid: LinuxProcess(self.kernel, self.tasks, found.record, found.sources)
            for pid, found in sorted(self._list().items())
        }

    def _list(self) -> Mapping[int, Listed]:
        live = self.kernel.live
        if self._listing is not None and not live:
            return self._listing
        if live and self._watch is not None:
            return self._list_watched(self._watch)
        self._listing = list_processes(self.tasks, self.kernel.objects, self._numbers, live=live)
        return self._listing

    def _list_watched(self, watch: Watch) -> Mapping[int, Listed]:
        """A list that was begun and ended under one kernel. Raises NotRecognisedError while there is none."""
        for attempt in range(RESTARTS):
            if attempt:  # it is not the kernel that it was, just now
                watch.look()
            else:
                watch.look_seldom()
            began = time.monotonic()
            tasks, kernel = self.tasks, self.kernel
            with contextlib.suppress(TargetGoneError):
                listing = list_processes(tasks, kernel.objects, self._numbers, live=True)
                if watch.is_same() and not kernel.replaced:
                    now = time.monotonic()
                    self._listed = now + LIST_SHARE * (now - began), listing
                    kernel.listed["process"] += len(listing)
                    return listing
        raise NotRecognisedError("the machine is being restarted: its kernel changed again and again as it was read")

    def close(self) -> None:
        """See `OsLayer.close`: nothing is held but memory."""


def _understood(
    base: Base,
    memory: Memory,
    options: Options,
    *,
    told: bool = False,
    registers: Sequence[Mapping[str, int]] = (),
) -> Kernel | Recognised:
    """Find the kernel and read what it says of itself. Raises NotRecognisedError with what was missing.

    With `told` only a kernel is taken that VMCOREINFO tells of: the others take seconds to be sought.
    """
    given = _given(options.get("symbols"))
    dtb, slide = (parse_number(options[key], f"{key}=") if key in options else None for key in ("dtb", "kaslr"))
    cache = truth("cache", options.get("cache", "yes"))
    texts = Remembered(_texts(base, memory, registers))
    if told and next(described(memory, texts, keep=False), None) is None:
        raise NotRecognisedError("no kernel is in its memory yet")
    found = find_kernel(
        memory, texts, keep=not base.live, dtb=dtb, slide=slide, registers=registers,
        architecture=base.hints.architecture,
    )  # fmt: skip
    if isinstance(found, Recognised):
        return found
    if base.live and dtb is None and slide is None and not runs(found, registers):
        proved = described(memory, texts, keep=False)
        found = latest(found, proved, lambda one: Kernel(one, read_profile(one, cache=cache), base))
    profile = _told(begin_profile(found, cache=cache, given=given))
    truly, doubt = with_true_layout(memory, profile)
    if truly is not found:  # some of what was read, or of the tables that lead there, may lie elsewhere
        profile = _told(begin_profile(truly, cache=cache, given=given))
    profile = _told(finish_profile(profile, cache=cache))
    profile.notes += [doubt] if doubt else []
    profile.found = with_description(profile)
    if profile.types is None:
        from engine.oslayers.linux.shape import shapes_of

        profile.types = shapes_of(profile)
    return Kernel(profile.found, profile, base)


def _told(profile: Profile) -> Profile:
    """The same, its kernel's memory told what it says of linear maps."""
    profile.found.memory.learn(profile.symbol, profile.types)
    return profile


def _texts(base: Base, memory: Memory, registers: Sequence[Mapping[str, int]]) -> Iterator[Vmcoreinfo]:
    """The texts that may describe the kernel; all of memory is only searched where what is at hand proves nothing."""
    yield from _hinted(base)
    yield from guided_texts(memory, base.hints.architecture, registers)
    yield from find_vmcoreinfo(memory)


def _given(path: str | None) -> Given | None:
    if not path:
        return None
    from engine.oslayers.linux.given import read_given

    return read_given(path)


def _hinted(base: Base) -> Iterator[Vmcoreinfo]:
    """The text that a dump carries beside its memory."""
    if base.hints.vmcoreinfo:
        try:
            yield Vmcoreinfo.parse(base.hints.vmcoreinfo)
        except NotRecognisedError:
            return


def with_true_layout(image: Memory, profile: Profile) -> tuple[Found, str | None]:
    """The kernel in the layout of RAM that its own `iomem_resource` tells, where that is another than was guessed.

    And a sentence on what is to be doubted of it. The list lies in memory itself, perhaps in the very part that a wrong
    guess misplaces: so each layout in which the kernel proves itself is asked, and the first is right that can read it.
    """
    found, root = profile.found, profile.symbol("iomem_resource")
    if root is None:
        return found, "the layout of RAM is a guess: iomem_resource is not known"
    for physical in (found.physical, *(other for other, _ in layouts(image))):
        ram = system_ram(found.memory.over(physical), root, profile.word)
        if not ram:
            continue
        try:
            ranges = by_resources(image, ram)
            right = physical if ranges is None else MappedMemory(image, ranges)
            if ranges is None or system_ram(found.memory.over(right), root, profile.word) == ram:
                return _moved(found, right), _cut(ram, right)
        except (FaultError, EngineError):
            continue
    from engine.oslayers.linux.concatenated import ram_by_content

    for ram in ram_by_content(image, found.memory, root, profile.word):
        ranges = by_resources(image, ram)
        if ranges is not None:
            right = MappedMemory(image, ranges)
            if system_ram(found.memory.over(right), root, profile.word) == ram:
                return _moved(found, right), None
    return found, "the layout of RAM is a guess: iomem_resource cannot be read, as where an image was cut short"


def _cut(ram: Sequence[Extent], physical: Memory) -> str | None:
    """A sentence where the kernel has more RAM than there is memory."""
    if ram[-1].stop <= physical.size:
        return None
    ends = f"the kernel has RAM up to {ram[-1].stop:#x}, this memory ends at {physical.size:#x}"
    return f"{ends}: it may be cut short"


def _moved(found: Found, physical: Memory) -> Found:
    if physical is found.physical:
        return found
    return replace(found, physical=physical, memory=found.memory.over(physical))
