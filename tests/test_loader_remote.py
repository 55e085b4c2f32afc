"""Shards that lie elsewhere: fetched once, checked, read as local ones."""

from __future__ import annotations

import shutil
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import tiny_dataset as tiny

from anonfw.data.card import DataError
from anonfw.data.loader import FaceLoader

pytestmark = pytest.mark.skipif(shutil.which("curl") is None, reason="webdataset fetches with curl, which is not here")


class Handler(SimpleHTTPRequestHandler):
    asked: list[str] = []

    def do_GET(self) -> None:
        self.asked.append(self.path)
        super().do_GET()

    def log_message(self, *args) -> None:
        pass


@pytest.fixture
def dataset(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.setenv("ANONFW_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    return tiny.write(tmp_path / "tiny")


@pytest.fixture
def address(dataset: Path):
    Handler.asked.clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(dataset.parent)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/tiny"
    server.shutdown()
    thread.join()
    server.server_close()


def epoch(where: str | Path, **arguments) -> list[list[str]]:
    return [batch.key for batch in FaceLoader(where, "train", 4, workers=0, **arguments)]


def test_http_shards_are_fetched_once(dataset: Path, address: str, tmp_path: Path):
    assert epoch(address, sidecars=[tiny.ENCODER]) == epoch(dataset)
    tars = [path for path in Handler.asked if path.endswith(".tar")]
    assert tars == [f"/tiny/tiny-train-00000{i}.tar" for i in range(4)]  # nothing of the other split
    Handler.asked.clear()
    assert epoch(address, sidecars=[tiny.ENCODER]) == epoch(dataset)
    assert Handler.asked == ["/tiny/card.json", f"/tiny/{tiny.ENCODER}.sidecar.json"]
    assert not list((tmp_path / "cache").rglob("*.temp*"))


def test_a_shard_that_was_replaced_is_fetched_again(dataset: Path, address: str):
    epoch(address)
    shutil.rmtree(dataset)
    tiny.write(dataset, first=50)
    assert epoch(address) == epoch(dataset)


def test_a_pipe_fetches_too(dataset: Path):
    assert epoch(f"pipe:cat {dataset}/{{}}") == epoch(dataset)
    with pytest.raises(DataError, match="a pipe needs"):
        epoch(f"pipe:cat {dataset}/card.json")


def test_what_cannot_be_fetched_is_an_error(dataset: Path, address: str, tmp_path: Path):
    with pytest.raises(DataError, match=r"cannot fetch .*/nothing/card\.json"):
        epoch(address.replace("tiny", "nothing"))
    with pytest.raises(DataError, match="anonfw embed|cannot fetch"):
        epoch(address, sidecars=["edgeface_s"])
    (dataset / "tiny-train-000002.tar").unlink()
    with pytest.raises(DataError, match=r"cannot fetch .*tiny-train-000002\.tar"):
        epoch(address)
    assert not list((tmp_path / "cache").rglob("*.temp*"))


def test_a_shard_with_another_hash_is_refused(dataset: Path, address: str):
    tar = dataset / "tiny-train-000001.tar"
    content = bytearray(tar.read_bytes())
    content[2000] ^= 1
    tar.write_bytes(bytes(content))
    with pytest.raises(DataError, match=r"tiny-train-000001\.tar from .* its card says"):
        epoch(address)
