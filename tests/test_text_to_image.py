"""The text-to-image system: its step, its captions, what it draws, and the pipeline that it becomes."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch

from anonfw import diffusion, tiny_pipelines
from anonfw.batch import FaceBatch
from anonfw.errors import AnonfwError
from anonfw.losses.regression import Regression
from anonfw.nets import pipeline_base
from anonfw.nets.backbone import Backbone
from anonfw.nets.codec import Autoencoder
from anonfw.nets.unet import small_unet
from anonfw.systems.text_to_image import TextToImage
from anonfw.training import load

CAPTIONS = ["30-year-old woman, smiling, looking left", "man", "8-year-old baby-girl, dark"]


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> Path:
    return tiny_pipelines.save(tmp_path_factory.mktemp("pipelines") / "sd15", "sd15")


@pytest.fixture
def system(pipeline) -> TextToImage:
    torch.manual_seed(0)
    return TextToImage(
        size=64,
        codec=Autoencoder(str(pipeline), "vae"),
        unet=partial(small_unet, widths=[16, 32], attention=[False, True]),
        noise=diffusion.noise_schedule("v_prediction", shape="scaled_linear", beta_start=0.00085, beta_end=0.012),
        losses={"noise": Regression()},
        optimizer=partial(torch.optim.AdamW, lr=1e-3),
        token_width=32,
        steps=3,
    ).eval()


def batch(size: int = 32, **fields) -> FaceBatch:
    rng = torch.Generator().manual_seed(1)
    image = torch.randint(0, 256, (3, 3, size, size), dtype=torch.uint8, generator=rng)
    numbers = torch.arange(3)
    given = {"image": image, "caption": CAPTIONS, **fields}
    return FaceBatch(identity=numbers, index=numbers, key=["a", "b", "c"], landmarks=torch.zeros(3, 5, 2), **given)


def test_a_step_predicts_what_the_schedule_asks_for(system):
    out = system.step(batch(), torch.Generator().manual_seed(0))
    assert out.prediction.shape == out.target.shape == (3, 4, 8, 8) and out.t.shape == (3,)
    loss = system.losses["noise"](out, batch()).mean()
    loss.backward()
    silent = [name for name, p in system.named_parameters() if p.requires_grad and p.grad is None]
    assert silent == [], "text encoder and U-Net learn together"
    assert all(p.grad is None for p in system.codec.parameters())


def test_latents_of_the_batch_are_taken_as_they_are(system):
    given = batch(latents=torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(2)))
    assert system.latents(given) is given.latents
    with pytest.raises(AnonfwError, match="--size 64"):
        system.latents(batch(latents=torch.zeros(3, 4, 6, 6)))


def test_captions_are_thinned_by_the_generator_alone(system):
    system.drop_clause, system.drop_caption = 0.5, 0.25
    many = [CAPTIONS[0]] * 400
    one = system.thinned(many, torch.Generator().manual_seed(3))
    assert one == system.thinned(many, torch.Generator().manual_seed(3)) != many
    clauses = CAPTIONS[0].split(", ")
    for caption in one:
        kept = caption.split(", ") if caption else []
        assert kept == [clause for clause in clauses if clause in kept], "in their order, and no others"
    smiling = sum("smiling" in caption for caption in one) / len(one)
    assert abs(smiling - 0.75 * 0.5) < 4 * (0.375 * 0.625 / 400) ** 0.5
    system.drop_clause = system.drop_caption = 0.0
    assert system.thinned(CAPTIONS, torch.Generator()) == CAPTIONS
    with pytest.raises(AnonfwError, match="embed DATASET --captions"):
        system.thinned([], torch.Generator())


def test_the_caption_decides_what_is_drawn(system):
    pictures = system.generate(["man", "woman", "man"])
    assert pictures.shape == (3, 3, 64, 64) and pictures.abs().max() <= 1
    assert torch.equal(pictures, system.generate(["man", "woman", "man"]))
    assert torch.allclose(pictures[0], system.generate(["man"])[0], atol=1e-4), "whoever shares the batch"
    assert not torch.allclose(pictures[0], system.generate(["woman"])[0], atol=1e-4)
    assert not torch.allclose(pictures[0], pictures[2], atol=1e-2), "each row has noise of its own"


def test_it_anonymizes_nothing_and_says_what_does(system):
    with pytest.raises(AnonfwError, match="face_adapter"):
        system.anonymize(batch())


def test_a_size_that_the_autoencoder_cannot_have_is_refused(pipeline):
    with pytest.raises(AnonfwError, match="multiple of 8"):
        TextToImage(60, Autoencoder(str(pipeline), "vae"), None, None, {}, None)


@pytest.fixture
def base(system, tmp_path, monkeypatch) -> Path:
    """The system as a base of the package."""
    monkeypatch.setattr(load, "BASES", tmp_path)
    system.save_pipeline(tmp_path / "small", torch.float32)
    pipeline_base.record(tmp_path / "small", 7)
    return tmp_path / "small"


def test_the_pipeline_predicts_what_the_system_predicts(system, base):
    backbone = Backbone("small")
    x_t = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(4))
    t = torch.tensor([900, 10])
    c = backbone.encode_text(CAPTIONS[:2])
    with torch.no_grad():
        assert torch.allclose(c.states, system.text(CAPTIONS[:2]), atol=1e-5)
        assert torch.allclose(backbone.predict(x_t, t, c), system.unet(x_t, t, c.states).sample, atol=1e-5)
    assert backbone.noise.config.prediction_type == "v_prediction"
    assert torch.allclose(backbone.noise.alphas_cumprod, system.noise.alphas_cumprod)
    assert json.loads((base / "files.json").read_text())["steps"] == 7


def test_diffusers_opens_the_pipeline_and_draws(base):
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(base)
    pipe.set_progress_bar_config(disable=True)
    rng = torch.Generator().manual_seed(5)
    picture = pipe("woman, smiling", num_inference_steps=2, height=64, width=64, generator=rng, output_type="np")
    assert picture.images.shape == (1, 64, 64, 3)


@pytest.mark.parametrize("what", ["changed", "missing"])
def test_a_damaged_base_is_refused(base, what):
    file = base / "unet" / "diffusion_pytorch_model.safetensors"
    if what == "missing":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(AnonfwError, match="the base small is damaged"):
        Backbone("small")


def test_a_parameter_that_half_precision_cannot_hold_is_not_saved(system, tmp_path):
    with torch.no_grad():
        system.unet.conv_out.bias[0] = 1e6
    with pytest.raises(AnonfwError, match="not finite"):
        system.save_pipeline(tmp_path / "out")
    assert not (tmp_path / "out").exists()
