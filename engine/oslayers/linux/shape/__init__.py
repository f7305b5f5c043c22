"""Structures by their shape: what a kernel without types (BTF) tells of its tasks all the same.

    types = shapes_of(profile)             a TypeSource with few members, or None
    types.require("task_struct")["pid"]

All tasks hang in one ring, which begins with `init_task`, an exported symbol. Laid side by side, their bytes are
columns, and a member is known by what its column proves: see the docstrings of `ring`, `tasks`, `threads`, `cred` and
`spaces`, one proof each. A member that is not proved, or could be two, is absent: it is never guessed, and no offset of
any build is known beforehand. What can then be told of a process is in `engine.oslayers.linux` the same code as with
BTF; what cannot is None there.

What this room does not do: VMAs, files, sockets. Structures laid out at random (RANDSTRUCT) lose the members that are
known by standing side by side.
"""

from __future__ import annotations

from engine.errors import EngineError
from engine.oslayers.linux.profile import Profile
from engine.oslayers.linux.shape.finding import find_shapes
from engine.oslayers.linux.shape.modules import find_modules
from engine.oslayers.linux.shape.types import Shapes

TOLD = {
    "parents": ("task_struct", "real_parent"),
    "users": ("cred", "uid"),
    "threads": ("task_struct", "thread_node"),
    "states": ("task_struct", "__state"),
    "start times": ("task_struct", "start_boottime"),
    "address spaces": ("mm_struct", "pgd"),
}
"""What users know members by, for the note of what is missing."""


def shapes_of(profile: Profile) -> Shapes | None:
    """What tasks prove of their structures; None, and a note that says why, where they prove nothing."""
    init_task = profile.symbol("init_task")
    if init_task is None:
        profile.notes.append("processes cannot be found by their shape either: init_task is not known")
        return None
    try:
        shapes = find_shapes(profile.found, init_task)
    except EngineError as error:
        profile.notes.append(f"processes cannot be found by their shape either: {error}")
        return None
    if shapes is None:
        profile.notes.append("processes cannot be found by their shape either: no ring of tasks begins with init_task")
        return None
    told = shapes
    told.later("module", lambda: find_modules(profile, told))
    lost = [word for word, (struct, member) in TOLD.items() if not _has(shapes, struct, member)]
    missing = ", ".join([*lost, "open files, sockets, namespaces"])
    profile.notes.append(
        f"read by the shape of its structures, mappings from page tables; not known are {missing}"
    )
    return shapes


def _has(shapes: Shapes, struct: str, member: str) -> bool:
    layout = shapes.struct(struct)
    return layout is not None and member in layout
