"""Parity with insightface, whose networks these are: crop, recogniser and detector, from the same files."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_detect import portraits  # noqa: F401 the fixture: (image, landmarks) of shipped faces

from anonfw import weights
from anonfw.align import similarity, template, warp
from anonfw.detect import Detector
from anonfw.identity import ArcFace

pytest.importorskip("insightface")


def test_the_crop_is_insightfaces(portraits):  # noqa: F811
    from insightface.utils.face_align import norm_crop

    for image, landmarks in portraits[:4]:
        ours = warp(image, similarity(landmarks, template("arcface", 112)), 112).astype(int)
        theirs = norm_crop(image, landmarks).astype(int)
        assert np.abs(ours - theirs)[2:-2, 2:-2].mean() < 1.0


def test_the_recogniser_is_insightfaces(portraits):  # noqa: F811
    from insightface.model_zoo.arcface_onnx import ArcFaceONNX
    from insightface.utils.face_align import norm_crop

    theirs, ours = ArcFaceONNX(str(weights.path("arcface_mbf"))), ArcFace()
    crops = [norm_crop(image, landmarks) for image, landmarks in portraits[:4]]
    expected = theirs.get_feat([np.ascontiguousarray(crop[..., ::-1]) for crop in crops])  # it takes BGR
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    images = torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        cosine = (ours(images).numpy() * expected).sum(1)
    assert cosine.min() > 0.9999


def test_the_detector_is_insightfaces(portraits):  # noqa: F811
    from insightface.model_zoo.scrfd import SCRFD

    theirs = SCRFD(str(weights.path("scrfd_500m")))
    theirs.prepare(ctx_id=-1, input_size=(640, 640), det_thresh=0.5)
    canvas = np.full((640, 640, 3), 127, np.uint8)
    for (image, _), (top, left) in zip(portraits[:2], ((60, 40), (330, 360)), strict=True):
        canvas[top : top + image.shape[0], left : left + image.shape[1]] = image
    boxes, points = theirs.detect(np.ascontiguousarray(canvas[..., ::-1]))
    found = Detector().detect(canvas)
    assert len(found) == len(boxes) == 2
    order, expected = np.argsort(found.boxes[:, 0]), np.argsort(boxes[:, 0])
    np.testing.assert_allclose(found.boxes[order], boxes[expected, :4], atol=1.5)
    np.testing.assert_allclose(found.landmarks[order], points[expected], atol=1.5)
    np.testing.assert_allclose(found.scores[order], boxes[expected, 4], atol=0.02)
