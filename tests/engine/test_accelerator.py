"""The accelerator and how it comes to be: compiled once, kept where only its owner can write, or done without."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support import require

from engine import accelerator
from engine.bytes_memory import BytesMemory
from engine.compiled import NotCompiledError, Source, load
from engine.memory import Pieces

PROGRAM = """
import numpy as np
from engine import accelerator
from engine.bytes_memory import BytesMemory
from engine.translate.bulk import translate
from engine.translate.x86 import X86_64
words = np.zeros(512 * 8, np.uint64)
words[512], words[1024], words[1536], words[2048] = 0x2003, 0x3003, 0x4003, 0x5003
found = translate(BytesMemory(words.tobytes()), [(X86_64, 0x1000)], np.array([7, 4096], np.uint64))
print(found.physical.tolist(), found.kinds.tolist(), accelerator.library() is not None, accelerator.why_not())
"""
TWICE = Source("twice", b"int twice(int number) { return 2 * number; }", ("-O1", "-fvisibility=default"))


def run(**environment: str) -> str:
    words = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(
        words, capture_output=True, text=True, timeout=60, check=True, env={**os.environ, **environment}
    )
    return done.stdout


@pytest.fixture
def compiler():
    require(any(shutil.which(name) for name in ("cc", "gcc", "clang")), "there is no C compiler")


def test_it_is_compiled_once_and_kept(tmp_path, compiler):
    assert run(XDG_CACHE_HOME=str(tmp_path)).startswith("[20487, 0] [0, 1] True")
    (kept,) = (tmp_path / "cloudfs").iterdir()
    before = kept.stat().st_mtime_ns
    assert "True" in run(XDG_CACHE_HOME=str(tmp_path), PATH="/nowhere")
    assert kept.stat().st_mtime_ns == before


def test_without_a_compiler_everything_works(tmp_path):
    out = run(XDG_CACHE_HOME=str(tmp_path), PATH="/nowhere")
    assert out.startswith("[20487, 0] [0, 1] False")
    assert "install the package gcc" in out


def test_a_variable_turns_it_off():
    assert run(CLOUDFS_NO_ACCELERATOR="1") == "[20487, 0] [0, 1] False CLOUDFS_NO_ACCELERATOR turns it off\n"


def test_nothing_is_loaded_from_where_others_can_write(tmp_path, compiler):
    (tmp_path / "cloudfs").mkdir(mode=0o777)
    (tmp_path / "cloudfs").chmod(0o777)
    assert "can be written by other users" in run(XDG_CACHE_HOME=str(tmp_path))
    assert not list((tmp_path / "cloudfs").iterdir())


def test_a_kept_library_that_is_broken_is_compiled_anew(tmp_path, compiler, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def opened(path: str):
        import ctypes

        return ctypes.CDLL(path).twice

    (tmp_path / "cloudfs").mkdir(mode=0o700)
    kept = tmp_path / "cloudfs" / TWICE.file_name
    kept.write_bytes(b"no library")
    assert load(TWICE, opened)(21) == 42
    assert kept.read_bytes()[:4] == b"\x7fELF"


def test_two_libraries_whose_descriptors_have_one_number_are_two(tmp_path, compiler, monkeypatch):
    import ctypes

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    thrice = Source("thrice", b"int thrice(int number) { return 3 * number; }", TWICE.options)
    assert load(TWICE, lambda path: ctypes.CDLL(path).twice)(5) == 10
    assert load(thrice, lambda path: ctypes.CDLL(path).thrice)(5) == 15


def test_what_the_compiler_does_not_like_is_said(tmp_path, compiler, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(NotCompiledError, match="could not compile it"):
        load(Source("wrong", b"this is no C"), Path)


def test_rows_are_gathered_from_pieces_and_those_across_them_fail():
    library = accelerator.library()
    require(library is not None, f"there is no accelerator: {accelerator.why_not()}")
    assert library is not None
    data = os.urandom(3000)
    view = memoryview(data)
    pieces = Pieces([(100, view[:1000]), (1100, view[1000:1500]), (5000, view[1500:])])
    addresses = np.array([99, 100, 1092, 1093, 1100, 1592, 1593, 4999, 5000, 6492, 6493, 2**64 - 1], np.uint64)
    out = np.empty((len(addresses), 8), np.uint8)
    assert accelerator.gather(library, pieces, addresses, out).tolist() == [0, 3, 6, 7, 10, 11]
    for row, start in ((1, 0), (2, 992), (4, 1000), (5, 1492), (8, 1500), (9, 2992)):
        assert out[row].tobytes() == data[start : start + 8]


def test_the_pieces_of_a_window_are_those_of_its_memory_moved():
    data = bytes(range(200))
    (start, view), = BytesMemory(data).window(50, 100).pieces().parts
    assert (start, bytes(view)) == (0, data[50:150])
