"""Data sets on disk: what the writer promises, what the index finds, what is refused."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
import tiny_dataset as tiny

from anonfw.data import index as index_module
from anonfw.data.card import Card, DataError
from anonfw.data.embeddings import Sidecar, load_embeddings, read_record, sidecar_path
from anonfw.data.index import NO_IMAGE, NO_RECORD, OK, TRUNCATED, Index, build_index, index_path, open_index
from anonfw.data.verify import verify_dataset
from anonfw.data.writer import DatasetWriter, Sample
from anonfw.identity.base import Recognizer


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    return tiny.write(tmp_path / "tiny")


def writer_of(folder: Path, **changes) -> DatasetWriter:
    settings = {"name": "tiny", "image_size": tiny.SIZE, "alignment": "arcface", "source": "noise", "licence": "none"}
    return DatasetWriter(folder, **{**settings, **changes})


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def edit_card(folder: Path, **changes) -> None:
    value = json.loads((folder / "card.json").read_text())
    (folder / "card.json").write_text(json.dumps({**value, **changes}))


# What is written


def test_shard_layout(dataset: Path):
    people_of_shard = []
    for shard in Card.load(dataset).shards:
        with tarfile.open(dataset / shard.file) as tar:
            members = tar.getmembers()
            assert {(m.mtime, m.uid, m.gid, m.mode, bool(m.pax_headers)) for m in members} == {(0, 0, 0, 0o644, False)}
            names = [member.name for member in members]
            assert names[1::2] == [name.replace(".jpg", ".json") for name in names[::2]]
            records = [json.loads(tar.extractfile(name).read()) for name in names[1::2]]
            assert all(member.size <= 512 for member in members[1::2])
        assert {record["split"] for record in records} == {shard.split}
        order = [record["identity"] for record in records]
        assert order == sorted(order, key=order.index)
        people_of_shard.append(set(order))
        # Nothing but the two blocks a member and the end marker: no PAX headers.
        payload = sum(512 + -(-member.size // 512) * 512 for member in members)
        assert (dataset / shard.file).stat().st_size == -(-(payload + 1024) // tarfile.RECORDSIZE) * tarfile.RECORDSIZE
    assert len(set.union(*people_of_shard)) == sum(map(len, people_of_shard)) == 14
    assert verify_dataset(dataset) == []


def test_same_input_same_bytes(dataset: Path, tmp_path: Path):
    assert contents(tiny.write(tmp_path / "again")) == contents(dataset)


def test_card_counts(dataset: Path):
    card = json.loads((dataset / "card.json").read_text())
    assert card["schema"] == 1 and card["complete"]
    assert card["splits"] == {
        "train": {"samples": 30, "identities": 10},
        "val": {"samples": 12, "identities": 4},
    }
    assert [shard["samples"] for shard in card["shards"]] == [9, 9, 9, 3, 9, 3]


def test_plain_webdataset_reads_the_shards(dataset: Path):
    webdataset = pytest.importorskip("webdataset")
    urls = [str(dataset / shard.file) for shard in Card.load(dataset).of_split("train")]
    read = list(webdataset.WebDataset(urls, shardshuffle=False).decode("rgb8"))
    written = [(name, sample) for name, samples in tiny.people(10) for sample in samples]
    assert [sample["__key__"] for sample in read] == [sample.key for _, sample in written]
    for sample, (identity, original) in zip(read, written, strict=True):
        assert sample["json"]["identity"] == identity
        assert np.array_equal(sample["jpg"], simplejpeg.decode_jpeg(original.jpeg))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"key": "a.b"}, "letters, digits"),
        ({"key": "p000_0"}, "already written"),
        ({"jpeg": b"\x89PNG"}, "not a JPEG"),
        ({"landmarks": [[0, 0]] * 4}, "landmarks"),
        ({"factors": {"yaw": float("nan")}}, "yaw"),
    ],
)
def test_writer_refuses_samples_outside_the_schema(tmp_path: Path, change: dict, message: str):
    with pytest.raises(ValueError, match=message), writer_of(tmp_path) as writer:
        writer.add_identity("train", "one", [Sample("p000_0", tiny.jpeg(0))])
        writer.add_identity("train", "two", [Sample(**{"key": "new", "jpeg": tiny.jpeg(1), **change})])


def test_writer_refuses_an_identity_twice(tmp_path: Path):
    with pytest.raises(ValueError, match="already written"), writer_of(tmp_path) as writer:
        writer.add_identity("train", "one", [Sample("a", tiny.jpeg(0))])
        writer.add_identity("val", "one", [Sample("b", tiny.jpeg(1))])


def test_writer_refuses_another_data_set_and_a_second_writer(dataset: Path):
    with pytest.raises(DataError, match="image_size"), writer_of(dataset, image_size=64):
        pass
    with writer_of(dataset), pytest.raises(DataError, match="another writer"), writer_of(dataset):
        pass
    assert verify_dataset(dataset) == []


def test_writer_of_nothing_is_an_error(tmp_path: Path):
    with pytest.raises(DataError, match="nothing was written"), writer_of(tmp_path):
        pass


def test_more_people_can_be_added_later(dataset: Path):
    with writer_of(dataset, shard_samples=8, sidecars={tiny.ENCODER: tiny.WEIGHTS}) as writer:
        for identity, samples in tiny.people(2, first=20):
            assert not writer.done(identity)
            writer.add_identity("train", identity, samples)
        assert writer.done("person 0")
    assert verify_dataset(dataset) == []
    assert Card.load(dataset).of_split("train")[-1].samples == 6


# Killed writers

KILLED = """
import sys, time
sys.path.insert(0, {tests!r})
import tiny_dataset as tiny
from anonfw.data.writer import DatasetWriter
with DatasetWriter({out!r}, name="tiny", image_size=tiny.SIZE, alignment="arcface", source="noise", licence="none",
                   shard_samples=8, sidecars={{tiny.ENCODER: tiny.WEIGHTS}}) as writer:
    for number, (identity, samples) in enumerate(tiny.people(14)):
        if writer.done(identity):
            continue
        writer.add_identity("train" if number < 10 else "val", identity, samples)
        print(number, flush=True)
        if number == {stop}:
            time.sleep(60)
"""


@pytest.mark.parametrize("stop", [1, 4, 11])
def test_killed_writer_leaves_whole_shards_and_continues(tmp_path: Path, dataset: Path, stop: int):
    out = tmp_path / "killed"
    program = KILLED.format(tests=str(Path(__file__).parent), out=str(out), stop=stop)
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1]
    )
    for line in process.stdout:
        if int(line) == stop:
            break
    process.send_signal(signal.SIGKILL)
    process.wait()
    with pytest.raises(DataError, match="unfinished"):
        Card.load(out)
    named = {shard.file for shard in Card.load(out, complete=False).shards}
    assert {path.name for path in out.glob("*.tar")} == named
    assert any(out.glob(".*.partial"))
    finished = subprocess.run(
        [sys.executable, "-c", program.replace(f"== {stop}", "== -1")],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
        check=True,
    )
    assert len(finished.stdout.split()) == 14 - 3 * len(named)  # a full shard holds three people
    assert contents(out) == contents(dataset)


def test_an_exception_keeps_finished_shards_and_no_partial_one(tmp_path: Path):
    with pytest.raises(RuntimeError), writer_of(tmp_path, shard_samples=8) as writer:
        for identity, samples in tiny.people(4):
            writer.add_identity("train", identity, samples)
        raise RuntimeError("of the caller")
    assert len(list(tmp_path.glob("*.tar"))) == 1
    assert not list(tmp_path.glob(".*"))


# Index


def test_index_agrees_with_tarfile(dataset: Path):
    shard = Card.load(dataset).shards[0]
    index = open_index(dataset / shard.file, shard)
    with tarfile.open(dataset / shard.file) as tar:
        pictures = [member for member in tar if member.name.endswith(".jpg")]
    assert index.offset.tolist() == [member.offset_data for member in pictures]
    assert index.size.tolist() == [member.size for member in pictures]
    assert index.names[index.person].tolist() == [f"person {i // 3}".encode() for i in range(9)]
    assert index.factor_names.tolist() == [b"pitch", b"smile", b"yaw"]
    assert index.factors[:, 2].tolist() == list(range(1, 10))
    assert np.allclose(
        index.landmarks[2], [[8.02, 10.02], [22.02, 11.02], [15.02, 17.02], [9.02, 25.02], [21.02, 26.02]]
    )
    assert not index.fault.any()


def test_index_of_a_tar_with_pax_headers_and_folders(dataset: Path, tmp_path: Path):
    """Other writers: webdataset's own stamps a time, so each member gets a PAX header; tar itself adds folders."""
    shard = Card.load(dataset).shards[0]
    other = tmp_path / "other.tar"
    with tarfile.open(dataset / shard.file) as tar, tarfile.open(other, "w", format=tarfile.PAX_FORMAT) as out:
        folder = tarfile.TarInfo("shard")
        folder.type = tarfile.DIRTYPE
        out.addfile(folder)
        for member in tar:
            content = tar.extractfile(member).read()
            member.name, member.mtime = f"shard/{member.name}", 1234.5678
            out.addfile(member, io.BytesIO(content))
    ours, theirs = build_index(dataset / shard.file), build_index(other)
    assert theirs.key.tolist() == ours.key.tolist()
    assert theirs.size.tolist() == ours.size.tolist()
    assert not np.array_equal(theirs.offset, ours.offset)
    content = other.read_bytes()
    assert all(content[o : o + 2] == b"\xff\xd8" for o in theirs.offset.tolist())


@pytest.mark.parametrize("spoil", ["delete", "truncate", "garbage", "of another tar"])
def test_unusable_index_is_built_again(dataset: Path, spoil: str):
    first, second = Card.load(dataset).shards[:2]
    path = index_path(dataset / first.file)
    good = path.read_bytes()
    if spoil == "delete":
        path.unlink()
    elif spoil == "truncate":
        path.write_bytes(good[: len(good) // 2])
    elif spoil == "garbage":
        path.write_bytes(b"PK\x03\x04 no zip")
    else:
        shutil.copy(index_path(dataset / second.file), path)
    assert open_index(dataset / first.file, first).key[0] == b"p000_0"
    assert path.read_bytes() == good


def test_a_tar_newer_than_its_index_is_hashed_again(dataset: Path):
    shard = Card.load(dataset).shards[0]
    tar = dataset / shard.file
    before = index_path(tar).stat().st_mtime_ns
    os.utime(tar, ns=(before + 10**9, before + 10**9))  # as a copy or a checkout leaves it
    assert not open_index(tar, shard).fault.any()
    assert index_path(tar).stat().st_mtime_ns > before
    content = bytearray(tar.read_bytes())
    content[600] ^= 0xFF
    time.sleep(0.01)
    tar.write_bytes(bytes(content))
    after = index_path(tar).stat().st_mtime_ns + 10**9
    os.utime(tar, ns=(after, after))
    assert open_index(tar, shard).sha256 != shard.sha256


def test_index_of_a_read_only_folder_is_cached(dataset: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("ANONFW_CACHE", str(tmp_path / "cache"))
    shard = Card.load(dataset).shards[0]
    tar = dataset / shard.file
    index_path(tar).unlink()
    save = Index.save

    def refuse(self, path: Path) -> None:  # permissions do not stop a test that runs as root
        if path.parent == dataset:
            raise PermissionError(path)
        save(self, path)

    monkeypatch.setattr(Index, "save", refuse)
    open_index(tar, shard)
    (cached,) = (tmp_path / "cache").rglob("*.index.npz")
    assert not index_path(tar).exists()
    monkeypatch.setattr(index_module, "build_index", lambda _: pytest.fail("the cached index was not used"))
    assert open_index(tar, shard).sha256 == shard.sha256
    assert cached.is_file()


def test_missing_members_are_seen_by_the_index(tmp_path: Path):
    tar_path = tmp_path / "x.tar"
    with tarfile.open(tar_path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in [
            ("a.jpg", tiny.jpeg(0)),
            ("a.json", b'{"identity": "p"}'),
            ("b.json", b'{"identity": "p"}'),
            ("c.jpg", tiny.jpeg(1)),
            ("d.jpg", tiny.jpeg(2)),
            ("d.json", b'{"identity": '),
        ]:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    index = build_index(tar_path)
    assert index.fault.tolist() == [OK, NO_IMAGE, NO_RECORD, index_module.BAD_RECORD]
    assert index.person.tolist() == [0, 0, -1, -1]


@pytest.mark.parametrize("keep_index", [True, False])
def test_truncated_tar_keeps_its_whole_samples(dataset: Path, keep_index: bool):
    shard = Card.load(dataset).shards[0]
    tar = dataset / shard.file
    whole = open_index(tar, shard)
    cut = int(whole.offset[4]) + 10
    os.truncate(tar, cut)
    if not keep_index:
        index_path(tar).unlink()
    index = open_index(tar, shard)
    assert len(index) == shard.samples
    assert (index.fault == TRUNCATED).tolist() == [False] * 4 + [True] * 5
    assert index.key[:4].tolist() == whole.key[:4].tolist()
    assert index_path(tar).exists() == keep_index  # nothing is stored about a damaged tar


# Refusals


def test_card_refusals(dataset: Path, tmp_path: Path):
    with pytest.raises(DataError, match=r"no such folder.*image_folder\.py"):
        Card.load(tmp_path / "nowhere")
    with pytest.raises(DataError, match="no card"):
        Card.load(tmp_path)
    edit_card(dataset, schema=2)
    with pytest.raises(DataError, match=r"schema version 2.*reads version 1"):
        Card.load(dataset)
    edit_card(dataset, schema=1, complete=False)
    with pytest.raises(DataError, match="Run the same writer command again"):
        Card.load(dataset)
    edit_card(dataset, complete=True, colour="blue")
    with pytest.raises(DataError, match="colour"):
        Card.load(dataset)
    (dataset / "card.json").write_text('{"schema": 1,')
    with pytest.raises(DataError, match="not readable JSON"):
        Card.load(dataset)


def test_missing_and_exchanged_shards_are_refused(dataset: Path):
    first, second = Card.load(dataset).shards[2:4]  # of 9 and 3 samples
    shutil.copy(dataset / second.file, dataset / first.file)
    index_path(dataset / first.file).unlink()
    shutil.copy(dataset / first.file, dataset / "longer.tar")
    content = (dataset / first.file).read_bytes()
    (dataset / first.file).write_bytes(content + bytes(first.bytes))
    with pytest.raises(DataError, match="another tar"):
        open_index(dataset / first.file, first)
    (dataset / first.file).unlink()
    with pytest.raises(DataError, match=r"missing.*writer again"):
        open_index(dataset / first.file, first)


# Sidecars


def test_sidecars_join_by_row(dataset: Path):
    found, person = load_embeddings(dataset, "train", tiny.ENCODER)
    assert found.shape == (30, 8) and found.dtype == np.float32
    assert np.allclose(found, [tiny.embedding(seed) for seed in range(30)], atol=1e-3)
    assert np.allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)
    assert person.tolist() == [i // 3 for i in range(30)]
    array = np.load(sidecar_path(dataset / "tiny-train-000000.tar", tiny.ENCODER), mmap_mode="r")
    assert array.dtype == np.float16 and array.shape == (9, 8)


def test_sidecar_refusals_say_what_to_run(dataset: Path):
    card = Card.load(dataset)
    shards = card.of_split("train")
    run = f"python -m anonfw embed {dataset} --encoder"
    with pytest.raises(DataError, match=f"no edgeface_s embeddings.*{run} edgeface_s"):
        Sidecar(dataset, shards, "edgeface_s")
    with pytest.raises(DataError, match="other weights"):
        Sidecar(dataset, shards, tiny.ENCODER, "b" * 64)
    path = sidecar_path(dataset / shards[1].file, tiny.ENCODER)
    good = path.read_bytes()
    np.save(path, np.load(path)[:-1])
    with pytest.raises(DataError, match=r"shape \(8, 8\).*needs \(9, 8\)"):
        Sidecar(dataset, shards, tiny.ENCODER)
    path.write_bytes(good[:50])
    with pytest.raises(DataError, match="damaged"):
        Sidecar(dataset, shards, tiny.ENCODER)
    path.unlink()
    with pytest.raises(DataError, match=f"for {shards[1].file}"):
        Sidecar(dataset, shards, tiny.ENCODER)
    path.write_bytes(good)
    record = read_record(dataset, tiny.ENCODER)
    record["shards"][shards[1].stem]["tar_sha256"] = "0" * 64
    (dataset / f"{tiny.ENCODER}.sidecar.json").write_text(json.dumps(record))
    with pytest.raises(DataError, match="another version"):
        Sidecar(dataset, shards, tiny.ENCODER)


class MeanColour(Recognizer):
    """The smallest recogniser: three numbers a picture. Counts its calls, and can be stopped."""

    name, dim, size, sha256, licence = "mean_colour", 3, 112, "c" * 64, "none"

    def __init__(self, calls: int = 10**9) -> None:
        super().__init__()
        self.calls, self.left = 0, calls

    def embed(self, images):
        if self.calls >= self.left:
            raise KeyboardInterrupt
        self.calls += 1
        return images.mean((2, 3)) + 2


def test_embedding_goes_on_after_an_interruption(dataset: Path):
    from anonfw.data.sidecars import write_sidecars

    with pytest.raises(KeyboardInterrupt):
        write_sidecars(dataset, MeanColour(calls=2), device="cpu", progress=False)
    assert len(read_record(dataset, "mean_colour")["shards"]) == 2
    encoder = MeanColour()
    assert write_sidecars(dataset, encoder, device="cpu", progress=False) == 4 == encoder.calls
    assert write_sidecars(dataset, MeanColour(calls=0), device="cpu", progress=False) == 0
    found, _ = load_embeddings(dataset, "train", "mean_colour")
    for row in (0, 17, 29):
        mean = simplejpeg.decode_jpeg(tiny.jpeg(row)).mean((0, 1)) / 127.5 + 1
        assert np.allclose(found[row], mean / np.linalg.norm(mean), atol=0.02)
    assert verify_dataset(dataset) == []


def test_new_weights_replace_old_embeddings(dataset: Path):
    from anonfw.data.sidecars import write_sidecars

    write_sidecars(dataset, MeanColour(), device="cpu", progress=False)
    newer = MeanColour()
    newer.sha256 = "d" * 64
    assert write_sidecars(dataset, newer, ["train"], device="cpu", progress=False) == 4
    assert read_record(dataset, "mean_colour")["sha256"] == "d" * 64
    with pytest.raises(DataError, match="for tiny-val-000000"):
        load_embeddings(dataset, "val", "mean_colour")


def test_a_damaged_shard_is_not_embedded(dataset: Path):
    from anonfw.data.sidecars import write_sidecars

    tar = dataset / "tiny-train-000000.tar"
    os.truncate(tar, tar.stat().st_size // 2)
    with pytest.raises(DataError, match="damaged"):
        write_sidecars(dataset, MeanColour(), device="cpu", progress=False)


# The check of a whole data set


def test_verify_finds_each_fault(dataset: Path, tmp_path: Path):
    card = Card.load(dataset)
    tar = dataset / card.shards[0].file
    content = bytearray(tar.read_bytes())
    offset = int(build_index(tar).offset[1])
    content[offset : offset + 100] = bytes(100)
    tar.write_bytes(bytes(content))
    (dataset / card.shards[1].file).unlink()
    shutil.copy(dataset / card.shards[2].file, dataset / "stray.tar")
    array = sidecar_path(dataset / card.shards[2].file, tiny.ENCODER)
    np.save(array, -np.load(array))
    faults = "\n".join(verify_dataset(dataset))
    for expected in (
        f"{card.shards[0].file}: sha256",
        "key 'p000_1': its JPEG is broken",
        f"{card.shards[1].file}: missing",
        "stray.tar: not in the card",
        f"{array.name}: its sha256",
    ):
        assert expected in faults
    assert len(faults.splitlines()) == 5


def test_verify_finds_an_identity_in_two_splits(tmp_path: Path):
    folder = tiny.write(tmp_path / "mixed", photos=1)
    card = json.loads((folder / "card.json").read_text())
    val = next(shard for shard in card["shards"] if shard["split"] == "val")
    twin = {**val, "file": "tiny-val-000009.tar"}
    shutil.copy(folder / val["file"], folder / twin["file"])
    edit_card(folder, shards=[*card["shards"], twin])
    faults = verify_dataset(folder)
    assert any("identity 'person 10' is also in" in fault for fault in faults)
    assert any("key 'p010_0' is also in" in fault for fault in faults)
