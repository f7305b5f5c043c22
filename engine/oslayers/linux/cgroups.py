"""Control groups: the lines of /proc/PID/cgroup, and the container that they tell of.

Sources: Linux include/linux/{cgroup-defs,kernfs}.h, kernel/cgroup/cgroup.c (proc_cgroup_show); releases 5.10 to 7.x.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from engine.containers import cgroup_paths, container_among
from engine.errors import FaultError, NotFoundError
from engine.oslayer import Containers
from engine.oslayers.linux.kernel import Kernel
from engine.oslayers.linux.objects import Objects, decoded
from engine.oslayers.linux.profile import Profile
from engine.oslayers.linux.tasks import TaskRecord, Tasks
from engine.oslayers.linux.walks import settled_ring
from engine.records import dataclass

DEPTH_LIMIT = 256
HIERARCHY_LIMIT = 64
NAME_LIMIT = 256
CSS_ONLINE = 2
"""include/linux/cgroup-defs.h."""
PF_EXITING = 0x4


@dataclass(frozen=True, slots=True)
class Membership:
    """The cgroup of a set of tasks in one hierarchy."""

    hierarchy: int
    """0 is the unified one (cgroup v2)."""
    controllers: tuple[str, ...]
    name: str
    """Of a hierarchy that has one, as systemd's."""
    path: str
    """From the root of the hierarchy on."""
    deleted: bool

    def line(self) -> str:
        """Its line of /proc/PID/cgroup."""
        names = (*self.controllers, f"name={self.name}") if self.name else self.controllers
        return f"{self.hierarchy}:{','.join(names)}:{self.path}{' (deleted)' if self.deleted else ''}\n"


class Cgroups:
    """Reads the cgroups of tasks in one operation; many tasks share one set."""

    def __init__(self, objects: Objects, tasks: Tasks, profile: Profile) -> None:
        """Raises NotFoundError where the kernel's types lack what this needs (built without cgroups)."""
        self.objects = objects
        self.member = tasks.task["cgroups"]
        self.set, self.group = objects.struct("css_set"), objects.struct("cgroup")
        self.top, self.link = objects.struct("cgroup_root"), objects.struct("cgrp_cset_link")
        self.state, self.kind = objects.struct("cgroup_subsys_state"), objects.struct("cgroup_subsys")
        node = objects.struct("kernfs_node")
        self.node_name, self.node_parent = node["name"], node.first("__parent", "parent")
        self._visible = self._is_visible(profile)
        self._known: dict[int, tuple[Membership, ...]] = {}

    def _is_visible(self, profile: Profile) -> bool:
        """Whether the unified hierarchy was ever mounted; taken for so where the kernel does not tell."""
        address = profile.symbol("cgrp_dfl_visible")
        try:
            return address is None or bool(self.objects.memory.u8(address))
        except FaultError:
            return True

    def of(self, task: int, flags: int | None = None) -> tuple[Membership, ...]:
        """The cgroups of a task, the youngest hierarchy first. Raises FaultError.

        One that is ending is in none any more, but in the unified hierarchy.
        """
        address = self.objects.pointer(task + self.member.offset)
        found = self._known.get(address)
        if found is None:
            found = self._known[address] = tuple(sorted(self._read(address), key=lambda one: -one.hierarchy))
        if (flags or 0) & PF_EXITING:
            return tuple(replace(one, path="/") if one.hierarchy else one for one in found)
        return found

    def _read(self, address: int) -> list[Membership]:
        objects = self.objects
        unified = objects.pointer(address + self.set["dfl_cgrp"].offset)
        head, link = address + self.set["cgrp_links"].offset, self.link["cgrp_link"]
        links = settled_ring(objects, head, link, HIERARCHY_LIMIT, kind="cgroup list")[0]
        groups = dict.fromkeys([objects.pointer(one + self.link["cgrp"].offset) for one in links])
        groups.setdefault(unified)
        controllers = self._controllers(address) if len(groups) > 1 else {}
        found = []
        for group in groups:
            if group == unified and not self._visible:
                continue
            root = objects.pointer(group + self.group["root"].offset)
            online = objects.value(group, self.group["self.flags"]) & CSS_ONLINE
            found.append(Membership(
                objects.value(root, self.top["hierarchy_id"]), () if group == unified else controllers.get(root, ()),
                objects.text_in(root, self.top["name"]), self._path(group), group == unified and not online,
            ))  # fmt: skip
        return found

    def _controllers(self, address: int) -> dict[int, tuple[str, ...]]:
        """Root of a hierarchy → the controllers in it, by the names of /proc/cgroups."""
        objects, states = self.objects, self.set["subsys"]
        found: dict[int, tuple[str, ...]] = {}
        for index in range(states.type.count):
            state = objects.pointer(address + states.offset + index * objects.word)
            if not objects.is_pointer(state):
                continue
            kind, group = (objects.pointer(state + self.state[name].offset) for name in ("ss", "cgroup"))
            root = objects.pointer(group + self.group["root"].offset)
            name = objects.text(objects.pointer(kind + self.kind["legacy_name"].offset), NAME_LIMIT)
            found[root] = (*found.get(root, ()), name)
        return found

    def _path(self, group: int) -> str:
        objects, names = self.objects, []
        node = objects.pointer(group + self.group["kn"].offset)
        for _ in range(DEPTH_LIMIT):
            parent = objects.pointer(node + self.node_parent.offset)
            if not parent:
                break
            text = objects.pointer(node + self.node_name.offset)
            names.append(decoded(objects.memory.cstring(text, NAME_LIMIT)))
            node = parent
        return "".join("/" + name for name in reversed(names)) or "/"


def paths_of(memberships: tuple[Membership, ...]) -> list[str]:
    """The paths: the unified hierarchy's first, then those of hierarchies that have a name."""
    return cgroup_paths("".join(one.line() for one in memberships))


def cgroups_of(objects: Objects, tasks: Tasks, task: int, flags: int | None) -> tuple[Membership, ...] | None:
    """The cgroups of one task; None where they cannot be read."""
    try:
        return objects.once(Cgroups, lambda: Cgroups(objects.apart(), tasks, tasks.profile)).of(task, flags)
    except (FaultError, NotFoundError):
        return None


class LinuxContainers(Containers):
    """The containers of a kernel's processes."""

    def __init__(self, kernel: Kernel, tasks: Tasks, records: Callable[[], list[TaskRecord]]) -> None:
        self.kernel = kernel
        self.tasks = tasks
        self._records = records

    def containers(self) -> Mapping[str, tuple[int, ...]]:
        """See `Containers.containers`; a process whose cgroups cannot be read is counted."""
        objects = self.kernel.objects()
        found: dict[str, tuple[int, ...]] = {}
        try:
            reader = Cgroups(objects, self.tasks, self.tasks.profile)
        except NotFoundError:
            return {}
        for record in sorted(self._records(), key=lambda one: one.pid):
            try:
                container = container_among(paths_of(reader.of(record.address, record.flags)))
            except FaultError:
                objects.skipped["cgroup"] += 1
                continue
            if container is not None:
                found[container] = (*found.get(container, ()), record.pid)
        return found
