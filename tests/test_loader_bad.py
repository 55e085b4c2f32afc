"""Damaged data: skipped, counted, written down, never replaced; too much of it ends the run."""

from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path

import pytest
import tiny_dataset as tiny

from anonfw.data.card import Card, DataError
from anonfw.data.files import sha256_of
from anonfw.data.index import build_index, index_path
from anonfw.data.loader import FaceLoader


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """30 samples of 10 people in four shards."""
    return tiny.write(tmp_path / "tiny")


def damage(dataset: Path, key: str, content: bytes | None, extension: str = "jpg") -> None:
    """Write the shard of a sample again with other bytes in one of its members (None: without it), card and all."""
    card = json.loads((dataset / "card.json").read_text())
    for shard in card["shards"]:
        path = dataset / shard["file"]
        with tarfile.open(path) as tar:
            members = [(member.name, tar.extractfile(member).read()) for member in tar]
        if f"{key}.{extension}" not in dict(members):
            continue
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
            for name, old in members:
                new = content if name == f"{key}.{extension}" else old
                if new is not None:
                    member = tarfile.TarInfo(name)
                    member.size = len(new)
                    tar.addfile(member, io.BytesIO(new))
        index_path(path).unlink(missing_ok=True)
        shard["sha256"], shard["bytes"] = sha256_of(path), path.stat().st_size
        (dataset / "card.json").write_text(json.dumps(card))
        return
    raise AssertionError(key)


def open_loader(dataset: Path, **arguments) -> FaceLoader:
    settings = {"shuffle": False, "workers": 0, "max_bad_share": 0.5, "bad_samples_file": dataset.parent / "bad.jsonl"}
    return FaceLoader(dataset, "train", 4, **{**settings, **arguments})


def written(dataset: Path) -> list[dict]:
    path = dataset.parent / "bad.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


GOOD = tiny.jpeg(0)


@pytest.mark.parametrize(
    ("content", "extension", "reason"),
    [
        (None, "jpg", "no .jpg member"),
        (None, "json", "no .json member"),
        (b'{"identity": 3', "json", ".json member does not follow"),
        (b'{"name": "x"}', "json", ".json member does not follow"),
        (GOOD[:-200], "jpg", "JPEG is broken"),
        (GOOD[: len(GOOD) // 2] + bytes(len(GOOD) // 2), "jpg", "JPEG is broken"),
        (b"", "jpg", "JPEG is broken"),
        (b"\x89PNG\r\n" + bytes(300), "jpg", "JPEG is broken"),
        (tiny.jpeg(0, 48), "jpg", "image size of the card"),
    ],
    ids=["no jpg", "no json", "half json", "other json", "no end", "zeros", "empty", "png", "large"],
)
@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_sample_is_left_out_and_written_down(dataset: Path, content, extension: str, reason: str, workers: int):
    damage(dataset, "p004_1", content, extension)
    loader = open_loader(dataset, workers=workers)
    batches = list(loader)
    loader.close()
    keys = [f"p{i // 3:03d}_{i % 3}" for i in range(30)]
    assert [key for batch in batches for key in batch.key] == [key for key in keys if key != "p004_1"]
    assert [len(batch) for batch in batches] == [4, 4, 4, 3, 4, 4, 4, 2]
    assert all(len(batch.image) == len(batch.identity) == len(batch.landmarks) for batch in batches)
    (record,) = written(dataset)
    assert record["shard"] == "tiny-train-000001.tar" and record["key"] == "p004_1" and record["row"] == 4
    assert reason in record["reason"]
    assert len(loader.bad) == 1


def test_the_rest_is_untouched_by_a_bad_sample(dataset: Path, tmp_path: Path):
    """No substitute: the same rows as without the damage, less one; in pairs the whole row goes."""
    before = {
        mode: [list(zip(b.key, b.partner.key if b.partner else b.key, strict=True)) for b in stream(dataset, mode)]
        for mode in ("images", "pairs")
    }
    damage(dataset, "p004_1", GOOD[:100])
    for mode, expected in before.items():
        found = [list(zip(b.key, b.partner.key if b.partner else b.key, strict=True)) for b in stream(dataset, mode)]
        assert found == [[row for row in rows if "p004_1" not in row] for rows in expected]
        assert found != expected


def stream(dataset: Path, mode: str):
    return list(open_loader(dataset, mode=mode, shuffle=True, seed=3))


def test_ranks_leave_out_the_same_rows(dataset: Path):
    damage(dataset, "p004_1", GOOD[:100])
    alone = [sorted(batch.key) for batch in open_loader(dataset, shuffle=True)]
    ranks = [FaceLoader(dataset, "train", 2, rank=r, world=2, workers=0, max_bad_share=0.5) for r in range(2)]
    for rank in ranks:
        rank.bad.file = dataset.parent / "bad.jsonl"
    together = [sorted(a.key + b.key) for a, b in zip(*ranks, strict=True)]
    assert together == alone
    assert [record["key"] for record in written(dataset)] == ["p004_1"]  # once, whoever met it


@pytest.mark.parametrize("keep_index", [True, False])
def test_a_truncated_tar_loses_its_end_only(dataset: Path, keep_index: bool):
    shard = Card.load(dataset).shards[1]
    tar = dataset / shard.file
    cut = int(build_index(tar).offset[7])
    os.truncate(tar, cut + 20)
    if not keep_index:
        index_path(tar).unlink()
    keys = [key for batch in open_loader(dataset) for key in batch.key]
    assert len(keys) == 28 and not {"p005_1", "p005_2"} & set(keys)
    assert [record["row"] for record in written(dataset)] == [7, 8]
    assert all("truncated" in record["reason"] for record in written(dataset))
    with pytest.raises(DataError, match=r"2 of 30 samples cannot be used, more than the 1.*writer again"):
        open_loader(dataset, max_bad_share=0.05)


def test_a_tar_that_is_cut_while_it_is_read(dataset: Path):
    loader = open_loader(dataset)
    os.truncate(dataset / "tiny-train-000001.tar", 3000)  # after the index was read, before the tar is mapped
    assert [len(batch) for batch in loader] == [4, 4, 2, 2, 4, 4, 2]  # a fixed pass leaves an empty batch out
    assert {record["reason"] for record in written(dataset)} == {"lies behind the end of its tar"}


def test_too_many_bad_samples_end_the_run(dataset: Path):
    for number in range(3):
        damage(dataset, f"p{number:03d}_0", GOOD[:100])
    loader = open_loader(dataset, max_bad_share=0.07)  # two of 30
    with pytest.raises(DataError, match=r"3 of 30 samples.*key p002_0: its JPEG is broken.*bad\.jsonl"):
        list(loader)
    assert len(written(dataset)) == 3
    list(open_loader(dataset, max_bad_share=0.1))
    assert len(written(dataset)) == 3  # written once, also by later runs


def test_a_batch_of_bad_samples_only_is_an_error(dataset: Path):
    for photo in range(3):
        damage(dataset, f"p000_{photo}", GOOD[:100])
    damage(dataset, "p001_0", GOOD[:100])
    with pytest.raises(DataError, match="none of the 4 samples"):
        list(open_loader(dataset, shuffle=True, limit_samples=4, max_bad_share=1))
    assert [len(batch) for batch in open_loader(dataset)] == [4] * 6 + [2]  # a fixed pass goes on without it


def test_no_file_is_made_for_sound_data(dataset: Path):
    list(open_loader(dataset))
    assert not (dataset.parent / "bad.jsonl").exists()
