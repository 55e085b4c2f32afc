"""FaceLoader without pictures: sidecars, labels and factors alone."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import tiny_dataset as tiny
import torch
from hypothesis import given
from hypothesis import strategies as st

from anonfw.data import order
from anonfw.data.card import Card, DataError, Shard
from anonfw.data.embeddings import save_sidecar
from anonfw.data.files import sha256_of
from anonfw.data.loader import FaceLoader


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    return tiny.write(tmp_path_factory.mktemp("sidecars") / "tiny", 17, 5, [3, 1, 4, 2], 8)


def loader(dataset: Path, tmp_path: Path, **arguments) -> FaceLoader:
    given = {
        "batch_size": 4,
        "workers": 0,
        "sidecars": [tiny.ENCODER],
        "per_identity": 2,
        "mode": "groups",
        **arguments,
    }
    return FaceLoader(dataset, "train", bad_samples_file=tmp_path / "bad.jsonl", **given)


@given(
    st.integers(0, 2**40), st.integers(0, 99), st.lists(st.integers(2, 9), min_size=1, max_size=6), st.integers(1, 12)
)
def test_members_by_the_loop(seed: int, epoch: int, counts: list[int], wanted: int):
    """The order of old checkpoints: a person at a time."""
    count = np.array(counts)
    first, person = np.cumsum(count) - count + 3, np.arange(len(count)) * 100_003
    found = order.members(seed, epoch, person, first, count, wanted)
    for row in range(len(count)):
        noise = order.bits(seed, epoch, order.MEMBERS, np.arange(count[row]) + (int(person[row]) << 24))
        drawn = np.resize(np.argsort(noise, kind="stable"), wanted)
        assert found[row].tolist() == (first[row] + drawn).tolist()


@pytest.mark.parametrize("mode", ["images", "pairs", "groups"])
@pytest.mark.parametrize("shuffle", [True, False])
def test_the_same_batches_but_for_the_pictures(dataset, tmp_path, mode, shuffle):
    with_pictures = loader(dataset, tmp_path, mode=mode, shuffle=shuffle)
    without = loader(dataset, tmp_path, mode=mode, shuffle=shuffle, decode=False, workers=2)
    count = 0
    for a, b in zip(with_pictures, without, strict=True):
        count += 1
        for one, other in ((a, b), (a.partner, b.partner)) if mode == "pairs" else ((a, b),):
            assert other.image.shape == (len(one), 3, 0, 0) and other.image.dtype == torch.uint8
            assert one.key == other.key
            for name in ("identity", "index", "landmarks"):
                assert torch.equal(getattr(one, name), getattr(other, name))
            for name in ("factors", "embeddings"):
                assert getattr(one, name).keys() == getattr(other, name).keys()
                for key, value in getattr(one, name).items():
                    torch.testing.assert_close(getattr(other, name)[key], value, rtol=0, atol=0, equal_nan=True)
    assert count == len(without) == len(with_pictures) > 2


def test_no_process_and_no_tar(dataset, tmp_path, monkeypatch):
    import subprocess

    from anonfw.data import decode

    def refuse(*_, **__):
        raise AssertionError("no picture was asked for")

    made = loader(dataset, tmp_path, decode=False, workers=2)
    monkeypatch.setattr(subprocess, "Popen", refuse)
    monkeypatch.setattr(decode.Tars, "map", refuse)
    batch = next(iter(made))
    assert batch.embeddings[tiny.ENCODER].shape == (4, 8)
    assert batch.select([1, 0]).key == batch.key[1::-1]
    assert batch.identity[0] == batch.identity[1] != batch.identity[2]


def test_goes_on_where_it_stopped_with_or_without_pictures(dataset, tmp_path):
    whole = [batch.key for batch in loader(dataset, tmp_path, decode=False)]
    first = loader(dataset, tmp_path, decode=False)
    stream = iter(first)
    seen = [next(stream).key for _ in range(2)]
    for decode in (False, True):
        second = loader(dataset, tmp_path, decode=decode)
        second.load_state_dict(first.state_dict())
        assert seen + [batch.key for batch in second] == whole


def test_a_row_without_an_embedding_is_dropped_and_named(tmp_path):
    folder = tiny.write(tmp_path / "tiny", 6, 2, 4, 8)
    path = next(iter(sorted(folder.glob(f"*train*.{tiny.ENCODER}.npy"))))
    array = np.load(path)
    array[3] = np.nan
    np.save(path, array)
    made = loader(folder, tmp_path, decode=False, mode="images", shuffle=False, max_bad_share=0.5)
    batches = list(made)
    assert sum(map(len, batches)) == 23 and all(torch.isfinite(b.embeddings[tiny.ENCODER]).all() for b in batches)
    (bad,) = [json.loads(line) for line in (tmp_path / "bad.jsonl").read_text().splitlines()]
    assert "NaN" in bad["reason"] and bad["row"] == 3
    assert bad["key"] not in [key for batch in batches for key in batch.key]


def test_refusals(dataset, tmp_path):
    for wrong in ({"flip": 0.5}, {"sidecars": []}):
        with pytest.raises(ValueError, match="decode=False"):
            loader(dataset, tmp_path, decode=False, **wrong)
    with pytest.raises(DataError, match="no other embeddings at all"):
        loader(dataset, tmp_path, decode=False, sidecars=["other"])


def test_sidecars_missing_for_one_shard(tmp_path):
    folder = tiny.write(tmp_path / "tiny", 6, 2, 4, 8)
    missing = sorted(folder.glob(f"*train*.{tiny.ENCODER}.npy"))[1]
    missing.unlink()
    shard = missing.name.removesuffix(f".{tiny.ENCODER}.npy")
    with pytest.raises(DataError, match=f"no {tiny.ENCODER} embeddings for {shard}.tar.*anonfw embed"):
        loader(folder, tmp_path, decode=False)


def test_one_photo_a_person(tmp_path):
    folder = tiny.write(tmp_path / "tiny", 9, 2, 1, 8)
    with pytest.raises(DataError, match="0 people with two photos or more.*Each person has one photo.*triplets"):
        loader(folder, tmp_path, decode=False)


def test_an_empty_split(tmp_path):
    folder = tiny.write(tmp_path / "tiny", 6, 2, 4, 8)
    tar = folder / "tiny-nobody-000000.tar"
    tarfile.open(tar, "w").close()
    card = Card.load(folder)
    card.shards.append(Shard(tar.name, "nobody", 0, 0, tar.stat().st_size, sha256_of(tar)))
    card.save(folder)
    save_sidecar(folder, card.shards[-1], tiny.ENCODER, tiny.WEIGHTS, np.zeros((0, 8)))
    for mode, complaint in (("images", "0 samples"), ("groups", "0 people with two photos or more")):
        with pytest.raises(DataError, match=rf"tiny \(nobody\) has {complaint}: too few for batch_size=4"):
            FaceLoader(folder, "nobody", 4, mode, [tiny.ENCODER], workers=0, decode=False, per_identity=2)
    with pytest.raises(DataError, match="no split 'other'; it has train, val, nobody"):
        FaceLoader(folder, "other", 4, workers=0)
