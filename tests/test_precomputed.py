"""Captions, latents and encoded captions beside the shards: what `embed` writes, and what the loader makes of it."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny_dataset as tiny
import torch
import torch.nn.functional as F

from anonfw import tiny_pipelines
from anonfw.__main__ import main
from anonfw.data.captions import Captions, captions_path, describe, mirrored, save_captions
from anonfw.data.card import Card, DataError
from anonfw.data.files import sha256_of
from anonfw.data.latents import folder_sha256
from anonfw.data.loader import FaceLoader
from anonfw.nets.autoencoders import autoencoder_folder
from anonfw.nets.backbone import Backbone
from anonfw.nets.codec import Autoencoder

SIZE = 48


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> Path:
    return tiny_pipelines.save(tmp_path_factory.mktemp("pipelines") / "sd15", "sd15")


def describe_all(folder: Path) -> None:
    """Captions as `embed --captions` keeps them, said from the factors alone."""
    for shard in Card.load(folder).shards:
        person = ("person", "person")
        turned = [f"{age}-year-old woman, looking " for age in range(30, 30 + shard.samples)]
        both = [(one + "left", one + "right") if row % 2 else person for row, one in enumerate(turned)]
        save_captions(folder, shard, both)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory, pipeline) -> Path:
    folder = tiny.write(tmp_path_factory.mktemp("precomputed") / "tiny", 5, 2, 3, 8)
    describe_all(folder)
    assert main(["embed", str(folder), "--latents", str(pipeline), "--size", str(SIZE), "--batch-size", "5"]) == 0
    assert main(["embed", str(folder), "--text", str(pipeline)]) == 0
    return folder


@pytest.fixture
def copy(dataset, tmp_path) -> Path:
    return Path(shutil.copytree(dataset, tmp_path / "copy"))


def loader(folder: Path, pipeline: Path, tmp_path: Path, **arguments) -> FaceLoader:
    given = {"batch_size": 5, "workers": 0, "latents": {"source": str(pipeline), "size": SIZE}, **arguments}
    return FaceLoader(folder, "train", bad_samples_file=tmp_path / "bad.jsonl", **given)


def encoded(pipeline: Path, images: torch.Tensor) -> torch.Tensor:
    x = F.interpolate(images.float().div(127.5).sub(1), (SIZE, SIZE), mode="bicubic", antialias=True).clamp(-1, 1)
    return Autoencoder(str(pipeline), "vae").encode(x)


@pytest.mark.parametrize("flip", [0.0, 1.0, 0.5])
def test_latents_are_those_of_the_pictures_of_the_batch(dataset, pipeline, tmp_path, flip):
    """Of the mirrored picture where it is mirrored. The mirrored latents are something else."""
    for batch in loader(dataset, pipeline, tmp_path, flip=flip, mode="pairs"):
        for side in (batch, batch.partner):
            wanted = encoded(pipeline, side.image)
            assert side.latents.dtype == torch.float32
            assert torch.allclose(side.latents, wanted, atol=2e-3 * float(wanted.abs().max()))
    assert not torch.allclose(
        encoded(pipeline, batch.image.flip(-1)).flip(-1), encoded(pipeline, batch.image), atol=1e-2
    )


def test_without_pictures_the_same_latents_captions_and_landmarks(dataset, pipeline, tmp_path):
    arguments = {"flip": 0.5, "captions": True, "text": {"source": str(pipeline)}, "sidecars": [tiny.ENCODER]}
    with_pictures = loader(dataset, pipeline, tmp_path, **arguments)
    without = loader(dataset, pipeline, tmp_path, decode=False, **arguments)
    for a, b in zip(with_pictures, without, strict=True):
        assert b.image.shape[1:] == (3, 0, 0) and a.key == b.key and a.caption == b.caption
        assert torch.equal(a.latents, b.latents) and torch.equal(a.landmarks, b.landmarks)
        assert torch.equal(a.text["states"], b.text["states"]) and torch.equal(a.factors["yaw"], b.factors["yaw"])


def test_a_mirrored_picture_has_the_mirrored_caption(dataset, pipeline, tmp_path):
    plain = {
        k: c for b in loader(dataset, pipeline, tmp_path, captions=True) for k, c in zip(b.key, b.caption, strict=True)
    }
    turned = loader(dataset, pipeline, tmp_path, captions=True, flip=1.0)
    turned = {k: c for b in turned for k, c in zip(b.key, b.caption, strict=True)}
    assert "left" in "".join(plain.values())
    assert turned == {key: caption.replace("left", "right") for key, caption in plain.items()}


def test_text_states_are_those_of_the_caption_and_stored_once(dataset, pipeline, tmp_path):
    network = Backbone(str(pipeline))
    for batch in loader(dataset, pipeline, tmp_path, captions=True, text={"source": str(pipeline)}, flip=0.5):
        wanted = network.encode_text(batch.caption).states
        assert set(batch.text) == {"states"} and batch.text["states"].shape == wanted.shape
        assert torch.allclose(batch.text["states"], wanted, atol=5e-3)
    for shard in Card.load(dataset).shards:
        found = Captions(dataset, [shard]).distinct[0]
        array = np.load(next(dataset.glob(f"{shard.stem}.text_????????.npy")))
        assert len(found) == len(set(found)) == len(array) < 2 * shard.samples


def test_two_text_encoders_give_pooled_vectors_too(tmp_path):
    sdxl = tiny_pipelines.save(tmp_path / "sdxl", "sdxl")
    folder = tiny.write(tmp_path / "tiny", 2, 1, 3, 8)
    describe_all(folder)
    assert main(["embed", str(folder), "--text", str(sdxl)]) == 0
    batch = next(iter(FaceLoader(folder, "train", 4, workers=0, captions=True, text={"source": str(sdxl)})))
    wanted = Backbone(str(sdxl)).encode_text(batch.caption)
    assert torch.allclose(batch.text["states"], wanted.states, atol=5e-3)
    assert torch.allclose(batch.text["pooled"], wanted.pooled, atol=5e-3)


def test_select_and_concatenate_keep_them(dataset, pipeline, tmp_path):
    from anonfw.batch import FaceBatch

    a, b = list(loader(dataset, pipeline, tmp_path, captions=True, text={"source": str(pipeline)}))[:2]
    both = FaceBatch.concatenate([a, b])
    rows = [3, len(a) + 1]
    taken = both.select(rows)
    assert taken.caption == [a.caption[3], b.caption[1]]
    assert torch.equal(taken.latents, torch.stack([a.latents[3], b.latents[1]]))
    assert torch.equal(taken.text["states"][1], b.text["states"][1])


def test_it_goes_on_where_it_stopped(copy, pipeline, capsys):
    """A lost array is made again, the others are left alone."""
    found = sorted(copy.glob("*.latents_*.npy"))
    wanted = {path.name: sha256_of(path) for path in found}
    found[1].unlink()
    others = [path.stat().st_mtime_ns for path in found if path.exists()]
    assert main(["embed", str(copy), "--latents", str(pipeline), "--size", str(SIZE), "--batch-size", "5"]) == 0
    assert "1 shards written" in capsys.readouterr().out
    assert {path.name: sha256_of(path) for path in found} == wanted
    assert [path.stat().st_mtime_ns for path in found if path != found[1]] == others
    assert not list(copy.glob(".*partial"))


def test_another_autoencoder_or_size_is_refused(dataset, pipeline, tmp_path):
    other = Path(shutil.copytree(pipeline, tmp_path / "other"))
    config = json.loads((other / "vae" / "config.json").read_text())
    (other / "vae" / "config.json").write_text(json.dumps(config | {"scaling_factor": 0.5}))
    with pytest.raises(DataError, match=f"embed .* --latents {other} --size {SIZE}"):
        loader(dataset, other, tmp_path)
    with pytest.raises(DataError, match="no latents_.*_64 for"):
        loader(dataset, pipeline, tmp_path, latents={"source": str(pipeline), "size": 64})
    with pytest.raises(DataError, match="given as"):
        loader(dataset, pipeline, tmp_path, latents={"size": 64})
    assert folder_sha256(autoencoder_folder(str(other))) != folder_sha256(autoencoder_folder(str(pipeline)))


def test_a_record_of_another_network_is_refused(copy, pipeline, tmp_path):
    record = next(copy.glob("latents_*.sidecar.json"))
    record.write_text(json.dumps(json.loads(record.read_text()) | {"sha256": "b" * 64}))
    with pytest.raises(DataError, match="another network"):
        loader(copy, pipeline, tmp_path)


def test_arrays_of_another_tar_or_damaged_ones_are_refused(copy, pipeline, tmp_path):
    array = sorted(copy.glob("*train*.latents_*.npy"))[0]
    content = array.read_bytes()
    array.write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match="damaged|shape"):
        loader(copy, pipeline, tmp_path)
    array.write_bytes(content)
    record = next(copy.glob("latents_*.sidecar.json"))
    value = json.loads(record.read_text())
    value["shards"][sorted(value["shards"])[0]]["made_from"] = "c" * 64
    record.write_text(json.dumps(value))
    with pytest.raises(DataError, match="another version"):
        loader(copy, pipeline, tmp_path)


def test_text_of_other_captions_is_refused(copy, pipeline, tmp_path):
    """Captions that were written again in between."""
    shard = Card.load(copy).of_split("train")[0]
    save_captions(copy, shard, [("man", "man")] * shard.samples)
    with pytest.raises(DataError, match="its captions"):
        loader(copy, pipeline, tmp_path, captions=True, text={"source": str(pipeline)})


def test_missing_captions_say_what_to_run(copy, pipeline, tmp_path):
    captions_path(copy / Card.load(copy).of_split("train")[1].file).unlink()
    with pytest.raises(DataError, match="embed .* --captions"):
        loader(copy, pipeline, tmp_path, captions=True)


def test_a_broken_picture_has_no_latents_and_is_left_out(tmp_path, pipeline):
    folder = tiny.write(tmp_path / "tiny", 2, 1, 3, 8)
    import tarfile

    tar = next(folder.glob("*train*.tar"))
    with tarfile.open(tar) as file:
        member = next(m for m in file.getmembers() if m.name.endswith(".jpg"))
    with open(tar, "r+b") as file:
        file.seek(member.offset_data + 20)
        file.write(b"\0" * (member.size - 40))
    card = json.loads((folder / "card.json").read_text())
    for shard in card["shards"]:
        if shard["file"] == tar.name:
            shard["sha256"] = sha256_of(tar)
    (folder / "card.json").write_text(json.dumps(card))
    for index in folder.glob("*.index.npz"):
        index.unlink()
    assert main(["embed", str(folder), "--latents", str(pipeline), "--size", str(SIZE)]) == 0
    found = loader(folder, pipeline, tmp_path, decode=False, batch_size=6, max_bad_share=0.5)
    batch = next(iter(found))
    assert len(batch) == 5 and batch.latents.isfinite().all()


def test_latents_and_size_go_together(dataset, capsys):
    assert main(["embed", str(dataset), "--latents", "taesd"]) == 2
    assert "--size" in capsys.readouterr().err


def test_describing_says_what_is_clear_and_no_more():
    factors = {"smile": 1.2, "yaw": 12.0, "pitch": math.nan, "mouth_open": 0.1, "brightness": 0.5}
    assert describe(factors, 34.6, 0.97) == "35-year-old woman, smiling, looking right"
    assert describe(mirrored(factors), 34.6, 0.97) == "35-year-old woman, smiling, looking left"
    assert describe({}, None, 0.5) == "person"
    assert describe({"smile": 0.5}, None, 0.01) == "man, neutral"


def test_the_embedded_faces_have_captions(embedded):
    shards = Card.load(embedded).shards
    captions = Captions(embedded, shards)
    for shard, numbers in zip(shards, captions.numbers, strict=True):
        assert len(numbers) == shard.samples
    words = " ".join(sentence for found in captions.distinct for sentence in found)
    assert "woman" in words and "man" in words and "smiling" in words and "looking left" in words
