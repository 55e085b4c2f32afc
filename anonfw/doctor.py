"""The verb `doctor`: what this machine and this installation have, and whether the GPU really computes."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

OK, NOTE, BROKEN = "ok", "-", "BROKEN"
Row = tuple[str, str, str]  # state, what, finding

PACKAGES = [
    "torch",
    "torchvision",
    "lightning",
    "diffusers",
    "transformers",
    "safetensors",
    "insightface",
    "facenet-pytorch",
    "open_clip_torch",
    "onnx",
    "onnx2torch",
    "onnxruntime",
    "webdataset",
    "simplejpeg",
    "opencv-python",
    "numpy",
    "scipy",
    "wandb",
    "matplotlib",
]


def versions() -> Iterator[Row]:
    """Python, the platform and the packages; a missing dependency is broken."""
    yield OK, "python", f"{platform.python_version()} at {sys.executable}"
    yield OK, "platform", platform.platform()
    for name in PACKAGES:
        try:
            yield OK, name, importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield BROKEN, name, "not installed; run `make setup` or `pip install -e .`"


def devices() -> Iterator[Row]:
    """Processors and threads, then each GPU with the result of `matmul_agrees`."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield OK, "cpu", f"{cores} cores usable, {torch.get_num_threads()} torch threads"
    yield NOTE, "OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", "not set")
    if torch.backends.mps.is_available():
        yield matmul_agrees("mps")
    if not torch.cuda.is_available():
        built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
        yield NOTE, "gpu", f"none in use (torch is built with {built}); training runs on the CPU"
        return
    for number in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(number)
        yield OK, f"cuda:{number}", f"{card.name}, {card.total_memory / 2**30:.0f} GiB, sm_{card.major}{card.minor}"
        yield matmul_agrees(f"cuda:{number}")
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        yield OK if bf16 else NOTE, "  bf16", "in hardware" if bf16 else "emulated: use precision 16-mixed or 32-true"


def matmul_agrees(device: str, size: int = 512) -> Row:
    """Multiply on the device, check it against the CPU, and see that the device's memory grew. One row.

    `torch.cuda.is_available()` is also true for a card that this build of torch has no kernels for.
    """
    import torch

    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(2, size, size, generator=generator)
    try:
        before = torch.cuda.memory_allocated(device) if device.startswith("cuda") else 0
        there = left.to(device)
        on_device = there @ right.to(device)
        used = (torch.cuda.memory_allocated(device) - before) if device.startswith("cuda") else on_device.nbytes
        start = time.perf_counter()
        for _ in range(10):
            on_device = there @ on_device / size
        on_device.sum().item()  # waits for the device
        milliseconds = (time.perf_counter() - start) * 100
        error = (there @ right.to(device)).cpu().sub(left @ right).abs().max().item() / size**0.5
    except RuntimeError as trouble:
        return BROKEN, "  matmul", f"fails on {device}: {str(trouble).splitlines()[0]}"
    if error > 1e-2 or used < on_device.nbytes:
        return BROKEN, "  matmul", f"differs from the CPU by {error:.1e}, {used} bytes held: the device is not trusted"
    return OK, "  matmul", f"used and agrees with the CPU (relative error {error:.0e}, {milliseconds:.2f} ms)"


def weights() -> Iterator[Row]:
    """Each pretrained file: here, absent (fetched when first needed), or damaged."""
    from anonfw.weights import list_weights

    for row in list_weights():
        state = {"ok": OK, "absent": NOTE, "unverified": NOTE}.get(row.state, BROKEN)
        place = row.path if row.path is not None and row.state != "absent" else "fetched when first needed"
        size = f"{row.weight.size / 1e6:.1f} MB" if row.weight.size else "size not known"
        yield state, row.weight.name, f"{row.state}, {size}, {place}"


def released_models() -> Iterator[Row]:
    """Released Stable Diffusion pipelines and FaceID adapters, and the command that anonymizes with them."""
    from anonfw.released import TITLES, released

    for row in released():
        yield OK if row.pipeline else NOTE, TITLES[row.kind], str(row.pipeline or "not here")
        yield OK if row.adapter else NOTE, "  FaceID adapter", str(row.adapter or "not here")
        yield NOTE, "  run", row.command()


def places() -> Iterator[Row]:
    """Where files are kept and how much room is there."""
    from anonfw.weights import cache_dir, local_dir

    yield from (_place("weights cache", cache_dir()), _place("weights by hand", local_dir()))
    yield _place("runs", Path("runs"))
    hub = os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface"
    yield _place("hub cache", Path(hub))
    for name in ("ANONFW_CACHE", "ANONFW_WEIGHTS", "WANDB_MODE", "HF_HUB_OFFLINE", "CUDA_VISIBLE_DEVICES"):
        if name in os.environ:
            yield NOTE, f"${name}", os.environ[name]


def _place(what: str, folder: Path) -> Row:
    folder = folder.expanduser().absolute()
    there = folder
    while not there.exists():
        there = there.parent
    free = shutil.disk_usage(there).free / 1e9
    writable = os.access(there, os.W_OK)
    remark = "" if folder.exists() else ", not made yet"
    state = OK if writable and free > 1 else NOTE
    return state, what, f"{folder} ({free:.0f} GB free{remark}{'' if writable else ', not writable'})"


SECTIONS: dict[str, Callable[[], Iterator[Row]]] = {
    "versions": versions,
    "devices": devices,
    "places": places,
    "weights": weights,
    "diffusion": released_models,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"some of: {', '.join(SECTIONS)} (default: all)")


def run(args: argparse.Namespace) -> int:
    """Print the tables. 1 if something essential is broken, else 0."""
    from anonfw.dotted import suggest
    from anonfw.errors import AnonfwError

    for name in args.sections:
        if name not in SECTIONS:
            hint = suggest(name, SECTIONS) or f"; there are {', '.join(SECTIONS)}"
            raise AnonfwError(f"doctor has no section {name!r}{hint}")
    broken = []
    for name in args.sections or SECTIONS:
        rows = list(SECTIONS[name]())
        width = max(len(what) for _, what, _ in rows)
        print(f"{name}\n" + "\n".join(f"  {state:<6}  {what:<{width}}  {finding}" for state, what, finding in rows))
        broken += [what.strip() for state, what, _ in rows if state == BROKEN]
    print(f"\nbroken: {', '.join(broken)}" if broken else "\nnothing essential is broken")
    return 1 if broken else 0
