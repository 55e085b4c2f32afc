"""Reverse personalization: cost by shape, time and memory a face, inversion error.

    python bench/reverse_personalization.py                                      # any machine, under a minute
    python bench/reverse_personalization.py --pipeline FOLDER --adapter FILE     # released weights: `doctor diffusion`

1. What released U-Nets cost, counted on networks without storage: parameters, bytes, operations of one call and a face.
2. Attention memory: torch's `scaled_dot_product_attention` beside the matrix that sliced attention would split.
3. Measured on tiny pipelines (or on the given one): seconds a face, memory, and how exactly a photograph comes back.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import nn

from anonfw import tiny_pipelines
from anonfw.inversion import inversion_times, invert, replay
from anonfw.losses.regression import Regression
from anonfw.nets.backbone import Backbone
from anonfw.nets.identity_adapter import add_identity
from anonfw.reverse_personalization import DEFAULTS, ReversePersonalization
from anonfw.systems.sdxl_adapter import IdentityAdapter

# The released U-Nets, as far as they differ from `UNet2DConditionModel`'s defaults (SD 1.5's).
CONFIGS = {
    "SD 1.5": {"cross_attention_dim": 768, "sample_size": 64},
    "SDXL": {
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 1280 + 6 * 256,
    },
}
CALLS = {"reverse": 4, "nullface": 3, "faceid": 2}  # of the network, for each of the mode's steps


class Drawn(nn.Module):
    """Stands where a recogniser stands: only its name and width are read, embeddings are drawn."""

    name, dim = "drawn", 512


def count(title: str, config: dict) -> None:
    """One row: parameters of U-Net and adapter, bytes in bf16, and operations, on the meta device."""
    from diffusers import UNet2DConditionModel
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        unet = UNet2DConditionModel(**config)
        base = sum(p.numel() for p in unet.parameters())
        side, width = config["sample_size"], config["cross_attention_dim"]
        x_t, t, text = torch.empty(1, 4, side, side), torch.empty(1, dtype=torch.int64), torch.empty(1, 77, width)
        added = {"text_embeds": torch.empty(1, 1280), "time_ids": torch.empty(1, 6)}
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            unet(x_t, t, text, added_cond_kwargs=added if "addition_embed_type" in config else None)
        add_identity(unet, lora_rank=128)
    adapter = sum(p.numel() for p in unet.parameters()) - base
    call = counter.get_total_flops() / 1e12
    face = "  ".join(f"{mode} {CALLS[mode] * DEFAULTS[mode].steps * call:,.0f}" for mode in CALLS)
    print(
        f"{title:<8} {base / 1e6:>8.1f} M {adapter / 1e6:>8.1f} M {2 * base / 2**30:>6.2f} GiB {call:>8.2f}     {face}"
    )


def attention_peak(sliced: bool, positions: int, heads: int, queue) -> None:
    """Puts how many MiB one attention adds to this process's peak."""
    torch.set_num_threads(1)
    q, k, v = torch.randn(3, 1, heads, positions, 64, generator=torch.Generator().manual_seed(0)).unbind(0)
    nn.functional.scaled_dot_product_attention(q[:, :, :8], k[:, :, :8], v[:, :, :8])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if sliced:  # one head at a time, as diffusers' smallest slices
        torch.stack([(q[:, i] @ k[:, i].mT / 8).softmax(-1) @ v[:, i] for i in range(heads)], 1)
    else:
        nn.functional.scaled_dot_product_attention(q, k, v)
    queue.put((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)


def in_process(sliced: bool, positions: int, heads: int) -> float:
    """`attention_peak` in a fresh process: a peak never falls."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    child = context.Process(target=attention_peak, args=(sliced, positions, heads, queue))
    child.start()
    answer = queue.get()
    child.join()
    return answer


def system_on(folder: Path, dtype: str, rank: int, adapter: Path | None) -> IdentityAdapter:
    """An adapter (drawn, or the given file) on the pipeline, in eval mode."""
    from anonfw.training.load import load_weights

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        system = IdentityAdapter(
            identity=Drawn(),
            backbone=Backbone(str(folder), dtype=dtype),
            losses={"noise": Regression()},
            optimizer=partial(torch.optim.AdamW, lr=1e-4),
            lora_rank=rank,
        )
    if adapter is not None:
        load_weights(system, adapter)
    return system.eval()


def measure(title: str, system: IdentityAdapter, steps: int, faces: int) -> None:
    """Rows of one pipeline: each mode's seconds and memory a face, then the inversion error of both solvers."""
    side, device = system.backbone.unet.config.sample_size, system.device
    cuda = device.type == "cuda"
    rng = torch.Generator().manual_seed(0)
    x_0 = torch.randn(faces, system.backbone.channels, side, side, generator=rng).to(device)
    e = nn.functional.normalize(torch.randn(faces, 512, generator=rng), dim=-1).to(device)
    noise_of: Callable = lambda shape: torch.randn(faces, *shape, generator=rng).to(device)  # noqa: E731
    encode = partial(system.encode, n=faces)
    for mode in CALLS:
        anonymizer = ReversePersonalization(mode, steps=steps)
        if cuda:
            torch.cuda.reset_peak_memory_stats(device)
        start = time.perf_counter()
        anonymizer(system.noise, system.predict, x_0, e, encode, noise_of).sum().item()
        seconds = (time.perf_counter() - start) / faces
        peak = f"{torch.cuda.max_memory_allocated(device) / 2**30:.2f} GiB" if cuda else "-"
        print(f"{title:<16} {mode:<9} {steps:>5} steps {seconds:>9.3f} s a face   peak {peak}", flush=True)
    text = encode([""] * faces)
    own = partial(system.predict, e=e, c=text)
    for solver in ("sde-dpm++", "ddpm"):
        times = inversion_times(system.noise, steps, 0.7)
        with torch.no_grad():
            trajectory = invert(system.noise, own, x_0, noise_of((steps, *x_0.shape[1:])), times, solver)
            error = (replay(system.noise, own, trajectory) - x_0).abs().max() / x_0.abs().max()
        print(f"{title:<16} {solver:<9} {steps:>5} steps   largest inversion error {error:.1e} of the largest latent")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", type=Path, help="folder in diffusers' layout; without it tiny ones are measured")
    parser.add_argument("--adapter", type=Path, help="released adapter for --pipeline; without it a drawn one")
    parser.add_argument("--dtype", default="fp32", choices=("fp32", "bf16", "fp16"))
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--faces", type=int, default=2, help="of one batch")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    print(f"{'':<8} {'U-Net':>10} {'adapter':>10} {'bf16':>10} {'TFLOP a call':>10}   TFLOP a face")
    for title, config in CONFIGS.items():
        count(title, config)
    print("\nattention, 4096 positions, 10 heads, fp32 (SDXL's largest at 1024 px)")
    for sliced, title in ((False, "scaled_dot_product_attention"), (True, "sliced, one head at a time")):
        print(f"  {title:<30} {in_process(sliced, 4096, 10):>7.1f} MiB above the inputs")
    print(f"  {'one head of the matrix':<30} {4096**2 * 4 / 2**20:>7.1f} MiB\n")

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.pipeline:
        system = system_on(args.pipeline, args.dtype, 128, args.adapter).to(device)
        return measure(args.pipeline.name, system, args.steps, args.faces)
    with tempfile.TemporaryDirectory() as folder:
        for kind in ("sd15", "sdxl"):
            pipeline = tiny_pipelines.save(Path(folder) / kind, kind)
            measure(
                f"tiny {kind} {args.dtype}", system_on(pipeline, args.dtype, 4, None).to(device), args.steps, args.faces
            )
    return None


if __name__ == "__main__":
    main()
