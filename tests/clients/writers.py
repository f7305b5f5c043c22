"""Tools that write: on a mount that allows it, each file is changed as it was meant to be, or not at all.

`$f`, `$o` and `$at` as in `tools`; `$bytes` is a file that holds the eight bytes WRITTEN!. `precise` lines must
store these at `$at`, all others must be refused: they would replace, cut, lengthen or remove the file.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from clients.verdicts import SECONDS, errno_word

NEW_BYTES = b"WRITTEN!"
PYTHON = shlex.quote(sys.executable) + " -S -c "


@dataclass(frozen=True)
class Writer:
    """One row of the table."""

    name: str
    line: str
    package: str = "coreutils"
    precise: bool = False

    @property
    def program(self) -> str:
        return self.name.split()[0]


@dataclass(frozen=True)
class Writable:
    """A file that may be written, and how its bytes are seen without the mount."""

    name: str
    path: Path
    offset: int
    look: Callable[[], bytes]
    """All bytes of it, with `offset` at `start`."""
    start: int


def _python(code: str) -> str:
    return PYTHON + shlex.quote(code) + " $f $at"


WRITERS = (
    Writer("dd conv=notrunc", "dd status=none if=$bytes of=$f bs=8 oflag=seek_bytes seek=$at conv=notrunc",
           precise=True),
    Writer("xxd -r", "printf '%x: 5752 4954 5445 4e21\\n' $at | xxd -r - $f", "xxd", precise=True),
    Writer("python r+b", _python("import sys; f = open(sys.argv[1], 'r+b'); f.seek(int(sys.argv[2])); "
           "f.write(b'WRITTEN!'); f.close()"), "python3", precise=True),
    Writer("python pwrite", _python("import os, sys; f = os.open(sys.argv[1], os.O_WRONLY); "
           "os.pwrite(f, b'WRITTEN!', int(sys.argv[2]))"), "python3", precise=True),
    Writer("perl +<", "perl -e 'open F, \"+<:raw\", $ARGV[0] or die \"$!\\n\"; sysseek F, $ARGV[1], 0; "
           "syswrite F, \"WRITTEN!\" or die \"$!\\n\"' $f $at", "perl", precise=True),
    Writer("busybox dd", "busybox dd if=$bytes of=$f bs=8 oflag=seek_bytes seek=$at conv=notrunc", "busybox",
           precise=True),
    Writer("bash 1<>", "exec 3<>$f; dd status=none if=$bytes bs=8 oflag=seek_bytes seek=$at conv=notrunc 1>&3", "bash",
           precise=True),
    Writer("dd seek=", "dd status=none if=$bytes of=$f bs=8 oflag=seek_bytes seek=$at"),
    Writer("dd", "dd status=none if=$bytes of=$f"),
    Writer("bash >", "echo hi > $f", "bash"),
    Writer("bash >>", "echo hi >> $f", "bash"),
    Writer("dash >", "dash -c 'echo hi > $f'", "dash"),
    Writer("tee", "echo hi | tee $f"),
    Writer("tee -a", "echo hi | tee -a $f"),
    Writer("cp", "cp $bytes $f"),
    Writer("cp --remove-destination", "cp --remove-destination $bytes $f"),
    Writer("install", "install -m 600 $bytes $f"),
    Writer("mv", "cp $bytes $o/x; mv -f $o/x $f"),
    Writer("mv away", "mv $f ./other"),
    Writer("ln", "ln $f ./other"),
    Writer("ln -s", "ln -s $f ./other"),
    Writer("rm", "rm -f $f"),
    Writer("truncate -s 0", "truncate -s 0 $f"),
    Writer("truncate -s +1M", "truncate -s +1M $f"),
    Writer("touch", "touch $f"),
    Writer("chmod", "chmod 666 $f"),
    Writer("rsync", "cp $bytes $o/$(basename $f); rsync $o/$(basename $f) ./", "rsync"),
    Writer("tar x", "cp $bytes $o/$(basename $f); tar cf - -C $o . | tar xf -", "tar"),
    Writer("sed -i", "sed -i s/a/b/ $f", "sed"),
    Writer("vim", "vim -V1 -esbnN -u NONE -i NONE -c 's/^/X/' -c w! -c 'if !&modified|qa!|else|cq!|endif' $f", "vim"),
    Writer("python wb", _python("import sys; open(sys.argv[1], 'wb').write(b'hi')"), "python3"),
    Writer("python mmap", _python("import mmap, os, sys; f = os.open(sys.argv[1], os.O_RDWR); "
           "mmap.mmap(f, 4096)[:8] = b'WRITTEN!'"), "python3"),
    Writer("fallocate", "fallocate -l 100M $f", "util-linux"),
    Writer("shred -u", "shred -n 0 -u $f"),
)


def check_writer(writer: Writer, file: Writable) -> tuple[str, str]:
    """(cell, what is wrong); what is written is taken back, so that the next one finds the same bytes."""
    before = file.look()
    with tempfile.TemporaryDirectory(prefix="cloudfs-writer-") as folder:
        out, bytes_file = Path(folder) / "o", Path(folder) / "bytes"
        out.mkdir()
        bytes_file.write_bytes(NEW_BYTES)
        environment = {**os.environ, "LC_ALL": "C.UTF-8", "TERM": "dumb", "f": file.path.name, "o": str(out),
                       "at": str(file.offset), "bytes": str(bytes_file)}  # fmt: skip
        limits = "ulimit -c 0; IFS=; "  # not -f: an address is a high offset
        try:
            done = subprocess.run(
                ["bash", "-c", limits + writer.line], cwd=file.path.parent, env=environment, capture_output=True,
                stdin=subprocess.DEVNULL, timeout=SECONDS, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return "HANGS", f"it did not end within {SECONDS:.0f} s"
    after = file.look()
    meant = before[: file.start] + NEW_BYTES + before[file.start + len(NEW_BYTES) :]
    said = (done.stdout + done.stderr).decode(errors="replace")
    if after != before and not (writer.precise and after == meant):
        return "FALSE", f"it changed what it should not: {done.returncode} {said}"
    if after == meant:
        _restore(file, before)
        return ("✓", "") if done.returncode == 0 else ("FALSE", f"written, and said to have failed: {said}")
    word = errno_word(said)
    if done.returncode == 0:
        return "FALSE", f"nothing was written, and nothing said: {said}"
    return word or "an error", "" if word else f"an unclear error: {done.returncode} {said}"


def _restore(file: Writable, before: bytes) -> None:
    with open(file.path, "r+b", buffering=0) as again:
        again.seek(file.offset)
        again.write(before[file.start : file.start + len(NEW_BYTES)])
