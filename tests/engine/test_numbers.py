"""Numbers as people write them."""

from __future__ import annotations

import pytest

from engine.errors import InvalidArgumentError
from engine.numbers import parse_number


@pytest.mark.parametrize(
    ("text", "number"),
    [("0", 0), ("4096", 4096), ("0x1000", 4096), ("4K", 4096), ("2M", 2 << 20), ("5GiB", 5 << 30), ("1_000", 1000),
     ("010", 10), ("0b11", 3), ("0xffffffffffffffff", (1 << 64) - 1), (" 7 ", 7), ("1tb", 1 << 40)],
)  # fmt: skip
def test_numbers_are_read_as_people_write_them(text, number):
    assert parse_number(text) == number


@pytest.mark.parametrize("text", ["", "x", "-1", "1.5", "0x", "4Q", "0xg", "1" * 200, "0b2", "K", "0x1" + "0" * 40])
def test_what_is_no_number_is_refused_by_name(text):
    with pytest.raises(InvalidArgumentError, match="address"):
        parse_number(text, "address")
