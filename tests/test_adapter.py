"""Training an identity adapter: the decoupled attention, what is trained, what is dropped, and the loss."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import tiny_adapter as tiny
import tiny_training
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention, AttnProcessor2_0, IPAdapterAttnProcessor2_0
from tiny_adapter import batch, randn

from anonfw import diffusion, tiny_pipelines
from anonfw.errors import AnonfwError
from anonfw.nets.attention import DecoupledKV
from anonfw.nets.backbone import Text
from anonfw.nets.identity_adapter import add_identity, identity_projection

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = Path(__file__).parent / "golden" / "sdxl_adapter.json"


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("pipelines")
    return {kind: tiny_pipelines.save(root / kind, kind) for kind in ("sd15", "sdxl")}


@pytest.fixture(scope="module")
def system(folders):
    """An SDXL adapter that no test changes for good."""
    return tiny.system(folders["sdxl"], lora_rank=2)


@pytest.fixture
def asked(system, monkeypatch) -> list[dict]:
    """What the backbone is asked in a step, call by call. It answers with x_t."""
    seen = []

    def spy(x_t, t, text, time_ids=None, identity_tokens=None, scale=1.0):
        seen.append({"x_t": x_t, "t": t, "text": text, "time_ids": time_ids, "tokens": identity_tokens})
        return x_t

    monkeypatch.setattr(system.backbone, "predict", spy)
    return seen


# The attention.


def layer() -> tuple[Attention, DecoupledKV]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        attn = Attention(query_dim=32, cross_attention_dim=24, heads=4, dim_head=8)
        return attn, DecoupledKV(32, 24)


def test_decoupled_attention_is_diffusers_own():
    """Parity with the processor that diffusers runs released adapters with, weights copied."""
    attn, ours = layer()
    theirs = IPAdapterAttnProcessor2_0(32, 24, num_tokens=(3,), scale=0.7)
    theirs.to_k_ip[0].load_state_dict(ours.identity_k.state_dict())
    theirs.to_v_ip[0].load_state_dict(ours.identity_v.state_dict())
    h, text, tokens = randn(2, 16, 32), randn(2, 5, 24, seed=1), randn(2, 3, 24, seed=2)
    expected = theirs(attn, h, (text, [tokens]))
    torch.testing.assert_close(ours(attn, h, text, identity_tokens=tokens, identity_scale=0.7), expected)


def test_without_tokens_or_at_scale_0_the_layer_is_what_it_was():
    attn, ours = layer()
    h, text = randn(2, 16, 32), randn(2, 5, 24, seed=1)
    plain = AttnProcessor2_0()(attn, h, text)
    torch.testing.assert_close(ours(attn, h, text), plain)
    torch.testing.assert_close(ours(attn, h, text, identity_tokens=text, identity_scale=0.0), plain)
    ours.start_from(attn)
    doubled = ours(attn, h, text, identity_tokens=text)
    torch.testing.assert_close(doubled - attn.to_out[0].bias, 2 * (plain - attn.to_out[0].bias), rtol=1e-4, atol=1e-5)


def test_a_fresh_adapter_starts_from_each_layers_own_projections(folders):
    made = tiny.system(folders["sd15"], awake=False, lora_rank=2)
    unet, text = made.backbone.unet, made.backbone.encode_text(["a photo"])
    for name, processor in unet.attn_processors.items():
        attn = unet.get_submodule(name.removesuffix(".processor"))
        if isinstance(processor, DecoupledKV):
            assert torch.equal(processor.identity_k.weight, attn.to_k.base_layer.weight)
            assert torch.equal(processor.identity_v.weight, attn.to_v.base_layer.weight)
    plain = tiny.Backbone(str(folders["sd15"]))
    x, t = randn(1, 4, 8, 8), torch.tensor([500])
    with torch.no_grad():  # LoRA begins as nothing
        torch.testing.assert_close(made.backbone.predict(x, t, text), plain.predict(x, t, text))


def test_only_the_adapter_is_trained_and_stored(system):
    names = system.trained_names()
    parts = {"projection.": 6, ".processor.identity_k.": 17, ".processor.identity_v.": 17, ".lora_": 2 * 4 * 34}
    for part, count in parts.items():
        assert sum(part in name for name in names) == count, part
    assert len(names) == sum(parts.values())
    checkpoint = {"state_dict": system.state_dict()}
    system.on_save_checkpoint(checkpoint)
    assert checkpoint["state_dict"].keys() == names


def test_a_network_without_cross_attention_is_refused():
    unet = UNet2DConditionModel(
        block_out_channels=(8,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
        mid_block_type=None, norm_num_groups=4, layers_per_block=1,
    )  # fmt: skip
    with pytest.raises(AnonfwError, match="no cross-attention"):
        add_identity(unet)


@pytest.mark.parametrize(
    ("kind", "layers", "trained"),
    [("sd15", 16, {"attention": 19_169_280, "projection": 3_675_648, "lora": 25_509_888}),
     ("sdxl", 70, {"attention": 340_787_200, "projection": 8_926_208, "lora": 185_794_560})],
)  # fmt: skip
def test_adapters_of_the_released_networks_have_the_released_size(kind, layers, trained):
    """On the meta device: shapes without memory. SD 1.5's 22.8 M without LoRA are those of the released IP-Adapter."""
    shapes = {
        "sd15": {"cross_attention_dim": 768, "attention_head_dim": 8},
        "sdxl": {
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 10),
            "attention_head_dim": (5, 10, 20),
            "cross_attention_dim": 2048,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
    }
    with torch.device("meta"):
        unet = UNet2DConditionModel(**shapes[kind])
        base = sum(p.numel() for p in unet.parameters())
        add_identity(unet, lora_rank=128)
        projection = identity_projection(512, unet.config.cross_attention_dim)
    assert base == {"sd15": 859_520_964, "sdxl": 2_567_463_684}[kind], "the released U-Net"
    assert sum(isinstance(p, DecoupledKV) for p in unet.attn_processors.values()) == layers
    found = {"projection": sum(p.numel() for p in projection.parameters()), "attention": 0, "lora": 0}
    for name, parameter in unet.named_parameters():
        if parameter.requires_grad:
            found["lora" if ".lora_" in name else "attention"] += parameter.numel()
    assert found == trained


# The step.


def encoded(n: int) -> dict:
    """Latents and text as sidecars give them."""
    return {"latents": randn(n, 4, 8, 8), "text": {"states": randn(n, 77, 80, seed=1), "pooled": randn(n, 48, seed=2)}}


def test_what_is_dropped_and_how_often(system, asked):
    """Shares of 5, 10 and 20 %: rows without identity, without text, without both; what is left is untouched."""
    n = 1500
    faces, usual = batch(n, side=8, **encoded(n)), system.drop_edges
    system.drop_edges = torch.tensor([0.05, 0.15, 0.35])
    system.step(faces, system.rng("train", 0))
    system.drop_edges = usual
    null, empty = system.projection(torch.zeros(1, 512)), system.backbone.empty_text()
    tokens, text = asked[0]["tokens"], asked[0]["text"]
    no_identity = torch.isclose(tokens, null, atol=1e-5).flatten(1).all(1)
    no_text = (text.states == empty.states).flatten(1).all(1)
    assert torch.equal(no_text, (text.pooled == empty.pooled).all(1))
    torch.testing.assert_close(tokens[~no_identity], system.projection(faces.embeddings["drawn"])[~no_identity])
    assert torch.equal(text.states[~no_text], faces.text["states"][~no_text])
    shares = {
        0.05: no_identity & ~no_text, 0.10: no_text & ~no_identity, 0.20: no_text & no_identity,
        0.65: ~no_text & ~no_identity,
    }  # fmt: skip
    for share, rows in shares.items():  # within four standard deviations
        assert abs(rows.float().mean().item() - share) < 4 * (share * (1 - share) / n) ** 0.5, share


def test_the_null_identity_is_the_trained_projection_of_zeros(system):
    text, x, t = system.encode(["hat"]), randn(1, 4, 8, 8), torch.tensor([500])
    with torch.no_grad():
        nobody = system.predict(x, t, torch.zeros(1, 512), text)
        somebody = system.predict(x, t, batch(1).embeddings["drawn"], text)
        nothing = system.backbone.predict(x, t, text, system.backbone.time_ids(1, 64, 64))
    assert (nobody - nothing).abs().max() > 1e-3 and (nobody - somebody).abs().max() > 1e-3


def test_precomputed_latents_and_text_give_the_loss_of_encoding_them(system):
    plain = batch(2)
    plain.caption = ["a photo of a man", "woman"]
    text = system.backbone.encode_text(plain.caption)
    stored = batch(2, latents=system.backbone.encode_image(plain.pixels()), text=text._asdict())
    first, _ = system.total(plain, system.rng("train", 0))
    second, _ = system.total(stored, system.rng("train", 0))
    assert first.item() == pytest.approx(second.item(), rel=1e-5)


def test_captions_are_the_batchs_or_the_template(system, asked):
    faces = batch(2, latents=randn(2, 4, 8, 8))
    template, own = system.backbone.encode_text(["a photo of a person"]), system.backbone.encode_text(["hat"])
    torch.testing.assert_close(system.text(faces).states, template.states.expand(2, -1, -1))
    faces.caption = ["hat", "hat"]
    torch.testing.assert_close(system.text(faces).pooled, own.pooled.expand(2, -1))


def test_time_ids_are_of_the_photograph_before_and_after_resizing(system, asked, monkeypatch):
    monkeypatch.setattr(system, "size", 64)
    system.step(batch(2, side=96), system.rng("train", 0))
    assert asked[0]["time_ids"].tolist() == [[96, 96, 0, 0, 64, 64]] * 2
    assert asked[0]["x_t"].shape == (2, 4, 8, 8)
    system.step(batch(2, side=96, latents=randn(2, 4, 4, 4)), system.rng("train", 0))
    assert asked[1]["time_ids"].tolist() == [[96, 96, 0, 0, 32, 32]] * 2


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_a_perfect_network_has_no_loss(system, monkeypatch, prediction):
    """The target is of the prediction type that the pipeline's scheduler names."""
    faces = batch(2, **encoded(2))
    monkeypatch.setattr(system, "noise", diffusion.noise_schedule(prediction))

    def perfect(x_t, t, *_args, **_kwargs):
        signal, noise = diffusion.signal_and_noise(system.noise, t, x_t)
        eps = (x_t - signal * faces.latents) / noise
        return {"epsilon": eps, "sample": faces.latents, "v_prediction": signal * eps - noise * faces.latents}[
            prediction
        ]

    monkeypatch.setattr(system, "predict", perfect)
    assert system.total(faces, system.rng("train", 0))[0].item() < 1e-8


def test_noise_offset_shifts_whole_channels(system, asked, monkeypatch):
    faces = batch(4, **encoded(4))
    plain = system.step(faces, system.rng("train", 0)).target
    monkeypatch.setattr(system, "noise_offset", 0.1)
    shift = system.step(faces, system.rng("train", 0)).target - plain
    torch.testing.assert_close(shift, shift[..., :1, :1].expand_as(shift), rtol=0, atol=1e-6)
    assert 0.05 < shift[..., 0, 0].std() < 0.2


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_min_snr_weighting_is_the_papers(prediction):
    """Hang et al. 2023, Sec. 3.4: min(SNR, gamma) on x_0; divided by SNR for eps, by SNR + 1 for v."""
    schedule, t = diffusion.noise_schedule(prediction), torch.tensor([0, 100, 500, 999])
    snr = schedule.alphas_cumprod[t] / (1 - schedule.alphas_cumprod[t])
    over = {"epsilon": snr, "v_prediction": snr + 1, "sample": torch.ones(4)}[prediction]
    found = diffusion.snr_weight(schedule, t, 5.0, added=0.0)
    torch.testing.assert_close(found, snr.clamp(max=5.0) / over, rtol=1e-5, atol=0)


def test_a_step_draws_from_nothing_but_its_generator(system):
    faces = batch(2, **encoded(2))
    state = torch.get_rng_state()
    losses = [system.total(faces, system.rng("train", step))[0].item() for step in (0, 0, 1)]
    assert torch.equal(torch.get_rng_state(), state) and losses[0] == losses[1] != losses[2]


def test_training_lowers_the_loss_and_leaves_the_base_alone(folders):
    made = tiny.system(folders["sd15"], awake=False, lora_rank=2, drop_identity=0.0, drop_text=0.0, drop_both=0.0)
    frozen = {n: p.clone() for n, p in made.backbone.named_parameters() if not p.requires_grad}
    optimizer = made.configure_optimizers()
    faces = batch(4, latents=randn(4, 4, 8, 8), text={"states": randn(4, 77, 32)})
    losses = []
    for _ in range(15):
        loss, _ = made.total(faces, made.rng("train", 0))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0], losses
    after = dict(made.backbone.named_parameters())
    assert all(torch.equal(before, after[name]) for name, before in frozen.items())


def test_mistakes_are_told_in_words(folders, system):
    with pytest.raises(AnonfwError, match="add up to at most 1"):
        tiny.system(folders["sd15"], drop_identity=0.6, drop_text=0.6)
    one_encoder = batch(2, latents=randn(2, 4, 8, 8), text={"states": randn(2, 77, 32)})
    with pytest.raises(AnonfwError, match="width 32 and no pooled vector; this backbone reads width 80"):
        system.step(one_encoder, system.rng("train", 0))
    with pytest.raises(AnonfwError, match="16 channels, this backbone's autoencoder 4"):
        system.latents(batch(2, latents=randn(2, 16, 8, 8)))
    with pytest.raises(AnonfwError, match="neither pictures nor latents"):
        system.latents(batch(2, side=0))


def test_absent_text_is_all_zeros(system):
    absent = system.encode(None, 3)
    assert isinstance(absent, Text) and absent.states.shape == (3, 77, 80) and absent.pooled.shape == (3, 48)
    assert not absent.states.any() and not absent.pooled.any()


def test_what_a_system_says_of_itself(system):
    assert system.recognizer_names() == {"drawn"}
    image = F.interpolate(randn(2, 3, 4, 4), (64, 64), mode="bicubic").clamp(-1, 1)
    assert system.resized(image) is image and system.resized(image, 32).shape == (2, 3, 32, 32)
    assert F.mse_loss(system.resized(system.resized(image, 128), 64), image) < 1e-3


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*")
def test_the_loss_curve_is_the_one_in_git(tiny_faces, tmp_path):
    """A change that should not change numbers must not change them. `ANONFW_UPDATE_GOLDEN=1 pytest ...` writes anew."""
    recipe = tiny_training.recipe(
        tiny_faces, "system.lora_rank=4", f"run={tmp_path / 'run'}", path=ROOT / "recipes" / "sdxl_adapter.yaml"
    )
    found = {"train/loss": list(tiny_training.curve(tiny_training.train(recipe)).values())}
    if os.environ.get("ANONFW_UPDATE_GOLDEN"):
        before = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
        GOLDEN.write_text(json.dumps(before | {"curves": found}, indent=1) + "\n")
    golden = json.loads(GOLDEN.read_text())
    assert found["train/loss"] == pytest.approx(golden["curves"]["train/loss"], rel=golden["relative_tolerance"])
