"""Images behind URLs: by a web server of our own, and by fsspec's memory."""

from __future__ import annotations

import contextlib
import http.server
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from dump_samples import lime_image
from support import require

from engine.connectors.raw import RawConnector
from engine.errors import (
    EngineError,
    InvalidArgumentError,
    NotFoundError,
    PluginError,
    ReadOnlyError,
    TargetGoneError,
    UnsupportedError,
)
from engine.remote_file import BLOCK, RemoteFile, is_url, without_password
from engine.targets import chain_of, open_target
from engine.testing import Truth, check_memory
from engine.types import Extent

try:
    import aiohttp  # noqa: F401  # fsspec wants it for http
    import fsspec
except ImportError:
    fsspec = None

DATA = os.urandom(3 * BLOCK + 5000)


@pytest.fixture(autouse=True)
def _there() -> None:
    require(fsspec is not None, "the extra `remote` is not installed")


class Server:
    """A web server with one file; `ranges` says whether it gives parts, `answer` may spoil one."""

    def __init__(self) -> None:
        self.data = DATA
        self.ranges = True
        self.spoil: Callable[[int], bytes | None] = lambda number: None
        self.asked: list[str] = []
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self) -> None:
                self.answer(body=False)

            def do_GET(self) -> None:
                self.answer(body=True)

            def answer(self, *, body: bool) -> None:
                data, status = outer.data, 200
                found = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
                if body:
                    outer.asked.append(self.headers.get("Range", ""))
                if self.path != "/image":
                    data, status = b"", 503 if self.path == "/image-busy" else 404
                elif found and outer.ranges:
                    stop = int(found[2]) + 1 if found[2] else len(data)
                    data, status = data[int(found[1]) : stop], 206
                spoilt = outer.spoil(len(outer.asked)) if body else None
                data = data if spoilt is None else spoilt
                self.send_response(status)
                if outer.ranges:
                    self.send_header("Accept-Ranges", "bytes")
                self.send_header("Content-Length", str(len(data)))
                self.send_header("Connection", "close")
                self.end_headers()
                if body:
                    self.wfile.write(data)

            def log_message(self, *_: object) -> None:
                """Nothing."""

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/image"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self.thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join(10)


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    try:
        yield made
    finally:
        made.close()


def test_a_remote_file_holds_the_contract_of_memory(server: Server) -> None:
    check_memory(lambda: RemoteFile(server.url, {}), Truth([(0, DATA)], [Extent(len(DATA), 4096)]))


def test_words_of_all_blocks_are_fetched_in_few_requests(server: Server) -> None:
    file = RemoteFile(server.url, {})
    before = len(server.asked)
    offsets = np.random.default_rng(2).integers(0, len(DATA) - 8, 2000)
    words, faults = file.words(offsets)
    assert not faults
    assert words.tolist() == [int.from_bytes(DATA[at : at + 8], "little") for at in offsets.tolist()]
    assert len(server.asked) - before == 4


def test_what_was_read_is_kept(server: Server) -> None:
    file = RemoteFile(server.url, {})
    assert file.read(5, 100) == DATA[5:105]
    before = len(server.asked)
    assert file.read(50, 4000) == DATA[50:4050]
    assert len(server.asked) == before


def test_an_image_behind_a_url_is_recognised_by_its_content(server: Server) -> None:
    page = os.urandom(4096)
    server.data = lime_image([(0x10000, page)])
    assert str(chain_of(server.url).links[0][1]).startswith("lime:")
    with open_target(server.url) as machine:
        assert machine.instances("connector")[0].memory.read(0x10000, 4096) == page


def test_the_command_line_reads_it(server: Server) -> None:
    command = [sys.executable, "-m", "cloudfs", "read", "--raw", server.url, "physical", "4096", "64"]
    done = subprocess.run(command, capture_output=True, timeout=60, check=False)
    assert done.stdout == DATA[4096:4160], done.stderr


def test_a_server_that_gives_no_parts_is_refused_with_advice(server: Server) -> None:
    server.ranges = False
    with pytest.raises(UnsupportedError, match="download"):
        RemoteFile(server.url, {})


def test_a_file_that_changed_its_size_is_an_error_and_no_bytes(server: Server) -> None:
    file = RemoteFile(server.url, {})
    server.data = DATA[:100]
    with pytest.raises(EngineError):
        file.read(BLOCK, 10)


def test_a_failed_request_is_tried_again_by_the_next_reader(server: Server) -> None:
    file = RemoteFile(server.url, {})
    server.spoil = lambda number: b"short"
    with pytest.raises(TargetGoneError):
        file.read(0, 10)
    server.spoil = lambda number: None
    assert file.read(0, 10) == DATA[:10]


def test_a_server_that_is_gone_is_said(server: Server) -> None:
    file = RemoteFile(server.url, {})
    server.close()
    with pytest.raises(EngineError, match="cannot be read"):
        file.read(0, 10)


def test_what_is_not_there_is_said(server: Server) -> None:
    with pytest.raises(NotFoundError, match="there is no http"):
        RemoteFile(server.url + "-not", {})


def test_a_server_that_is_not_there_is_not_taken_for_a_missing_file(server: Server) -> None:
    server.close()
    with pytest.raises(TargetGoneError, match="cannot be opened: Connection refused"):
        RemoteFile(server.url, {})


def test_a_server_that_says_nothing_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.remote_file.SILENCE", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(TargetGoneError, match="no answer within"):
        RemoteFile(f"http://127.0.0.1:{silent.getsockname()[1]}/image", {})


def test_a_server_that_refuses_is_said_with_its_status(server: Server) -> None:
    with pytest.raises(TargetGoneError, match="the server answers with status 503"):
        RemoteFile(server.url + "-busy", {})


def test_any_scheme_of_fsspec_is_read() -> None:
    with fsspec.open("memory://image", "wb") as file:
        file.write(DATA)
    connector = RawConnector.open("memory://image", {}, parent=None, writable=False)
    with contextlib.closing(connector):
        assert connector.memory.read(BLOCK - 10, 20) == DATA[BLOCK - 10 : BLOCK + 10]
        assert not connector.info.live


def test_a_scheme_that_nobody_knows_is_a_wrong_argument() -> None:
    with pytest.raises(InvalidArgumentError, match="nonsense"):
        RemoteFile("nonsense://host/image", {})


def test_neither_writing_nor_live_reading_is_promised(server: Server) -> None:
    with pytest.raises(ReadOnlyError):
        RemoteFile(server.url, {}, writable=True)
    with pytest.raises(InvalidArgumentError, match="live"):
        RemoteFile(server.url, {"live": "yes"})


def test_a_password_is_not_shown() -> None:
    assert "secret" not in without_password("sftp://me:secret@host:22/image")
    assert without_password("https://host/image") == "https://host/image"


@pytest.mark.parametrize(
    ("target", "url"),
    [("https://h/x", True), ("zip::https://h/x", True), ("raw:https://h/x", False), ("./a://b", False), ("a:b", False)],
)
def test_what_is_a_url(target: str, url: bool) -> None:
    assert is_url(target) is url


def test_without_fsspec_a_sentence_says_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "fsspec.py").write_text("raise ImportError('no')\n")
    done = subprocess.run(
        [sys.executable, "-m", "cloudfs", "info", "https://host/image"],
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}:{os.getcwd()}"},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert "cloudfs[remote]" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("scheme", ["ssh", "sftp"])
def test_without_paramiko_a_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch, scheme: str) -> None:
    monkeypatch.setitem(sys.modules, "paramiko", None)
    with pytest.raises(PluginError, match=r"paramiko is not installed: pip install 'cloudfs\[ssh\]'"):
        RemoteFile(f"{scheme}://nobody@127.0.0.1/image", {})
