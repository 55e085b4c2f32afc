"""Sidecars are made here: the verb `embed` runs a recogniser over a data set once and keeps its embeddings.

Under torchrun or srun the processes share the shards; each can be killed, and started again in any number.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from anonfw.data import processes
from anonfw.data.card import Card, DataError, Shard
from anonfw.data.embeddings import Sidecar, save_sidecar
from anonfw.data.table import local_folder

if TYPE_CHECKING:
    from anonfw.identity import Recognizer


def write_sidecars(
    dataset: str | Path,
    encoder: Recognizer,
    splits: Sequence[str] | None = None,
    batch_size: int = 64,
    device: str | None = None,
    progress: bool = True,
    rank: int | None = None,
    world: int | None = None,
    bf16: bool = False,
) -> int:
    """Embed every shard that has no valid array of this encoder yet. Interrupted, it goes on at the next shard.

    Valid is an array of the encoder's hash, of this tar, with a row a sample.

    A sample whose picture is broken gets a row of NaN; the loader drops such samples anyway.

    Args:
        dataset: folder, or `embedded`.
        encoder: `anonfw.identity` recogniser; its `name` and `sha256` are recorded.
        splits: only these; None is all.
        batch_size: pictures a forward pass.
        device: None takes the GPU where there is one, under torchrun and srun this process's own.
        progress: show a bar.
        rank, world: of this process, which takes every `world`-th shard; None asks torchrun's or srun's environment.
        bf16: compute in bfloat16 where autocast allows it.
    Returns:
        shards that this process embedded now.
    Raises:
        DataError: no such data set or split, a shard that is not the one of its card, or embeddings that are not
            finite.
    """
    from tqdm import tqdm

    folder = local_folder(dataset)
    card = Card.load(folder)
    if rank is None or world is None:
        rank, world = processes.place()
    todo = [shard for shard in card.share(splits, rank, world) if not _valid(folder, shard, encoder)]
    device = device or processes.device()
    encoder = encoder.to(device)
    title = encoder.name if world == 1 else f"{encoder.name} {rank + 1}/{world}"
    with tqdm(total=sum(shard.samples for shard in todo), unit="img", disable=not progress, desc=title) as bar:
        for shard in todo:
            embeddings = _embed_shard(folder, card, shard, encoder, batch_size, device, bf16, bar.update)
            save_sidecar(folder, shard, encoder.name, encoder.sha256, embeddings)
    return len(todo)


def _valid(folder: Path, shard: Shard, encoder: Recognizer) -> bool:
    try:
        Sidecar(folder, [shard], encoder.name, encoder.sha256)
    except DataError:
        return False
    return True


def _embed_shard(
    folder: Path,
    card: Card,
    shard: Shard,
    encoder: Recognizer,
    batch_size: int,
    device: str,
    bf16: bool,
    advance: Callable[[int], object],
) -> np.ndarray:
    import torch

    from anonfw.data.pictures import pictures
    from anonfw.identity import embed_aligned

    found = np.full((shard.samples, encoder.dim), np.nan, np.float32)
    for rows, images in pictures(folder, card, shard, batch_size, advance):
        images = images.to(device)
        with torch.inference_mode(), torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
            vectors = embed_aligned(encoder, images.float().div(127.5).sub(1), card.alignment)
        found[rows] = vectors.float().cpu().numpy()
        if not np.isfinite(found[rows]).all():
            raise DataError(f"{encoder.name} gave embeddings that are not finite for pictures of {shard.file}.")
    return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dataset", help="folder of a data set (data/SCHEMA.md), or 'embedded'")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--encoder", metavar="NAME", help="weights of a recogniser, such as arcface_mbf")
    what.add_argument("--captions", action="store_true", help="describe each picture by what is measured on it")
    what.add_argument(
        "--latents", metavar="SOURCE", help="an autoencoder: face_model (TAESD), a pipeline's folder or hub id"
    )
    what.add_argument("--text", metavar="SOURCE", help="encode the captions with a pipeline's text encoders")
    parser.add_argument("--size", type=int, metavar="PX", help="with --latents: side that pictures are resized to")
    parser.add_argument("--revision", help="with --latents and --text: commit of a hub id")
    parser.add_argument("--split", action="append", metavar="NAME", help="only this split (may be repeated)")
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="pictures a forward pass (default 64)")
    parser.add_argument("--device", help="cpu, cuda, ... (default: the GPU where there is one)")
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16: faster, cosine to float32 over .999")


def run(args: argparse.Namespace) -> int:
    from anonfw.identity import open_recognizer

    if args.encoder is None:
        from anonfw.data import precompute

        return precompute.run(args)
    folder = local_folder(args.dataset)
    Card.load(folder)  # before the weights are fetched
    encoder = open_recognizer(args.encoder)
    done = write_sidecars(folder, encoder, args.split, args.batch_size, args.device, bf16=args.bf16)
    rank, world = processes.place()
    others = "the others were there already" if world == 1 else f"by process {rank + 1} of {world}"
    print(f"{encoder.name} (sha256 {encoder.sha256[:12]}...): {done} shards embedded, {others}")
    return 0
