"""Containers by their cgroup: which container a cgroup's path says that its processes are in.

Engines name the cgroup of a container after its identifier, whether they do it themselves (cgroupfs) or by systemd:

    /docker/ID                                   Docker, cgroupfs
    /system.slice/docker-ID.scope                Docker, systemd
    /machine.slice/libpod-ID.scope               Podman
    /kubepods/burstable/podUID/ID                Kubernetes, cgroupfs
    /kubepods.slice/…/cri-containerd-ID.scope    Kubernetes with containerd; crio-ID.scope with CRI-O
    /lxc/NAME, /lxc.payload.NAME                 LXC, LXD, Incus
    /machine.slice/systemd-nspawn@NAME.service   systemd-nspawn; machine-NAME.scope of any machined machine
    /garden/ID, /buildkit/ID, /actions_job/ID    others that hold to an identifier of their own

Sources: the programs' own documentation, and systemd's CGROUP_DELEGATION.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

_HEXADECIMAL = r"[0-9a-f]{64}"
_PATTERNS = tuple(
    re.compile(pattern)
    for pattern in (
        # NAME-ID.scope: what systemd makes for an engine. The monitors of containers stand beside them, not in them.
        rf"(?!libpod-conmon-|crio-conmon-)[A-Za-z0-9._-]+?-(?P<id>{_HEXADECIMAL})\.scope",
        rf"(?P<id>{_HEXADECIMAL})",
        r"lxc\.payload\.(?P<id>[^/]+)",
        r"systemd-nspawn@(?P<id>[^/]+)\.service",
        r"machine-(?P<id>[^/]+)\.scope",
    )
)
_BELOW = {"lxc": re.compile(r"[^/]+"), "lxc.payload": re.compile(r"[^/]+"), "garden": re.compile(r"[0-9a-z-]{11,64}")}
"""Directory → what a directory in it has to be called to be a container."""
_ESCAPE = re.compile(r"\\x([0-9a-f]{2})")


def container_of(path: str) -> str | None:
    """The identifier of the container, or its name; of nested ones the innermost's. None: of no container.

    >>> container_of("/system.slice/docker-" + 64 * "a" + ".scope") == 64 * "a"
    True
    >>> container_of("/user.slice/user-1000.slice") is None
    True
    """
    parts = [part for part in path.split("/") if part]
    for index in range(len(parts) - 1, -1, -1):
        part = parts[index]
        for pattern in _PATTERNS:
            found = pattern.fullmatch(part)
            if found is not None:
                return _ESCAPE.sub(lambda match: chr(int(match[1], 16)), found["id"])
        inside = _BELOW.get(parts[index - 1]) if index else None
        if inside is not None and inside.fullmatch(part):
            return part
    return None


def container_among(paths: Iterable[str]) -> str | None:
    """The container that the first of a process's cgroups tells of that tells of one."""
    return next((found for path in paths if (found := container_of(path)) is not None), None)


def main_path(paths: Sequence[str]) -> str | None:
    """The one path that says most of a process: the first, unless that is the root and it stands deeper in another.

    `paths` as `cgroup_paths` orders them; None where there are none.
    """
    if not paths:
        return None
    return paths[0] if paths[0] != "/" else max(paths, key=lambda path: (path != "/", path.count("/")))


def cgroup_paths(text: str) -> list[str]:
    """The paths of a /proc/PID/cgroup: the unified hierarchy's first, then those of hierarchies that have a name."""
    rows = [line.removesuffix(" (deleted)").split(":", 2) for line in text.split("\n")]
    rows = sorted((row for row in rows if len(row) == 3 and row[0].isdigit()), key=_rank)
    return [row[2] for row in rows]


def _rank(row: Sequence[str]) -> tuple[bool, bool, int]:
    number = int(row[0])
    return number != 0, not row[1].startswith("name="), number
