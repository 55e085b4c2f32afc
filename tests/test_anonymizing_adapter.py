"""Reverse personalization through a whole system: tiny SD 1.5 and SDXL with identity adapter, text and autoencoder."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from anonfw import recipe as recipes
from anonfw import tiny_pipelines
from anonfw.batch import FaceBatch
from anonfw.inversion import inversion_times, invert, replay
from anonfw.losses.regression import Regression
from anonfw.nets.backbone import Backbone
from anonfw.nets.non_identity import face_region
from anonfw.reverse_personalization import ReversePersonalization
from anonfw.systems.sdxl_adapter import IdentityAdapter

KINDS = ("sd15", "sdxl")
SIDE = 64


class Recognizer(nn.Module):
    """A name and a width: the embeddings come with the batch."""

    name, dim = "drawn", 32


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    cache = tmp_path_factory.mktemp("pipelines")
    return {kind: tiny_pipelines.save(cache / kind, kind) for kind in KINDS}


@pytest.fixture(scope="module")
def system_of(folders):
    """(kind, anonymizer, backbone options) -> a system; the backbone of each set of options is opened once."""
    opened: dict[tuple, IdentityAdapter] = {}

    def make(kind: str, anonymizer: ReversePersonalization, paste: bool = False, **options) -> IdentityAdapter:
        key = (kind, *sorted(options.items()))
        if key not in opened:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                opened[key] = IdentityAdapter(
                    identity=Recognizer(),
                    backbone=Backbone(str(folders[kind]), **options),
                    losses={"noise": Regression()},
                    optimizer=partial(torch.optim.AdamW, lr=1e-3),
                    lora_rank=2,
                ).eval()
        system = opened[key]
        system.anonymizer, system.paste = anonymizer, paste
        return system

    return make


def batch_of(keys: list[int]) -> FaceBatch:
    def drawn(key: int, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(key))

    images = torch.stack([drawn(key, 3, SIDE // 8, SIDE // 8) for key in keys])
    smooth = nn.functional.interpolate(images, (SIDE, SIDE), mode="bicubic").clamp(-1, 1)
    return FaceBatch(
        image=smooth.add(1).mul(127.5).round().to(torch.uint8),
        identity=torch.tensor(keys),
        index=torch.tensor(keys),
        key=[f"face{key}" for key in keys],
        landmarks=torch.zeros(len(keys), 5, 2),
        embeddings={"drawn": nn.functional.normalize(torch.stack([drawn(k + 50, 32) for k in keys]), dim=-1)},
    )


@pytest.mark.parametrize(("mode", "kind"), [("reverse", "sdxl"), ("nullface", "sd15"), ("faceid", "sdxl")])
def test_every_mode_gives_each_face_its_own_picture(system_of, mode, kind):
    """Finite, in range, one per face and draw, and independent of who shares the batch."""
    system = system_of(kind, ReversePersonalization(mode, steps=2, sex="male"))
    together, alone, redrawn = (
        system.anonymize(batch_of(keys), draw) for keys, draw in (([4, 5], 0), ([5], 0), ([5], 1))
    )
    assert together.shape == (2, 3, SIDE, SIDE) and together.dtype == torch.float32
    assert torch.isfinite(together).all() and together.abs().max() <= 1
    torch.testing.assert_close(together[1], alone[0], rtol=0, atol=2e-4)
    assert (together[0] - together[1]).abs().max() > 0.01
    assert (redrawn - alone).abs().max() > 1e-3


@pytest.mark.parametrize(("kind", "solver"), [("sd15", "ddpm"), ("sdxl", "sde-dpm++")])
def test_inversion_is_exact_through_adapter_and_lora(system_of, solver, kind):
    """The photograph's latents come back under its own identity and caption; under another identity they do not."""
    system, batch = system_of(kind, ReversePersonalization()), batch_of([1, 2])
    x_0, e, c = system.latents(batch), system.embed(batch), system.text(batch)
    times = inversion_times(system.noise, 3, 0.7)
    draws = system.noise_of(batch, "test", 0, (3, *x_0.shape[1:]))
    with torch.no_grad():
        own, other = (partial(system.predict, e=identity, c=c) for identity in (e, e.roll(1, 0)))
        trajectory = invert(system.noise, own, x_0, draws, times, solver)
        error = (replay(system.noise, own, trajectory) - x_0).abs().max().item()
        change = (replay(system.noise, other, trajectory) - x_0).abs().max().item()
    assert error <= 1e-6 * max(1.0, x_0.abs().max().item())
    assert change > 100 * error


@pytest.mark.slow
def test_zero_text_matters_where_it_should(system_of):
    """The asymmetry of SDXL's pipeline is an argument; without the identity the photograph comes back either way."""
    batch, options = batch_of([1]), [{"steps": 2, "zero_text": zeros} for zeros in (True, False)]
    asymmetric, plain = (system_of("sdxl", ReversePersonalization(**some)).anonymize(batch) for some in options)
    assert (asymmetric - plain).abs().max() > 1e-3
    for some in options:
        system = system_of("sdxl", ReversePersonalization(identity_scale=0.0, **some))
        reconstruction = system.backbone.decode(system.latents(batch)).clamp(-1, 1)
        torch.testing.assert_close(system.anonymize(batch), reconstruction, rtol=0, atol=1e-4)


def test_the_photograph_is_kept_outside_the_face(system_of):
    system, batch = system_of("sdxl", ReversePersonalization(steps=2, mask_delay=0), paste=True), batch_of([1])
    out, outside = system.anonymize(batch), (face_region(SIDE, softness=0.08) == 0).expand(1, 3, -1, -1)
    assert torch.equal(out[outside], batch.pixels()[outside])
    assert (out - batch.pixels())[~outside].abs().max() > 0.01


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_saving_memory_does_not_change_the_picture(system_of, kind):
    anonymizer, batch = ReversePersonalization(steps=2, guidance=-1, age=30, sex="female"), batch_of([1, 2])
    plain = system_of(kind, anonymizer).anonymize(batch)
    saving = system_of(kind, anonymizer, slicing=True, offload=True)
    assert saving.backbone.codec.vae.use_slicing and saving.backbone.codec.vae.use_tiling
    torch.testing.assert_close(saving.anonymize(batch), plain, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_half_precision_inverts_as_exactly_and_changes_the_edit_little(system_of):
    """bf16 has 8 bits, but inversion and replay round alike: without guidance the latents come back."""
    batch, change = batch_of([1, 2]), {}
    for dtype in ("fp32", "bf16"):
        system = system_of("sdxl", ReversePersonalization(), dtype=dtype)
        frozen = {p.dtype for p in system.backbone.unet.parameters() if not p.requires_grad}
        assert frozen == {torch.bfloat16 if dtype == "bf16" else torch.float32}
        x_0, e = system.latents(batch), system.embed(batch)
        for guidance in (0, -1):
            anonymizer = ReversePersonalization(steps=2, guidance=guidance, zero_text=False)
            noise_of = partial(system.noise_of, batch, "test", 0)
            out = anonymizer(system.noise, system.predict, x_0, e, partial(system.encode, n=2), noise_of)
            change[dtype, guidance] = out - x_0
    assert change["fp32", 0].abs().max() < 1e-6 and change["bf16", 0].abs().max() < 1e-6
    assert change["fp32", -1].norm() > 1e-2
    assert (change["bf16", -1] - change["fp32", -1]).norm() < 0.5 * change["fp32", -1].norm()


def test_all_options_are_keys_of_the_recipe():
    overrides = ["system.anonymizer.mode=nullface", "system.anonymizer.sex=female", "system.backbone.slicing=true"]
    recipe = recipes.read("recipes/sdxl_adapter.yaml", overrides)
    anonymizer = recipes.build(recipe["system"]["anonymizer"])
    assert (anonymizer.mode, anonymizer.guidance, anonymizer.prompt) == ("nullface", 10.0, "woman")
    wrong = recipes.check(recipes.load("recipes/sdxl_adapter.yaml", ["system.anonymizer.guidence=3"]))
    assert len(wrong) == 1 and "guidance" in str(wrong[0])
