"""The tools, each a line for bash: its working directory is that of the file, `$f` the file's name there.

What a line prints and what it leaves in the directory `$o` is compared with what the same line does on a plain
copy of the bytes: `$copy` is that copy in both runs, `$at` an offset at which something is known. (Words are not
split, IFS being empty: `$f` may hold spaces.)
"""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass

from clients.kinds import NEEDLE

PYTHON = shlex.quote(sys.executable) + " -S -c "


@dataclass(frozen=True)
class Tool:
    """One row of the table."""

    name: str
    line: str
    package: str
    """The Debian package that has it."""
    whole: bool = True
    """It reads all of the file."""
    skips_holes: bool = False
    """It passes over them where lseek(2) tells them, and what it stores has some too."""

    @property
    def program(self) -> str:
        return self.name.split()[0]


def _python(code: str) -> str:
    return PYTHON + shlex.quote(code) + " $f"


TOOLS = (
    Tool("ls -l", "ls -lAL --time-style=+ $f | awk '!/^total/ {print substr($1, 1, 1), $NF}'", "coreutils", False),
    Tool("stat", "if [ -d $f ]; then stat -c %F $f; else stat -Lc '%F %s' $f; fi", "coreutils", False),
    Tool("find", r"find $f -type f -size +0 -printf '%P %s\n' | sort", "findutils", False),
    Tool("du", "find -L $f -type f -exec du -Lb {} + | sort", "coreutils", False),
    Tool("df", "df $f >/dev/null && echo there", "coreutils", False),
    Tool("readlink", "readlink $f || true", "coreutils", False),
    Tool("cat", "cat $f", "coreutils"),
    Tool("head -c", "head -c 5000 $f", "coreutils", False),
    Tool("head -n", "head -n 3 $f", "coreutils", False),
    Tool("tail -c", "tail -c 100 $f", "coreutils", False),
    Tool("tail -c +N", "tail -c +$((at + 1)) $f | head -c 3000", "coreutils", False),
    Tool("tail -f", "timeout 1.5 tail -c 100 -s 0.1 -f $f", "coreutils", False),
    Tool("less", "less -f $f", "less"),
    Tool("grep", f"grep -a {NEEDLE} $f", "grep"),
    Tool("grep -c", f"grep -c {NEEDLE} $f", "grep", skips_holes=True),
    Tool("grep -l", f"grep -l {NEEDLE} $f", "grep", skips_holes=True),
    Tool("grep -abo", f"grep -abo {NEEDLE} $f", "grep"),
    Tool("grep -r", f"grep -r {NEEDLE} $f | sort", "grep", skips_holes=True),
    Tool("rg", f"rg --no-config --sort path -c {NEEDLE} $f", "ripgrep"),
    Tool("rg -a", f"rg --no-config --sort path --no-ignore -a -o {NEEDLE} $f", "ripgrep"),
    Tool("strings", "strings -n 6 $f", "binutils"),
    Tool("xxd", "xxd $f", "xxd"),
    Tool("xxd -s", "xxd -s $at -l 64 $f", "xxd", False),
    Tool("xxd and xxd -r", "xxd -s $at -l 64 $f | xxd -r -s -$at", "xxd", False),
    Tool("hexdump", "hexdump -C $f", "bsdextrautils"),
    Tool("hexdump -s", "hexdump -C -s $at -n 64 $f", "bsdextrautils", False),
    Tool("od", "od -A x -t x1 $f", "coreutils"),
    Tool("od -j", "od -A x -t x1 -j $at -N 64 $f", "coreutils", False),
    Tool("dd", "dd status=none if=$f", "coreutils"),
    Tool("dd bs=1M", "dd status=none bs=1M if=$f", "coreutils"),
    Tool("dd skip=", "dd status=none if=$f bs=512 iflag=skip_bytes skip=$at count=3", "coreutils", False),
    Tool("dd direct", "dd status=none if=$f bs=4096 count=2 iflag=direct,skip_bytes skip=$((at & -4096))",
         "coreutils", False),
    Tool("wc -c", "wc -c $f", "coreutils", False),
    Tool("cmp", "cmp $f $copy", "diffutils"),
    Tool("cmp -n", "cmp -i $at -n 64 $f $copy", "diffutils", False),
    Tool("md5sum", "md5sum $f", "coreutils"),
    Tool("base64", "base64 $f", "coreutils"),
    Tool("sort", "sort $f", "coreutils"),
    Tool("sed", "sed -n '1,3p;3q' $f", "sed", False),
    Tool("awk", "awk 'END { print NR }' $f", "mawk"),
    Tool("gzip", "gzip -nc $f", "gzip"),
    Tool("cp", "cp $f $o/x", "coreutils", skips_holes=True),
    Tool("cp -r", "cp -r $f $o/x", "coreutils", skips_holes=True),
    Tool("cp --sparse", "cp -r --sparse=always $f $o/x", "coreutils", skips_holes=True),
    Tool("tar", "tar cf - $f | tar xf - -C $o", "tar"),
    Tool("tar -S", "tar cSf - $f | tar xf - -C $o", "tar", skips_holes=True),
    Tool("rsync", "rsync -rl ./$f $o/", "rsync"),
    Tool("rsync -S", "rsync -rlS ./$f $o/", "rsync"),
    Tool("vim", "vim -esbnN -u NONE -i NONE -c \"w! $o/x\" -c qa! $f", "vim"),
    Tool("python open", _python("import sys; sys.stdout.buffer.write(open(sys.argv[1], 'rb').read())"), "python3"),
    Tool("python pread", PYTHON + shlex.quote("import os, sys; f = os.open(sys.argv[1], 0); "
         "os.write(1, os.pread(f, 64, int(sys.argv[2])))") + " $f $at", "python3", False),
    Tool("python mmap", _python("import mmap, sys; f = open(sys.argv[1], 'rb'); "
         "sys.stdout.buffer.write(mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)[:8192])"), "python3", False),
    Tool("python mmap private", _python("import mmap, sys; f = open(sys.argv[1], 'rb'); "
         "sys.stdout.buffer.write(mmap.mmap(f.fileno(), 0, mmap.MAP_PRIVATE)[:8192])"), "python3", False),
    Tool("python shutil", PYTHON + "'import shutil, sys; shutil.copyfile(*sys.argv[1:])' $f $o/x", "python3"),
    Tool("perl", "perl -e 'open F, \"<:raw\", shift or die \"$!\\n\"; while (1) { my $n = sysread F, my $b, 65536; "
         "defined $n or die \"$!\\n\"; $n or last; print $b }' $f", "perl"),
    Tool("perl <>", "perl -ne 'print; END { $! and 0 }' $f", "perl"),
    Tool("file", "file -Lb $f", "file", False),
    Tool("readelf", "readelf -hlW $f", "binutils", False),
    Tool("bash <", "mapfile -n 3 -t lines < $f; printf '%s\\n' \"${lines[@]}\"", "bash", False),
    Tool("bash $(<)", "x=$(tr -d '\\0' < $f); printf %s \"$x\"", "bash"),
    Tool("busybox cat", "busybox cat $f", "busybox"),
    Tool("busybox cp", "busybox cp -r $f $o/x", "busybox"),
    Tool("busybox grep", f"busybox grep -c {NEEDLE} $f", "busybox"),
    Tool("busybox hexdump", "busybox hexdump -C $f", "busybox"),
    Tool("busybox hexdump -s", "busybox hexdump -C -s $at -n 64 $f", "busybox", False),
    Tool("busybox tail", "busybox tail -c 100 $f", "busybox", False),
    Tool("busybox dd", "busybox dd if=$f bs=512 iflag=skip_bytes skip=$at count=3 2>/dev/null", "busybox", False),
)
