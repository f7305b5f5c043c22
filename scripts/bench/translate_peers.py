"""What memflow-py and Volatility 3 need for the same work: started by translate.py with a Python that has them.

    PYTHON translate_peers.py memflow SIZE            a process of SIZE bytes that memflow makes up itself
    PYTHON translate_peers.py volatility FILE DTB     the image that translate.py has made

Prints one JSON object: nanoseconds of each work, or `missing`: why there are none.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path

FEW, MANY = 64, 4096


def timed(function: Callable[[], object], count: int, seconds: float = 0.2) -> float:
    """The median of nanoseconds of CPU for one of `count` things, over `seconds`."""
    samples = []
    stop = time.thread_time() + seconds
    while not samples or time.thread_time() < stop:
        begun = time.thread_time_ns()
        function()
        samples.append((time.thread_time_ns() - begun) / count)
    return sorted(samples)[len(samples) // 2]


def memflow(size: int) -> dict[str, float]:
    """Reads of the dummy process: memflow-py has no door to translation alone, and none for many reads."""
    from memflow import c_uint64, dummy

    process = dummy.quick_process(size, b"\x55" * size)
    base = process.info().address
    chance = random.Random(5)
    places = [base + chance.randrange((size >> 3) - 1) * 8 for _ in range(MANY)]
    ordered = [base + 8 * number for number in range(MANY)]
    block = c_uint64 * (1 << 17)
    starts = [base + chance.randrange((size >> 20) - 1) * (1 << 20) for _ in range(4)]

    def each(addresses: list[int]) -> Callable[[], object]:
        def loop() -> None:
            for address in addresses:
                process.read(address, c_uint64)

        return loop

    return {
        "word": timed(each(places[:FEW]), FEW),
        "words, random": timed(each(places), MANY),
        "words, in sequence": timed(each(ordered), MANY),
        "MiB": timed(lambda: [process.read(start, block) for start in starts], len(starts)),
    }


def volatility(path: str, dtb: int) -> dict[str, float]:
    """Translations and reads through the layer Intel32e over a file."""
    from volatility3.framework import contexts
    from volatility3.framework.layers import intel, physical

    context = contexts.Context()
    context.config["file.location"] = Path(path).as_uri()
    context.add_layer(physical.FileLayer(context, "file", "file"))
    context.config["space.memory_layer"] = "file"
    context.config["space.page_map_offset"] = dtb
    layer = intel.Intel32e(context, "space", "space")
    pages, chance = 1 << 14, random.Random(5)

    def anywhere(count: int) -> list[int]:
        return [chance.randrange(pages * 512) * 8 for _ in range(count)]

    def each(function: Callable[[int], object], count: int, given: list[int] | None = None) -> float:
        """Fresh addresses each time: the layer keeps what it was asked before."""
        rounds = [given or anywhere(count) for _ in range(5)]
        return sorted(timed(lambda: [function(address) for address in rounds.pop()], count, 0.0) for _ in range(5))[2]

    starts = [start << 20 for start in chance.sample(range(pages >> 8), 20)]
    return {
        "one": each(layer.translate, FEW),
        "random": each(layer.translate, MANY),
        "in sequence": each(layer.translate, MANY, [4096 * number for number in range(MANY)]),
        "tree": timed(lambda: list(layer.mapping(0, pages << 12, ignore_errors=True)), pages),
        "word": each(lambda address: layer.read(address, 8), FEW),
        "MiB": timed(lambda: [layer.read(start, 1 << 20) for start in starts], len(starts), 0.0),
    }


def main() -> int:
    """The exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    peers = parser.add_subparsers(dest="peer", required=True)
    one = peers.add_parser("memflow", help="reads of its dummy process")
    one.add_argument("size", type=int, help="bytes of the process")
    two = peers.add_parser("volatility", help="translations and reads through its layer Intel32e")
    two.add_argument("file", help="the image")
    two.add_argument("dtb", type=int, help="physical address of the top page table")
    asked = parser.parse_args()
    try:
        print(json.dumps(memflow(asked.size) if asked.peer == "memflow" else volatility(asked.file, asked.dtb)))
    except ImportError as error:
        print(json.dumps({"missing": str(error)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
