"""The face model of the package and its adapter: they open, and do what docs/face_model.md says of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from anonfw.batch import FaceBatch
from anonfw.data.loader import FaceLoader
from anonfw.nets.autoencoders import autoencoder
from anonfw.nets.backbone import Backbone
from anonfw.photographs import open_system

RECIPE = Path(__file__).resolve().parent.parent / "recipes" / "face_adapter.yaml"


@pytest.fixture(scope="module")
def system():
    return open_system(RECIPE, ["init=face_adapter"])[0]


@pytest.fixture(scope="module")
def photos(embedded, tmp_path_factory) -> FaceBatch:
    """Photos of four people that it was not trained on."""
    bad = tmp_path_factory.mktemp("bad") / "bad.jsonl"
    loader = FaceLoader(
        embedded, "test", 24, workers=0, shuffle=False, limit_samples=24, sidecars=["arcface_mbf"], bad_samples_file=bad
    )
    batch = next(iter(loader))
    people = batch.identity.tolist()
    return batch.select([people.index(person) for person in sorted(set(people))])


def test_the_base_is_stable_diffusions_layout_and_small():
    backbone = Backbone("face_model")
    assert (backbone.token_width, backbone.factor, backbone.channels) == (128, 8, 4)
    assert backbone.noise.config.prediction_type == "v_prediction"
    folder = Path(backbone.unet.config._name_or_path).parent
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) < 20e6


@pytest.mark.shared
def test_its_autoencoder_is_the_released_taesd(real_data, monkeypatch, tmp_path):
    monkeypatch.setenv("ANONFW_WEIGHTS", str(real_data / "weights"))
    monkeypatch.setenv("ANONFW_CACHE", str(tmp_path))
    ours, released = autoencoder("face_model").vae.state_dict(), autoencoder("taesd").vae.state_dict()
    assert ours.keys() == released.keys()
    for name, value in released.items():
        assert torch.allclose(ours[name], value, rtol=1e-3, atol=1e-4), name


def test_guidance_away_from_a_person_leads_away(system, photos):
    """By a recogniser's embedding of the output; cosines fall as |w| grows, and nothing of it is chance."""
    usual, cosines = system.anonymizer, []
    own = photos.embeddings["arcface_mbf"]
    for w in (0.0, -5.0):
        system.anonymizer = replace(usual, guidance=w, steps=5)
        images = system.anonymize(photos)
        assert images.shape == photos.image.shape and images.isfinite().all()
        again = FaceBatch(
            image=((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8),
            identity=photos.identity, index=photos.index, key=photos.key, landmarks=photos.landmarks,
        )  # fmt: skip
        cosines.append(float((system.embed(again) * own).sum(-1).mean()))
    system.anonymizer = usual
    assert cosines[0] > 0.5 and cosines[1] < cosines[0] - 0.25, cosines
