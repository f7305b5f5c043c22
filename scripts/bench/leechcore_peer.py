"""LeechCore's device for QEMU, timed: started by qemu.py with a Python that has leechcorepyc.

Prints one JSON object: microseconds of one call of each work (samples), or `missing`: why there are none.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Callable

PAGE, MIB, PAGES = 4096, 1 << 20, 1024
SAMPLE_SECONDS = 0.02


def timed(function: Callable[[], object], count: int, rounds: int) -> list[float]:
    """Microseconds of CPU, in all threads, for one of `count` things, `rounds` times."""
    function()
    samples = []
    for _ in range(rounds):
        times, began = 0, time.process_time()
        while (spent := time.process_time() - began) < SAMPLE_SECONDS:
            function()
            times += 1
        samples.append(1e6 * spent / times / count)
    return samples


def measured(name: str, size: int, rounds: int) -> dict[str, object]:
    """Blocks, and 1,024 pages by one call."""
    import leechcorepyc

    device = leechcorepyc.LeechCore(f"qemu://shm={name}")
    chance = random.Random(7)
    pages = [PAGE * chance.randrange(MIB // PAGE, size // PAGE - MIB // PAGE) for _ in range(PAGES)]
    if len(device.read(pages[0], PAGE)) != PAGE or len(device.read_scatter(pages)) != PAGES:
        raise OSError("it gives fewer bytes than it was asked for")

    def blocks(length: int) -> list[float]:
        return timed(lambda: [device.read(address, length) for address in pages[:64]], 64, rounds)

    found = {"4 KiB": blocks(PAGE), "1 MiB": blocks(MIB), "pages": timed(lambda: device.read_scatter(pages), 1, rounds)}
    return {"first": [pages[0], bytes(device.read(pages[0], PAGE)).hex()], **found}


def main() -> int:
    """The exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="the file in /dev/shm that is the guest's RAM")
    parser.add_argument("size", type=int, help="bytes of RAM")
    parser.add_argument("--rounds", type=int, default=9, help="samples of each figure")
    asked = parser.parse_args()
    try:
        print(json.dumps(measured(asked.name, asked.size, asked.rounds)))
    except Exception as error:  # whatever the peer says: it is left out, and that is told
        print(json.dumps({"missing": f"{type(error).__name__}: {error}"}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
