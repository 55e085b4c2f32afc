"""Photographs: every face is found and replaced, everything else keeps its pixels, and nothing is lost or left."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anonfw import __main__ as cli
from anonfw import photographs
from anonfw.align import similarity, template
from anonfw.detect import Detector
from anonfw.errors import AnonfwError
from anonfw.photographs import NoFaceError, anonymize_photograph, paste


@pytest.fixture(scope="module")
def detector() -> Detector:
    return Detector()


@pytest.fixture(scope="module")
def photograph(tiny_faces) -> np.ndarray:
    """Two people beside each other on grey, one twice as large as the other: (400,640,3)."""
    import cv2

    from anonfw.data import FaceLoader

    loader = FaceLoader(tiny_faces, "test", 16, shuffle=False, workers=0)
    batch = next(iter(loader))
    loader.close()
    first, second = (batch.image[int((batch.identity == i).nonzero()[0])] for i in batch.identity.unique()[:2])
    out = np.full((400, 640, 3), 127, np.uint8)
    out[60:340, 30:310] = cv2.resize(first.permute(1, 2, 0).numpy(), (280, 280))
    out[120:260, 420:560] = cv2.resize(second.permute(1, 2, 0).numpy(), (140, 140))
    return out


def painter(colour: float):
    """A system that paints the middle of each face and leaves the rest of the crop as it is."""

    def anonymize(batch, draw):
        out = batch.pixels()
        out[:, :, 40:80, 40:72] = colour
        return out

    return anonymize


def test_every_face_is_replaced_and_nothing_else(detector, photograph):
    out, count = anonymize_photograph(painter(1.0), photograph, 112, "two", detector)
    assert count == 2 and out.shape == photograph.shape and out.dtype == np.uint8
    for x, y in ((170, 210), (490, 200)):
        assert (out[y - 5 : y + 5, x - 5 : x + 5] == 255).all()
    assert np.array_equal(out[:, 320:410], photograph[:, 320:410])
    assert np.array_equal(out[:40], photograph[:40]) and np.array_equal(out[350:], photograph[350:])


def test_a_system_that_changes_nothing_returns_the_photograph(detector, photograph):
    out, count = anonymize_photograph(lambda batch, _: batch.pixels(), photograph, 112, "two", detector)
    assert count == 2 and np.array_equal(out, photograph)


def test_what_a_system_is_given(detector, photograph):
    """Aligned crops with landmarks on the template, keys by rank (largest first), and the draw."""
    seen = []

    def spy(batch, draw):
        seen.append((batch, draw))
        return batch.pixels()

    anonymize_photograph(spy, photograph, 112, "two", detector, draw=3)
    batch, draw = seen[0]
    assert draw == 3 and batch.key == ["two-0", "two-1"] and batch.image.shape == (2, 3, 112, 112)
    assert np.abs(batch.landmarks.numpy() - template("portrait", 112)).max() < 6


def test_a_photograph_without_a_face_is_an_error_that_says_so(detector):
    with pytest.raises(NoFaceError, match=r"no face was found in sky \(200 x 100 px\) at threshold 0.5: lower"):
        anonymize_photograph(painter(1.0), np.full((100, 200, 3), 90, np.uint8), 112, "sky", detector)


@settings(max_examples=20)
@given(
    scale=st.floats(0.5, 3.0),
    angle=st.floats(-0.6, 0.6),
    left=st.integers(24, 60),
    top=st.integers(24, 60),
    side=st.integers(4, 28),
)
def test_pasting_replaces_a_change_as_a_whole_and_keeps_the_rest(scale, angle, left, top, side):
    """Whatever the crop's place, size and tilt: changed pixels are the new ones, far pixels bitwise the old ones."""
    rng = np.random.default_rng(0)
    image = rng.integers(0, 200, (300, 300, 3), dtype=np.uint8)
    centre = np.array([150.0, 150.0])
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    points = (template("portrait", 112) - 56) @ turn.T * scale + centre
    matrix = similarity(points, template("portrait", 112))
    before = np.full((112, 112, 3), 100, np.uint8)
    after = before.copy()
    after[top : top + side, left : left + side] = 250
    out = paste(image, before, after, matrix)

    ys, xs = np.mgrid[:300, :300]
    x, y = (np.stack([xs, ys, np.ones_like(xs)], -1) @ matrix.T).transpose(2, 0, 1)
    inside = (x > left) & (x < left + side - 1) & (y > top) & (y < top + side - 1)
    far = (x < left - 17) | (x > left + side + 16) | (y < top - 17) | (y > top + side + 16)
    assert inside.any() and (out[inside] == 250).all()
    assert np.array_equal(out[far], image[far])


# The verb.


@pytest.fixture
def opened(monkeypatch):
    """The verb without a trained run: what it opens is the painter."""
    monkeypatch.setattr(photographs, "_opened", lambda *_: (painter(1.0), 112, "portrait", None))


def test_the_verb_writes_each_picture_and_names_those_without_a_face(opened, photograph, tmp_path, capsys):
    from PIL import Image

    face, sky = tmp_path / "face.jpg", tmp_path / "sky.png"
    Image.fromarray(photograph).save(face, quality=95)
    Image.new("RGB", (64, 64)).save(sky)
    out = tmp_path / "out"
    assert cli.main(["anonymize", "RUN", str(sky), str(face), "--out", str(out)]) == 2
    shown = capsys.readouterr()
    assert "1 of 2 photographs were not written: no face was found in sky" in shown.err
    assert "face.png  2 faces" in shown.out
    assert [path.name for path in out.iterdir()] == ["face.png"]
    assert (np.array(Image.open(out / "face.png"))[205:215, 165:175] == 255).all()
    assert cli.main(["anonymize", "RUN", str(face), "--out", str(out)]) == 0


def test_the_verb_refuses_before_it_opens_anything(photograph, tmp_path, capsys):
    from PIL import Image

    face = tmp_path / "face.png"
    Image.fromarray(photograph).save(face)
    (tmp_path / "other").mkdir()
    Image.fromarray(photograph).save(tmp_path / "other" / "face.jpg")
    for words, message in (
        ([str(tmp_path / "none.jpg")], "there is no photograph"),
        ([str(face), "--out", str(tmp_path)], "would replace the photograph itself"),
        ([str(face), str(tmp_path / "other" / "face.jpg")], "names must differ"),
    ):
        assert cli.main(["anonymize", "RUN", *words]) == 2
        assert message in capsys.readouterr().err


def test_a_systems_own_error_is_not_swallowed(detector, photograph):
    def broken(batch, draw):
        raise AnonfwError("the adapter has no text encoder")

    with pytest.raises(AnonfwError, match="no text encoder"):
        anonymize_photograph(broken, photograph, 112, "two", detector)


@pytest.mark.slow
def test_a_real_system_through_the_verb(photograph, tmp_path):
    """ID²Face's recipe with its shipped base: other people stand in the picture."""
    from PIL import Image

    from anonfw.identity import ArcFace, embed_aligned

    Image.fromarray(photograph).save(tmp_path / "face.png")
    words = ["recipes/id2face.yaml", str(tmp_path / "face.png"), "system.steps=6", "--out", str(tmp_path / "out")]
    assert cli.main(["anonymize", *words]) == 0
    out = np.array(Image.open(tmp_path / "out" / "face.png"))
    recognizer, detector = ArcFace(), Detector()

    def keep(batch, _):
        crops.append(batch.pixels())
        return crops[-1]

    crops = []
    for picture in (photograph, out):
        anonymize_photograph(keep, picture, 112, "x", detector)
    with torch.inference_mode():
        before, after = (embed_aligned(recognizer, faces, "portrait") for faces in crops)
    assert (before * after).sum(-1).max() < 0.4


def test_a_recipe_without_weights_is_refused(tmp_path, photograph, capsys):
    from PIL import Image

    Image.fromarray(photograph).save(tmp_path / "face.png")
    assert cli.main(["anonymize", "recipes/id2face.yaml", str(tmp_path / "face.png"), "init=null"]) == 2
    assert "names no trained weights: add init=FILE" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_the_papers_recipe_with_a_pipeline_and_an_adapter_file_in_the_released_layout(kind, photograph, tmp_path):
    """What `doctor` tells an owner of released weights to run, on tiny ones that lie in the same files."""
    from PIL import Image
    from safetensors.torch import save_file

    from anonfw import recipe as recipes
    from anonfw import tiny_pipelines
    from anonfw.training.load import build_system

    Image.fromarray(photograph).save(tmp_path / "face.png")
    recipe = "recipes/paper/reverse_personalization.yaml"
    overrides = [
        f"system.backbone.source={tiny_pipelines.save(tmp_path / kind, kind)}",
        "system.identity.weights=arcface_mbf",
        "system.lora_rank=4",
        "system.size=64",
        "system.anonymizer.steps=2",
        *(["system.anonymizer.mode=nullface"] if kind == "sd15" else []),
    ]
    [(name, state)] = build_system(recipes.read(recipe, overrides)).interchange().items()
    save_file({key: value.contiguous() for key, value in state.items()}, adapter := tmp_path / name)
    words = [recipe, str(tmp_path / "face.png"), *overrides, "--out", str(tmp_path / "out")]
    assert cli.main(["anonymize", *words, f"init={adapter}"]) == 0
    out = np.array(Image.open(tmp_path / "out" / "face.png"))
    assert out.shape == photograph.shape
    assert np.abs(out.astype(int) - photograph)[150:250, 100:240].mean() > 2
    assert np.array_equal(out[:, 330:380], photograph[:, 330:380])
