"""C that is compiled on first use, where there is a compiler, and kept in the user's cache directory.

Nothing is ever loaded that another user could have written. What is loaded this way only makes things faster: whoever
asks for it has to do without it as well.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import os
from collections.abc import Callable, Sequence
from typing import TypeVar

from engine.cache_folder import cache_folders, open_own, private, put
from engine.records import dataclass

log = logging.getLogger(__name__)

COMPILERS = ("cc", "gcc", "clang")
COMPILE_LIMIT = 30.0
"""Seconds; it takes half of one."""
_turns = itertools.count(1)
_Library = TypeVar("_Library")


class NotCompiledError(Exception):
    """The library cannot be had; the text says why."""


@dataclass(frozen=True)
class Source:
    """A library in one C file."""

    name: str
    text: bytes
    options: Sequence[str] = ("-O2",)

    @property
    def file_name(self) -> str:
        """Its name in the cache: another one for another text, machine or set of options."""
        parts = [self.text, os.uname().machine.encode(), " ".join(self.options).encode()]
        digest = hashlib.sha256(b"\0".join(parts)).hexdigest()
        return f"{self.name}-{digest[:32]}.so"


def load(source: Source, open_library: Callable[[str], _Library]) -> _Library:
    """What `open_library` makes of the path of the compiled library.

    Raises NotCompiledError where there is no compiler, or no place that is this user's own and lets files be executed.
    """
    reasons = []
    for folder in cache_folders():
        try:
            with private(folder) as number:
                return _kept(number, source, open_library)
        except (NotCompiledError, OSError, AttributeError) as error:
            reasons.append(f"{folder}: {error}")
    raise NotCompiledError("; ".join(reasons) or "this user has no home directory")


def _compiled(source: Source) -> bytes:
    """The library, made anew."""
    import shutil  # with the others 10 ms to import, and only needed the first time
    import subprocess
    import tempfile

    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        raise NotCompiledError(f"there is no C compiler ({', '.join(COMPILERS)}); install the package gcc")
    with tempfile.TemporaryDirectory(prefix="cloudfs-") as building:
        output = os.path.join(building, "library.so")
        command = [compiler, "-shared", "-fPIC", "-fvisibility=hidden", *source.options, "-x", "c", "-", "-o", output]
        try:
            done = subprocess.run(
                command, input=source.text, capture_output=True, timeout=COMPILE_LIMIT, check=False,
                env={**os.environ, "LC_ALL": "C"},
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise NotCompiledError(f"{compiler} took longer than {COMPILE_LIMIT:.0f} s") from None
        if done.returncode:
            said = done.stderr.decode(errors="replace").split("\n", 1)[0]
            raise NotCompiledError(f"{compiler} could not compile it: {said}")
        with open(output, "rb") as file:
            return file.read()


def _kept(folder: int, source: Source, open_library: Callable[[str], _Library]) -> _Library:
    """The library of a cache directory; compiled, and put there in one step, where it is missing."""
    name = source.file_name
    try:
        return _checked(folder, name, open_library)
    except FileNotFoundError:
        pass
    except (NotCompiledError, OSError, AttributeError) as error:
        log.warning("%s is compiled anew: %s", name, error)
    put(folder, name, _compiled(source), 0o500)
    return _checked(folder, name, open_library)


def _checked(folder: int, name: str, open_library: Callable[[str], _Library]) -> _Library:
    """Load a file that is a plain one, ours, and writable by no other: by its descriptor, so that it stays the same."""
    number = open_own(folder, name)
    try:
        # The C library knows what it has loaded by name: none may be had twice, and numbers of descriptors are.
        return open_library(f"/proc/{os.getpid()}/fd/{'./' * next(_turns)}{number}")
    finally:
        os.close(number)
