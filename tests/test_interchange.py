"""The released IP-Adapter-FaceID layout: diffusers loads our export and computes the same; released files come in."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import tiny_adapter as tiny
import tiny_training
import torch
from safetensors.torch import load_file, save_file
from tiny_adapter import batch, randn

from anonfw import diffusion, tiny_pipelines
from anonfw.data.files import sha256_of
from anonfw.errors import AnonfwError
from anonfw.nets.identity_adapter import from_released, is_released, names_of, released_state
from anonfw.training.load import load_system, load_weights

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("pipelines")
    return {kind: tiny_pipelines.save(root / kind, kind) for kind in ("sd15", "sdxl")}


@pytest.fixture(scope="module")
def system(folders):
    return tiny.system(folders["sd15"], lora_rank=2)


@pytest.fixture(scope="module")
def state(system) -> dict[str, torch.Tensor]:
    """As a released file has it."""
    return {name: value.clone() for name, value in system.interchange()["ip_adapter.safetensors"].items()}


def theirs(folder: Path, adapter: Path, e: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Latents of a guided run of diffusers' own pipeline with its own loader."""
    from diffusers import DDIMScheduler, DiffusionPipeline

    logging.getLogger("diffusers").setLevel(logging.ERROR)
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = DDIMScheduler.from_config(
        pipeline.scheduler.config, timestep_spacing="trailing", clip_sample=False, set_alpha_to_one=True
    )
    pipeline.load_ip_adapter(
        str(adapter.parent), subfolder="", weight_name=adapter.name, image_encoder_folder=None, local_files_only=True
    )
    pipeline.set_ip_adapter_scale(0.7)
    return pipeline(
        "a photo of a man", negative_prompt="hat", guidance_scale=4.0, num_inference_steps=4, height=64, width=64,
        latents=noise, ip_adapter_image_embeds=[torch.stack([torch.zeros_like(e), e])], output_type="latent",
    ).images  # fmt: skip


def ours(system, e: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """The same run here."""
    system.scale = 0.7

    @torch.no_grad()
    def guided(x_t, t):
        to = system.predict(x_t, t, e, system.encode(["a photo of a man"]))
        away = system.predict(x_t, t, torch.zeros_like(e), system.encode(["hat"]))
        return away + 4 * (to - away)

    return diffusion.sample(system.noise, guided, noise, 4, "ddim")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
@pytest.mark.parametrize("rank", [0, 2], ids=["plain", "lora"])
def test_diffusers_loads_the_adapter_and_computes_the_same(folders, tmp_path, kind, rank):
    made = tiny.system(folders[kind], lora_rank=rank)
    file = tmp_path / "ip_adapter.safetensors"
    save_file({n: v.contiguous() for n, v in made.interchange()[file.name].items()}, file)
    e, noise = batch(1).embeddings["drawn"], randn(1, 4, 8, 8, seed=5)
    found, expected = ours(made, e, noise), theirs(folders[kind], file, e, noise)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * expected.abs().max().item())
    made.projection.norm.bias.data.add_(0.5)  # it is the adapter that is compared
    assert (ours(made, e, noise) - expected).abs().max() > 1e-2 * expected.abs().max()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*")
def test_a_run_is_exported_for_diffusers_and_goes_on_from_that_file(tiny_faces, tmp_path):
    """fit, export, diffusers; and `init` from the exported file is the same adapter."""
    from anonfw.export import export

    path, run = ROOT / "recipes" / "sdxl_adapter.yaml", tmp_path / "run"
    recipe = tiny_training.recipe(tiny_faces, "system.lora_rank=2", "trainer.max_steps=2", f"run={run}", path=path)
    tiny_training.train(recipe)
    folder = export(run, tmp_path / "exported", dtype="fp32")
    file = folder / "ip_adapter.safetensors"
    assert json.loads((folder / "export.json").read_text())["interchange"] == {file.name: sha256_of(file)}
    made, _ = load_system(folder)
    e, noise = batch(1).embeddings["drawn"], randn(1, 4, 8, 8, seed=5)
    expected = theirs(Path(made.backbone.source), file, e, noise)
    torch.testing.assert_close(ours(made, e, noise), expected, rtol=0, atol=1e-5 * expected.abs().max().item())
    before = {name: value.clone() for name, value in made.trained_state().items()}
    for value in made.trained_state().values():
        value.data.zero_()
    load_weights(made, file)
    assert all(torch.equal(before[name], value) for name, value in made.trained_state().items())


def test_layers_are_numbered_in_the_order_of_the_attention_processors(system, state):
    unet = system.backbone.unet
    for index, processor in enumerate(unet.attn_processors):
        attn = unet.get_submodule(processor.removesuffix(".processor"))
        assert (f"ip_adapter.{index}.to_k_ip.weight" in state) == (index % 2 == 1)
        down = attn.to_out[0].lora_A["default"].weight
        assert torch.equal(state[f"ip_adapter.{index}.to_out_lora.down.weight"], down)
    assert torch.equal(state["image_proj.proj.2.weight"], system.projection.ff.net[2].weight)
    assert set(names_of(unet)) | {name for name in state if name.startswith("image_proj.")} == set(state)


@pytest.mark.parametrize("kind", ["bin", "safetensors"])
def test_a_released_file_comes_in(folders, tmp_path, system, state, kind):
    """`.bin` is a nested pickle of tensors, read with weights_only; both are half precision."""
    half = {name: value.half() for name, value in state.items()}
    file = tmp_path / f"ip-adapter-faceid.{kind}"
    if kind == "bin":
        nested: dict[str, dict] = {"image_proj": {}, "ip_adapter": {}}
        for name, value in half.items():
            group, _, rest = name.partition(".")
            nested[group][rest] = value
        torch.save(nested, file)
    else:
        save_file({name: value.contiguous() for name, value in half.items()}, file)
    fresh = tiny.system(folders["sd15"], awake=False, lora_rank=2)
    load_weights(fresh, file)
    for name, value in system.trained_state().items():
        assert torch.equal(fresh.trained_state()[name], value.half().float()), name


def test_our_own_weights_are_not_taken_for_a_released_file(system, state, tmp_path):
    own = {name: value.detach() for name, value in system.trained_state().items()}
    assert is_released(state) and not is_released(own) and system.from_interchange(own) is own
    save_file({name: value.contiguous() for name, value in own.items()}, tmp_path / "own.safetensors")
    load_weights(system, tmp_path / "own.safetensors")
    torch.save({"step": 3}, tmp_path / "other.bin")
    with pytest.raises(AnonfwError, match="holds no tensors"):
        load_weights(system, tmp_path / "other.bin")
    assert load_file(tmp_path / "own.safetensors").keys() == own.keys()


def swapped(state: dict, one: int, other: int) -> dict:
    """Two layers in each other's place."""
    places = {str(one): str(other), str(other): str(one)}

    def moved(name: str) -> str:
        group, index, rest = name.split(".", 2)
        return f"{group}.{places.get(index, index)}.{rest}" if group == "ip_adapter" else name

    return {moved(name): value for name, value in state.items()}


def without(state: dict, part: str) -> dict:
    return {name: value for name, value in state.items() if part not in name}


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda s: without(s, "_lora."), "LoRA of rank 0, the recipe 2: set lora_rank"),
        (lambda s: without(s, "ip_adapter.31."), r"another U-Net: 10 names differ.*\(layers .*: 15, 16\)"),
        (lambda s: swapped(s, 1, 9), r"\(16, 32\).* needs \(32, 32\)|\(32, 32\).* needs \(16, 32\)"),
        (lambda s: s | {"image_proj.proj.2.weight": randn(64, 1024)}, "width 32, 2 tokens; .* has .* 4 tokens"),
        (lambda s: s | {"image_proj.proj.0.weight": randn(1024, 128)}, "embeddings of width 128"),
        (lambda s: without(s, "image_proj.proj.0") | {"image_proj.proj.weight": randn(4, 4)}, "for CLIP images"),
        (
            lambda s: without(s, "image_proj.norm") | {"image_proj.perceiver_resampler.proj_in.weight": randn(4, 4)},
            "FaceID-Plus",
        ),
    ],
)  # fmt: skip
def test_an_adapter_that_does_not_fit_is_refused_in_words(system, state, spoil, message):
    with pytest.raises(AnonfwError, match=message):
        from_released(spoil(state), system.projection, system.backbone.unet)


def test_the_adapter_of_another_base_is_refused_and_nothing_is_loaded(folders, system, state, tmp_path):
    other = tiny.system(folders["sdxl"], lora_rank=2)
    save_file({name: value.contiguous() for name, value in state.items()}, tmp_path / "sd15.safetensors")
    before = {name: value.clone() for name, value in other.trained_state().items()}
    with pytest.raises(AnonfwError, match="tokens of width 32.* this recipe has .* width 80.*SD 1.5: 768, SDXL: 2048"):
        load_weights(other, tmp_path / "sd15.safetensors")
    assert all(torch.equal(before[name], value) for name, value in other.trained_state().items())
    assert released_state(other.projection, other.backbone.unet).keys() != state.keys()
