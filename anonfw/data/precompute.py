"""`embed` beyond embeddings: captions, an autoencoder's latents, and encoded captions, as files beside the shards."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from anonfw.data import processes
from anonfw.data.captions import write_captions
from anonfw.data.card import Card
from anonfw.data.latents import write_latents
from anonfw.data.table import local_folder
from anonfw.data.text_states import write_text
from anonfw.errors import AnonfwError


def run(args: argparse.Namespace) -> int:
    """What `embed --captions`, `--latents` or `--text` asks for. Interrupted, it goes on at the next shard."""
    from tqdm import tqdm

    if (args.latents is None) != (args.size is None):
        raise AnonfwError("--latents and --size go together: latents belong to pictures of one size")
    folder = local_folder(args.dataset)
    card = Card.load(folder)
    shards = card.share(args.split, *processes.place())
    title = "captions" if args.captions else "latents" if args.latents else "text"
    with tqdm(total=sum(shard.samples for shard in shards), unit="img", desc=title) as bar:
        done = _write(args, folder, card, shards, bar.update)
    print(f"{title}: {done} shards written, the others were there already or are another process's")
    return 0


def _write(args: argparse.Namespace, folder: Path, card: Card, shards: list, advance: Callable[[int], object]) -> int:
    if args.captions:
        return write_captions(folder, card, shards, args.batch_size, advance)
    device = args.device or processes.device()
    if args.text:
        return write_text(folder, shards, args.text, args.revision, args.batch_size, device, advance)
    return write_latents(
        folder, card, shards, args.latents, args.size, args.revision, args.batch_size, device, args.bf16, advance
    )
