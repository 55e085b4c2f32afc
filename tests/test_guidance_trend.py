"""An attacker's view of reverse personalization on the shipped face model: guidance takes the person away."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from anonfw.evaluate.scorers import open_judge
from anonfw.identity import embed_aligned
from anonfw.photographs import open_system
from anonfw.training.load import BASES

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (BASES / "face_adapter.safetensors").exists(),
        reason="needs the base face_adapter (recipes/face_adapter.yaml)",
    ),
]
GUIDANCE = (0, -5, -10)


def test_identity_distance_grows_with_guidance(tiny_faces):
    """Mean distance of six unseen people's outputs to their photographs, by a judge that had no part in the system."""
    from anonfw.data import FaceLoader

    system, _ = open_system("recipes/face_adapter.yaml", ["init=face_adapter"])
    judge = open_judge("edgeface_s", "cpu")
    assert judge.name not in system.recognizer_names()
    loader = FaceLoader(tiny_faces, "test", 64, shuffle=False, workers=0, sidecars=["arcface_mbf"])
    batch = next(iter(loader))
    loader.close()
    first = [int((batch.identity == person).nonzero()[0]) for person in batch.identity.unique()[:6]]
    photos = batch.select(first)
    usual, distance = system.anonymizer, []
    with torch.inference_mode():
        own = embed_aligned(judge, photos.pixels(), "portrait")
        for guidance in GUIDANCE:
            system.anonymizer = replace(usual, guidance=guidance, steps=10)
            made = system.anonymize(photos)
            distance.append(float(1 - (embed_aligned(judge, made, "portrait") * own).sum(-1).mean()))
    assert distance == sorted(distance) and distance[-1] > distance[0] + 0.2, distance
