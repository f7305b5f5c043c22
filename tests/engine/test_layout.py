"""Layouts: members by name, paths, fallbacks, absence as a value."""

from __future__ import annotations

import pytest

from engine.errors import NotFoundError
from engine.layout import VOID, DataType, Field, StructLayout, TypeKind

WORD = DataType(TypeKind.INTEGER, 4, "int", signed=True)
POINT = StructLayout("point", 8, [Field("x", 0, 4, WORD), Field("y", 4, 4, WORD)])
POINT_TYPE = DataType(TypeKind.STRUCT, 8, "point", members=lambda: POINT)
POINTS = DataType(TypeKind.ARRAY, 24, count=3, inner=lambda: POINT_TYPE)
GRID = DataType(TypeKind.ARRAY, 48, count=2, inner=lambda: POINTS)
OPEN = DataType(TypeKind.ARRAY, 0, count=0, inner=lambda: POINT_TYPE)
SHAPE = StructLayout(
    "shape", 120,
    [Field("head", 8, 8, POINT_TYPE), Field("grid", 16, 48, GRID), Field("old", 100, 4, WORD),
     Field("tail", 120, 0, OPEN), Field("flags", 104, 4, WORD, bit_size=3, shift=5)],
)  # fmt: skip


@pytest.mark.parametrize(
    ("path", "offset", "size"),
    [("head", 8, 8), ("head.y", 12, 4), ("grid", 16, 48), ("grid[1]", 40, 24), ("grid[1][2]", 56, 8),
     ("grid[1][2].y", 60, 4), ("tail[10].x", 200, 4)],
)  # fmt: skip
def test_a_path_leads_through_structures_and_arrays(path, offset, size):
    assert (SHAPE[path].offset, SHAPE[path].size, SHAPE[path].name) == (offset, size, path)


@pytest.mark.parametrize(
    "path",
    ["", ".", "nothing", "head.", "head.z", "head.x.y", "head[0]", "grid[2]", "grid[0][3]", "grid[-1]", "grid[",
     "grid[]", "head..x", ".head", "tail[99999999999]", "old.x", "a" * 10_000, "head." * 1000],
)  # fmt: skip
def test_a_path_that_leads_nowhere_is_absent(path):
    assert path not in SHAPE
    assert SHAPE.get(path) is None
    with pytest.raises(NotFoundError, match="shape has no member"):
        SHAPE[path]


def test_the_first_name_that_exists_counts():
    assert SHAPE.first("new", "old").offset == 100
    assert SHAPE.get("new", "old").offset == 100
    assert SHAPE.offset("new", "head.y", "old") == 12
    with pytest.raises(NotFoundError, match="none of the members new, newer"):
        SHAPE.first("new", "newer")


def test_the_direct_fields_are_listed_in_their_order():
    assert [each.name for each in SHAPE] == ["head", "grid", "old", "tail", "flags"]
    assert len(SHAPE) == 5


def test_a_bit_field_is_taken_out_of_its_word():
    flags = SHAPE["flags"]
    assert flags.extract(0b011_00000) == 3
    assert flags.extract(0b111_00000) == -1
    assert flags.dtype() == "<u4"
    assert SHAPE["old"].extract(7) == 7


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [(WORD, ">i4"), (DataType(TypeKind.POINTER, 8), ">u8"), (DataType(TypeKind.FLOAT, 8), ">f8"),
     (DataType(TypeKind.FLOAT, 16), "V16"), (POINT_TYPE, "V8"), (POINTS, "V24"), (VOID, "V0"),
     (DataType(TypeKind.ENUM, 1), ">u1"), (DataType(TypeKind.INTEGER, 16), "V16")],
)  # fmt: skip
def test_numpy_reads_a_field_by_its_dtype(kind, dtype):
    assert Field("f", 0, kind.size, kind).dtype(">") == dtype


def test_what_a_pointer_means_may_be_unknown():
    assert DataType(TypeKind.POINTER, 8).target is VOID
    assert WORD.layout is None
