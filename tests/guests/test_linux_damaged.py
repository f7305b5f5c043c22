"""Damaged images of guests: what can be known is shown, and nothing but errors of the engine leaves the layer."""

from __future__ import annotations

import contextlib
import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from guests.recording import Recording

from engine.errors import EngineError
from engine.file_memory import FileMemory
from engine.formats.btf import Btf, Candidate, load_btf
from engine.formats.btf.mending import mend
from engine.oslayer import Base
from engine.oslayers.linux import LinuxLayer

PROGRAM = Path(__file__).parents[2] / "scripts" / "fuzz" / "linux_images.py"
PAGE = 4096


@pytest.fixture(scope="module")
def fuzzer() -> ModuleType:
    spec = importlib.util.spec_from_file_location("linux_images", PROGRAM)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["linux_images"] = module  # dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def kernels() -> Callable[[Recording], tuple[LinuxLayer, Btf, Candidate]]:
    """A guest's layer, its types and where they lie in the kernel's image."""
    known: dict[str, tuple[LinuxLayer, Btf, Candidate]] = {}

    def get(recording: Recording) -> tuple[LinuxLayer, Btf, Candidate]:
        name = str(recording.image)
        if name not in known:
            layer = LinuxLayer.open(Base(FileMemory(name, immutable=True)), {})
            found = layer.kernel.found
            known[name] = layer, *load_btf(found.memory.window(found.image.start, found.image.size))
        return known[name]

    return get


def pages_of_types(place: Candidate) -> list[int]:
    """Where in the blob the whole pages of its types begin: it lies at any multiple of four."""
    return list(range(-place.address % PAGE or PAGE, place.header.types[1] - PAGE, PAGE))


@pytest.mark.parametrize("seed", range(4))
def test_types_keep_their_numbers_where_pages_before_them_are_damaged(typed, kernels, seed):
    layer, btf, place = kernels(typed)
    chance = np.random.default_rng(seed)
    blob = bytearray(layer.kernel.found.memory.read(layer.kernel.found.image.start + place.address, place.header.size))
    for at in chance.choice(pages_of_types(place), 1 + seed % 3, replace=False).tolist():
        blob[at : at + PAGE] = bytes(PAGE) if seed % 2 else chance.bytes(PAGE)
    mended = mend(bytes(blob), btf.pointer_size)
    assert len(mended.starts) == len(btf.index)
    changed = np.count_nonzero(mended.starts != btf.index)  # the first that is lost begins where it began
    assert changed <= mended.lost <= changed + 1 + seed % 3
    assert mended.lost <= (1 + seed % 3) * PAGE // 12


@pytest.mark.parametrize("noise", [False, True])
def test_processes_are_shown_though_a_page_of_the_types_is_damaged(guest, fuzzer, kernels, noise):
    recording = guest("amd64-6.1-4level")
    layer, _, place = kernels(recording)
    expected = layer.pids()
    told = []
    for at in pages_of_types(place)[40::110][:5]:  # the very last one holds rows of one type alone
        image = fuzzer.Image(recording.image)
        start = layer.kernel.found.image.start + place.address + at
        data = np.random.default_rng(at).bytes(PAGE) if noise else bytes(PAGE)
        image.write(layer.kernel.found.memory.virt_to_phys(start), data)
        found = LinuxLayer.open(Base(image), {})
        assert any("types are lost with damaged pages" in note for note in found.info.notes)
        with contextlib.suppress(EngineError):
            told.append(found.pids() == expected)
    assert sum(told) >= len(told) - 1 >= 4


def test_a_few_seconds_of_the_fuzzer_find_nothing(guest):
    guest("amd64-6.1-4level")
    command = [sys.executable, str(PROGRAM), "4", "--guest", "amd64-6.1-4level"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_an_image_that_was_cut_short_is_said_to_be(guest):
    image = FileMemory(str(guest("amd64-6.1-4level").image), immutable=True)
    whole = LinuxLayer.open(Base(image), {})
    assert whole.info.notes == ()
    layer = LinuxLayer.open(Base(image.window(0, image.size - (1 << 20))), {"cache": "no"})
    assert layer.pids() == whole.pids()
    (note,) = layer.info.notes
    assert note.endswith(f"this memory ends at {image.size - (1 << 20):#x}: it may be cut short")
