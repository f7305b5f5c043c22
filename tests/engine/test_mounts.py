"""What a file's filesystem is known to be."""

from __future__ import annotations

import os

import pytest
from support import applies

from engine.mounts import Backing, backing_of_file


@pytest.mark.parametrize("flags", [0, 4, 4 | 21 << 26, 4 | 30 << 26], ids=["plain", "huge", "2 MiB", "1 GiB"])
def test_a_memfd_lies_in_memory_whatever_its_pages(flags):
    try:
        number = os.memfd_create("cloudfs-test", flags)
    except OSError as error:
        applies(False, f"this kernel or processor has no pages of that size (/sys/kernel/mm/hugepages): {error}")
        raise
    try:
        assert backing_of_file(number) is Backing.MEMORY
    finally:
        os.close(number)
