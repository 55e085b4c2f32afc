"""Opening pipelines: tiny SD 1.5 and SDXL as released ones, parity with diffusers', and folders that are wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from anonfw import tiny_pipelines
from anonfw.errors import AnonfwError
from anonfw.nets.backbone import Backbone, find
from anonfw.nets.codec import Autoencoder
from anonfw.tiny_pipelines import tokenizer

KINDS = ("sd15", "sdxl")


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("pipelines")
    return {kind: tiny_pipelines.save(root / kind, kind) for kind in KINDS}


@pytest.fixture(scope="module")
def backbones(folders) -> dict[str, Backbone]:
    return {kind: Backbone(str(folders[kind])) for kind in KINDS}


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def opened(folder: Path):
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


# The tiny pipelines.


def test_a_tiny_pipeline_is_a_function_of_its_seed_and_leaves_the_global_state_alone(folders, tmp_path):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    again = tiny_pipelines.save(tmp_path / "again", "sd15")
    other = tiny_pipelines.save(tmp_path / "other", "sd15", seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    files = sorted(path.relative_to(again) for path in again.rglob("*") if path.is_file())
    assert {"model_index.json", "unet", "vae", "text_encoder", "tokenizer", "scheduler"} <= {f.parts[0] for f in files}
    assert all((again / file).read_bytes() == (folders["sd15"] / file).read_bytes() for file in files)
    weights = Path("unet/diffusion_pytorch_model.safetensors")
    assert (other / weights).read_bytes() != (again / weights).read_bytes()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == [], "nothing half-written is left"


def test_a_tiny_pipeline_that_another_process_made_is_taken(folders, tmp_path):
    made = tiny_pipelines.cached("sd15", 0, tmp_path)
    stamp = (made / "model_index.json").stat().st_mtime_ns
    assert tiny_pipelines.cached("sd15", 0, tmp_path) == made
    assert tiny_pipelines.save(made, "sd15") == made, "as if both had begun at once"
    assert (made / "model_index.json").stat().st_mtime_ns == stamp and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(AnonfwError, match="sdxl or sd15"):
        tiny_pipelines.save(tmp_path / "x", "sd3")


def test_the_vocabulary_knows_its_words_and_spells_all_others():
    words = tokenizer()
    assert words.tokenize(tiny_pipelines.WORDS.upper()) == [f"{word}</w>" for word in tiny_pipelines.WORDS.split()]
    assert words.tokenize("34-year-old")[:3] == ["3</w>", "4</w>", "-</w>"]
    for text in ("zürich ☃", "naïve photos"):
        ids = words(text).input_ids
        assert (
            words.unk_token_id not in ids[1:-1] and words.decode(ids, skip_special_tokens=True).split() == text.split()
        )
    padded = words("a photo", padding="max_length", max_length=77).input_ids
    assert len(padded) == 77 and padded[0] == words.bos_token_id and padded.count(words.eos_token_id) == 74
    assert tokenizer(pad="!").pad_token_id == tokenizer().convert_tokens_to_ids("!")


# Parity with diffusers' own pipelines.


@pytest.mark.parametrize("kind", KINDS)
def test_text_is_encoded_as_the_pipeline_does(kind, folders, backbones):
    captions = ["a photo of an old man", "", "a " * 90]
    ours = backbones[kind].encode_text(captions)
    theirs = opened(folders[kind]).encode_prompt(
        prompt=captions, num_images_per_prompt=1, do_classifier_free_guidance=False, device="cpu"
    )
    torch.testing.assert_close(ours.states, theirs[0])
    assert ours.states.shape == (3, 77, backbones[kind].token_width)
    if kind == "sdxl":
        torch.testing.assert_close(ours.pooled, theirs[2])
        assert ours.pooled.shape == (3, backbones[kind].pooled_width)
    else:
        assert ours.pooled is None and backbones[kind].pooled_width is None
    torch.testing.assert_close(backbones[kind].empty_text().states[0], ours.states[1], rtol=0, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_guided_run_is_the_pipelines(kind, folders, backbones):
    """Text, time ids, U-Net and schedule together: the same latents as diffusers' pipeline after five steps."""
    from diffusers import DDIMScheduler

    from anonfw import diffusion

    pipeline, backbone, noise = opened(folders[kind]), backbones[kind], randn(1, 4, 8, 8)
    pipeline.scheduler = DDIMScheduler.from_config(
        pipeline.scheduler.config, timestep_spacing="trailing", clip_sample=False, set_alpha_to_one=True
    )
    theirs = pipeline(
        "a photo of a man", negative_prompt="hat", guidance_scale=3.0, num_inference_steps=5, height=64, width=64,
        latents=noise, output_type="latent",
    ).images  # fmt: skip
    wanted, unwanted = backbone.encode_text(["a photo of a man"]), backbone.encode_text(["hat"])

    @torch.no_grad()
    def guided(x_t, t):
        away, to = (backbone.predict(x_t, t, text, backbone.time_ids(1, 64, 64)) for text in (unwanted, wanted))
        return away + 3 * (to - away)

    ours = diffusion.sample(backbone.noise, guided, noise, 5, "ddim")
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_latents_are_the_autoencoders_mode_times_its_scale(kind, folders, backbones):
    pipeline, images = opened(folders[kind]), randn(2, 3, 64, 64).clamp(-1, 1)
    with torch.no_grad():
        expected = pipeline.vae.encode(images).latent_dist.mode() * pipeline.vae.config.scaling_factor
        latents = backbones[kind].encode_image(images)
        torch.testing.assert_close(latents, expected)
        back = pipeline.vae.decode(expected / pipeline.vae.config.scaling_factor).sample
        torch.testing.assert_close(backbones[kind].decode(latents), back)
    assert backbones[kind].factor == 8 and backbones[kind].channels == 4


def test_time_ids_say_original_corner_and_size(backbones):
    assert backbones["sdxl"].time_ids(2, 256, 64, (3, 5)).tolist() == [[256, 256, 3, 5, 64, 64]] * 2
    assert backbones["sd15"].time_ids(2, 256, 64) is None


def test_everything_is_frozen_and_stays_in_eval_mode(backbones):
    for backbone in backbones.values():
        assert not any(p.requires_grad for p in backbone.parameters())
        backbone.train()
        assert not any(module.training for module in backbone.modules())


# Memory and precision.


@pytest.mark.slow
def test_memory_arguments_change_no_output(folders, backbones):
    frugal = Backbone(str(folders["sdxl"]), checkpointing=True, slicing=True, offload=True)
    plain = backbones["sdxl"]
    assert sum(p.numel() for p in frugal.parameters()) < sum(p.numel() for p in plain.parameters())
    torch.testing.assert_close(frugal.encode_text(["hat"]).states, plain.encode_text(["hat"]).states)
    images = randn(2, 3, 32, 32).clamp(-1, 1)
    torch.testing.assert_close(frugal.encode_image(images), plain.encode_image(images))
    latents = randn(2, 4, 4, 4)
    with torch.no_grad():
        torch.testing.assert_close(frugal.decode(latents), plain.decode(latents))
    # Recomputed activations have the same gradient.
    gradients = []
    for backbone in (frugal, plain):
        x = randn(1, 4, 8, 8).requires_grad_()
        text = backbone.encode_text(["hat"])
        backbone.predict(x, torch.tensor([500]), text, backbone.time_ids(1, 64, 64)).sum().backward()
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients)


def test_half_precision_predicts_nearly_the_same_outside_any_autocast(folders, backbones):
    half, plain = Backbone(str(folders["sdxl"]), dtype="bf16"), backbones["sdxl"]
    assert half.unet.dtype == torch.bfloat16 and half.codec.vae.dtype == torch.float32, "SDXL's autoencoder upcasts"
    assert Backbone(str(folders["sd15"]), dtype="bf16").codec.vae.dtype == torch.bfloat16
    text, ids, x, t = plain.encode_text(["hat"]), plain.time_ids(1, 64, 64), randn(1, 4, 8, 8), torch.tensor([500])
    with torch.no_grad():
        ours, theirs = half.predict(x, t, text, ids), plain.predict(x, t, text, ids)
    assert ours.dtype == torch.float32
    assert (ours - theirs).norm() < 0.03 * theirs.norm()
    with pytest.raises(AnonfwError, match="fp8"):
        Backbone(str(folders["sdxl"]), dtype="fp8")


@pytest.mark.slow
def test_an_autoencoder_that_overflows_in_fp16_is_run_in_fp32_with_a_warning(folders, tmp_path):
    """Weights as SDXL's: activations beyond 65504 inside, ordinary latents at the end."""
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(folders["sdxl"], subfolder="vae")
    with torch.no_grad():
        for half in (vae.encoder, vae.decoder):
            half.conv_in.weight.mul_(2e5)  # still within fp16, its outputs no more
    vae.save_pretrained(tmp_path / "vae")
    plain = Autoencoder(str(tmp_path), "vae")
    images, latents = randn(1, 3, 32, 32).clamp(-1, 1), randn(1, 4, 4, 4)
    expected = plain.encode(images), plain.decode(latents)
    assert all(torch.isfinite(part).all() for part in expected)
    for run, value, wanted in (("encode", images, expected[0]), ("decode", latents, expected[1])):
        half = Autoencoder(str(tmp_path), "vae", dtype="fp16")
        with torch.no_grad(), pytest.warns(UserWarning, match="not finite in torch.float16.*float32 from now on"):
            out = getattr(half, run)(value)
        torch.testing.assert_close(out, wanted, rtol=2e-2, atol=2e-2)  # its weights went through fp16
        assert half.vae.dtype == torch.float32


# Folders that are wrong.


def spoiled(folder: Path, target: Path, remove: str = "", **index) -> Path:
    shutil.copytree(folder, target)
    if remove:
        shutil.rmtree(target / remove)
    if index:
        file = target / "model_index.json"
        named = {k: v for k, v in (json.loads(file.read_text()) | index).items() if v is not None}
        file.write_text(json.dumps(named))
    return target


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("sdxl", {"remove": "text_encoder_2"}, "lacks its text_encoder_2 .*CLIPTextModelWithProjection"),
        ("sdxl", {"text_encoder_2": None, "tokenizer_2": None}, "width 80, and its text encoders make 32"),
        ("sdxl", {"tokenizer_2": None}, "2 text encoders and 1 tokenizers"),
        ("sd15", {"remove": "vae"}, "lacks its vae"),
        ("sd15", {"unet": None}, "names no unet"),
        ("sd15", {"unet": ["diffusers", "UNet17"]}, "the installed diffusers has no UNet17"),
        ("sd15", {"unet": ["os", "system"]}, "unet is of os, which is not opened here"),
    ],
)
def test_a_folder_that_is_not_whole_is_refused_in_words(folders, tmp_path, kind, change, message):
    with pytest.raises(AnonfwError, match=message):
        Backbone(str(spoiled(folders[kind], tmp_path / "spoiled", **change)))


def test_a_damaged_file_and_another_models_text_encoder_are_refused(folders, tmp_path):
    damaged = spoiled(folders["sd15"], tmp_path / "damaged")
    (damaged / "text_encoder" / "model.safetensors").write_bytes(b"not tensors")
    with pytest.raises(AnonfwError, match="cannot open .*text_encoder"):
        Backbone(str(damaged))
    (damaged / "text_encoder" / "model.safetensors").unlink()
    with pytest.raises(AnonfwError, match="cannot open .*text_encoder"):
        Backbone(str(damaged))
    mixed = spoiled(folders["sdxl"], tmp_path / "mixed")
    encoder = tiny_pipelines.text_encoder(len(tokenizer()), 48, projection=24)
    encoder.save_pretrained(mixed / "text_encoder_2")
    with pytest.raises(AnonfwError, match="pooled caption and time ids of width 96 in all, and would get 72"):
        Backbone(str(mixed))


def test_an_inpainting_model_is_refused(folders, tmp_path):
    from diffusers import UNet2DConditionModel

    wide = spoiled(folders["sd15"], tmp_path / "inpainting")
    config = UNet2DConditionModel.load_config(wide, subfolder="unet") | {"in_channels": 9}
    UNet2DConditionModel.from_config(config).save_pretrained(wide / "unet")
    with pytest.raises(AnonfwError, match="9 channels in and 4 out, its autoencoder 4"):
        Backbone(str(wide))


def test_what_is_not_there_is_said_with_what_to_place_where(tmp_path, monkeypatch):
    with pytest.raises(AnonfwError, match="no model_index.json"):
        Backbone(str(tmp_path))
    with pytest.raises(AnonfwError, match="no pipeline folder"):
        find(str(tmp_path / "nowhere"))
    with pytest.raises(AnonfwError, match="needs a revision"):
        find("somebody/pipeline")
    # Offline, as on a cluster's compute nodes.
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(AnonfwError) as caught:
        find("somebody/pipeline", "0123456789abcdef")
    for part in ("somebody/pipeline at 0123456789ab", "hf download", "--local-dir", "model_index.json"):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)
