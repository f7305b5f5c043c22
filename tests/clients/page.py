"""docs/tools.md: made from what was seen, and read again."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby

from clients.verdicts import Cells

HEAD = """\
# Tools on the mount

Programs that never heard of cloudfs, tried on every kind of file. Each cell compares what a tool prints, stores and
returns with what it does on a plain file that holds the same bytes. This page is made anew by
`CLOUDFS_WRITE_TOOLS=1 ./scripts/test tests/clients`.

| | |
|---|---|
| ✓ | as on a plain file |
| EIO, EPERM … | the tool says that error; EISDIR and `not ELF` it says of a plain file or directory too |
| size 0 | it tells what stat(2) tells, which is 0 |
| no bytes | it believes the size, or is silent about an error: nothing is printed or stored (see Limits) |
| hours | it reads all there is (see Limits) |
"""
LIMITS = """\
## Limits

- **Size 0.** `mem`, `new`, `plugins`, `exports` and `imports` say size 0 and have bytes, as files in /proc do. tar,
  rsync, `busybox cat`, `busybox cp` and Python's `shutil.copyfile` believe it and store nothing, without a word;
  `file` says «empty», `hexdump -s` prints nothing, mmap refuses. Use cat, cp, dd, grep. Busybox copies with
  sendfile(2), which Linux ends at the size of a file on FUSE, whatever it would give: `busybox tail -c +1` reads it.
- **`mem` of a process begins with a hole**, as /proc/PID/mem does: what reads it from its start meets EIO at once.
  strings, hexdump, vim, `perl -ne`, bash's own reading and busybox grep hide that error. Go to an address (`xxd -s`,
  `dd skip=… iflag=skip_bytes`, `tail -c +N`, pread) or use `regions/`, where holes are zeros.
- **`od -j` and `hexdump -s` on `mem`** read up to the offset, or believe the size, instead of seeking. Use `xxd -s`.
- **A huge reservation is a huge file.** What reads all of a region of 1 TiB reads for hours, though the target pays
  nothing for it. Where the shim could be built (`cloudfs plugins doctor` tells), lseek(2) tells holes: cp, `tar -S`,
  `grep -c` and `grep -l` pass over them. Most others read the zeros. Leave the largest out:
  `find regions -size -1G -exec grep -l … {} +`.
- **mmap.** Live memory cannot be mapped shared (ENODEV): the kernel would show old bytes. A private mapping is a
  snapshot of the pages when they were first touched.
  Images that nobody writes to, and those opened with `immutable=yes`, can be mapped.
- **Names with a colon**: a region of `memfd:x` looks like a host's name to rsync and scp; write `./` before it.
- **tail -f** follows an image that grows; memory that changes in place is not its matter.
- **Whole processes**: `cp -r` of a process says EIO for its `mem` and copies the rest; tar and rsync store `mem` empty.
- **dash** says «I/O error» whatever the error of a write was; `cat new` tells the reason.
- **dd** wants `conv=notrunc`: else it cuts the file first, which is refused. `rsync --inplace` stores a file's bytes at
  the beginning of the memory before it cuts the rest, and complains only then.
- **Editors** may write back `new`. Memory they cannot save, since they cut a file before they write it anew; hex
  editors that change bytes in place can.
"""


@dataclass(frozen=True)
class Table:
    """One table of the page."""

    text: str
    cells: dict[tuple[str, str], str]


def table_text(cells: Cells) -> str:
    """A table in Markdown: tools down, kinds of file across."""
    kinds = list(dict.fromkeys(kind for _, kind in cells))
    tools = list(dict.fromkeys(tool for tool, _ in cells))
    rows = [["", *kinds], ["---", *[":-:" for _ in kinds]]]
    rows += [[f"`{tool}`", *[cells[tool, kind][0] for kind in kinds]] for tool in tools]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def page(machine: str, reading: Cells, writing: Cells) -> str:
    """All of it."""
    return "\n".join((
        HEAD, f"Seen on: {machine}\n", "## Reading\n", table_text(reading),
        "## Writing, with `--writable`\n\nWhat stores exactly the bytes it was told to is ✓; all else is refused.\n",
        table_text(writing), LIMITS,
    ))  # fmt: skip


def read_tables(text: str) -> tuple[str, list[Table]]:
    """The machine and the tables of a page."""
    lines = text.splitlines()
    machine = next((line.split(": ", 1)[1] for line in lines if line.startswith("Seen on: ")), "")
    tables = []
    for is_row, group in groupby(lines, lambda line: line.startswith("| ") and not line.startswith("| | |")):
        rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in group]
        if is_row and len(rows[0]) > 2:
            kinds = rows[0][1:]
            named = {row[0].strip("`"): zip(kinds, row[1:], strict=True) for row in rows[2:]}
            cells = {(tool, kind): cell for tool, found in named.items() for kind, cell in found}
            text = "\n".join(" | ".join(cell.ljust(12) for cell in row) for row in rows)
            tables.append(Table(text, cells))
    return machine, tables
