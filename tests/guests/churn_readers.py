"""A reader of processes that come and go, as a program of its own: it notes whatever is not as it must be.

    python churn_readers.py KIND FOLDER SECONDS SEED     prints what it found as JSON

KIND `walk` goes through all processes of FOLDER (`…/processes` of a mount), those first that it did not meet the last
time. `hold` keeps files and directories of processes open until these have ended and others have their PIDs, `stand`
works in the directory of a process until then. What was opened of one process may give that one's bytes, or ESRCH.
"""

from __future__ import annotations

import errno
import json
import os
import random
import struct
import sys
import time
from collections import Counter
from dataclasses import dataclass, field

STAMP, SIZE = 0x7E5700000000, 8192
"""Where a process has its stamp, and its bytes: churner.c."""
MARK, HEAD, FACTOR = 0x6C75666573746D70, 8, 0x9E3779B97F4A7C15
HELD = 48
"""Processes of which one reader keeps files open."""
BELIEVED = 2.0
"""Seconds after its end for which facts of a process may be told that were kept: a second, and time to be told."""
PATIENCE = 8.0
"""Seconds for which it is waited that the PID of one that has ended comes round."""
GONE = (errno.ENOENT, errno.ESRCH)


@dataclass(frozen=True)
class Stamp:
    """What a process says of itself."""

    pid: int
    start: int
    """In ticks, as in /proc/PID/stat."""
    life: int
    """Milliseconds; 0 of one that does not end."""
    number: int
    """Of all children; negative of those that do not end."""
    words: int
    """Where its arguments begin: somewhere else in each process (ASLR)."""


def stamped(data: bytes) -> Stamp | None:
    """The stamp, if it is there and whole: what stands behind its head, too, follows from its number."""
    mark, pid, start, life, number, at, check = struct.unpack_from("<4Qq2Q", data)
    if mark != MARK or check != pid ^ start ^ life ^ (number & (1 << 64) - 1) ^ at:
        return None
    words = len(data) // 8 - HEAD
    rest = struct.unpack_from(f"<{words}Q", data, HEAD * 8)
    first = (number + 1) * FACTOR + HEAD
    if any(word != (first + index) & (1 << 64) - 1 for index, word in enumerate(rest)):
        return None
    return Stamp(pid, start, life, number, at)


class WrongError(Exception):
    """Something was shown as what it is not."""


def read_file(name: str, folder: int) -> bytes:
    """A small file of a directory that is open."""
    descriptor = os.open(name, os.O_RDONLY, dir_fd=folder)
    try:
        return os.read(descriptor, 1 << 16)
    finally:
        os.close(descriptor)


class Held:
    """The directory and the memory of one process, opened by its PID. Raises OSError."""

    def __init__(self, processes: str, name: str) -> None:
        self.name = name
        self.stamp: Stamp | None = None
        self.ended = 0.0
        """When it was seen to have ended."""
        self.folder = os.open(f"{processes}/{name}", os.O_PATH | os.O_DIRECTORY)
        try:
            self.memory = os.open("mem", os.O_RDONLY, dir_fd=self.folder)
        except BaseException:
            os.close(self.folder)
            raise

    def read(self) -> Stamp | None:
        """Its stamp; None where it has none (yet). Raises WrongError, OSError."""
        data = os.pread(self.memory, SIZE, STAMP)
        if self.ended:
            raise WrongError(f"{self.name} had ended, and was read from then on: {data[:48].hex()}")
        found = stamped(data) if len(data) == SIZE else None
        if found is None:
            pid = struct.unpack_from("<Q", data, 8)[0] if len(data) >= 16 else 0
            if self.stamp is not None or pid not in (0, int(self.name)):
                raise WrongError(f"{self.name}, stamp {self.stamp}, has {len(data)} bytes {data[:48].hex()}")
            return None
        if found.pid != int(self.name) or self.stamp not in (None, found):
            raise WrongError(f"{self.name}, stamp {self.stamp}, has the stamp {found}")
        self.stamp = found
        return found

    def check_facts(self) -> None:
        """Its directory tells of the process that has the stamp. Raises WrongError, OSError."""
        until = time.monotonic() + BELIEVED
        while not self.are_facts_right():
            if time.monotonic() > until:
                raise WrongError(f"{self.name}, stamp {self.stamp}, has other arguments")
            time.sleep(0.1)

    def are_facts_right(self) -> bool:
        """Whether they are those of its program; not where they were kept from before it called exec.

        Raises WrongError where they are another's, OSError; ESRCH of one that has ended and was not asked how, too.
        """
        stamp = self.stamp
        assert stamp is not None
        numbers = read_file("stat", self.folder).decode("ascii", "replace").rpartition(")")[2].split()
        words = read_file("cmdline", self.folder)
        if numbers[19] != str(stamp.start):
            raise WrongError(f"{self.name}, stamp {stamp}, has the stat {numbers}")
        if numbers[0] in ("Z", "X") or not words:
            raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH))
        told = words.split(b"\0")[1:]
        return numbers[45] == str(stamp.words) and told == [b"%d" % stamp.life, b"%d" % stamp.number, b""]

    def check_ended(self, *, buried: bool) -> None:
        """Nothing is read of it any more, and all that is told is its own. Raises WrongError where that is not so.

        What is opened of one that is not buried, a zombie, has no memory.
        """
        bare = () if buried else (errno.EIO,)
        for ask, allowed in (
            (lambda: os.pread(self.memory, SIZE, STAMP), ()),
            (lambda: read_file("mem", self.folder), bare),
        ):
            try:
                told = ask()
            except OSError as error:
                if error.errno in (*GONE, *allowed):
                    continue
                raise WrongError(f"{self.name}, stamp {self.stamp}, has ended, and gives {error}") from None
            raise WrongError(f"{self.name}, stamp {self.stamp}, has ended, and gives {told[:48].hex()}")
        late = time.monotonic() - self.ended > BELIEVED
        try:
            self.check_facts()
        except OSError as error:
            if error.errno in GONE:
                return
            raise WrongError(f"{self.name}, stamp {self.stamp}, has ended: its facts give {error}") from None
        if late:
            raise WrongError(f"{self.name}, stamp {self.stamp}, has ended long ago, and its facts are told")

    def close(self) -> None:
        os.close(self.memory)
        os.close(self.folder)


@dataclass
class Findings:
    """What a reader came to."""

    counts: Counter[str] = field(default_factory=Counter)
    numbers: set[int] = field(default_factory=set)
    """Of the processes that were met with their own stamp, and the facts of the same."""
    wrong: list[str] = field(default_factory=list)

    def failed(self, error: OSError, name: str) -> None:
        """Note that something was not there any more, or that it should have been."""
        if error.errno in GONE:
            self.counts["ended"] += 1
        elif error.errno == errno.EIO:
            self.counts["no stamp"] += 1  # no memory at all, or not at that place: a kernel thread, one before its exec
        else:
            self.wrong.append(f"{name}: {error}")


class Reader:
    """What all kinds share."""

    def __init__(self, processes: str, until: float, seed: int) -> None:
        self.processes, self.until = processes, until
        self.chance = random.Random(seed)
        self.found = Findings()
        self._before: dict[str, int | None] = {}

    @property
    def is_over(self) -> bool:
        return time.monotonic() >= self.until

    def listed(self) -> list[str]:
        """PIDs, those first that were not there the last time."""
        names = [name for name in os.listdir(self.processes) if name.isdecimal()]
        self.chance.shuffle(names)
        self.found.counts["listed"] += len(names)
        return sorted(names, key=self._before.__contains__)

    def opened(self, name: str) -> Held | None:
        """A process that has its stamp, with facts that agree; None where it has none, or has ended."""
        counts = self.found.counts
        counts["looks"] += 1
        try:
            held = Held(self.processes, name)
        except OSError as error:
            self.found.failed(error, name)
            return None
        try:
            if held.read() is not None:
                held.check_facts()
                held.read()
                assert held.stamp is not None
                self.found.numbers.add(held.stamp.number)
                counts["own stamp"] += 1
                return held
            counts["no stamp"] += 1
        except WrongError as error:
            self.found.wrong.append(str(error))
        except OSError as error:
            self.found.failed(error, name)
        held.close()
        return None


class Walker(Reader):
    """Goes through all, and notes who was in the last list and is in the next, but was left out of one between."""

    def run(self) -> Findings:
        counts = self.found.counts
        last: dict[str, int | None] = {}
        while not self.is_over:
            met: dict[str, int | None] = {}
            names = self.listed()
            for name in names:
                held = self.opened(name)
                met[name] = None if held is None or held.stamp is None else held.stamp.number
                if held is not None:
                    held.close()
            counts["walks"] += 1
            counts["lasting"] += sum(number is not None and number < 0 for number in met.values())
            between = self._before
            counts["left out"] += sum(
                number is not None and name not in between and last.get(name) == number for name, number in met.items()
            )
            last, self._before = between, met
        return self.found


class Holder(Reader):
    """Keeps many processes open, beyond their end."""

    def run(self) -> Findings:
        held: list[Held] = []
        try:
            while not self.is_over:
                names = self.listed()
                self._before = dict.fromkeys(names)
                for name in names[: HELD - len(held)]:
                    one = self.opened(name)
                    if one is not None and one.stamp is not None and one.stamp.life:
                        held.append(one)
                    elif one is not None:
                        one.close()
                self._before.update(dict.fromkeys(one.name for one in held))
                held = [one for one in held if not self.is_done(one)]
        finally:
            for one in held:
                one.close()
        return self.found

    def is_done(self, held: Held) -> bool:
        """Read one again; whether all has been seen of it, which is closed then."""
        try:
            if held.ended:
                done = self.was_used_again(held)
            else:
                held.read()
                return False
        except WrongError as error:
            self.found.wrong.append(str(error))
            done = True
        except OSError as error:
            if error.errno != errno.ESRCH:
                self.found.wrong.append(f"{held.name}, stamp {held.stamp}, is read with {error}")
            held.ended = time.monotonic()
            return False
        if done:
            held.close()
        return done

    def was_used_again(self, held: Held) -> bool:
        """Whether another has the PID of one that has ended, or none comes: the old one gives nothing before and after.

        Raises WrongError where it does.
        """
        held.check_ended(buried=False)
        other = self.opened(held.name)
        if other is None:
            return time.monotonic() - held.ended > PATIENCE
        other.close()
        assert held.stamp is not None
        if other.stamp == held.stamp:
            raise WrongError(f"{held.name}, stamp {held.stamp}, had ended, and is back")
        held.check_ended(buried=True)
        self.found.counts["used again"] += 1
        return True


class Stander(Holder):
    """Works in the directory of one process after another."""

    def run(self) -> Findings:
        while not self.is_over:
            names = self.listed()
            self._before = dict.fromkeys(names)
            for name in names[:4]:
                held = self.opened(name)
                if held is not None and held.stamp is not None and held.stamp.life:
                    self.stand(held)
                    break
                if held is not None:
                    held.close()
        return self.found

    def stand(self, held: Held) -> None:
        os.fchdir(held.folder)
        done = False
        try:
            while not self.is_over and not (done := self.is_done(held)):
                self.look_around(held)
        finally:
            os.chdir("/")
            if not done:
                held.close()

    def look_around(self, held: Held) -> None:
        """What a path that begins here shows is this process's too."""
        assert held.stamp is not None
        late = held.ended and time.monotonic() - held.ended > BELIEVED
        try:
            os.listdir(".")
            with open("stat", "rb", buffering=0) as file:
                words = file.read(1 << 16).split()
        except OSError as error:
            if error.errno not in GONE:
                self.found.wrong.append(f"where {held.stamp} was stood in: {error}")
            return
        own = words[:1] + words[21:22] == [b"%d" % held.stamp.pid, b"%d" % held.stamp.start]
        if not own or (late and words[2] != b"Z"):
            self.found.wrong.append(f"where {held.stamp} was stood in, ended: {bool(held.ended)}, is {words}")


KINDS = {"walk": Walker, "hold": Holder, "stand": Stander}


def main(kind: str, processes: str, seconds: str, seed: str) -> None:
    found = KINDS[kind](processes, time.monotonic() + float(seconds), int(seed)).run()
    print(json.dumps({"counts": found.counts, "numbers": sorted(found.numbers), "wrong": found.wrong[:20]}))


if __name__ == "__main__":
    main(*sys.argv[1:])
