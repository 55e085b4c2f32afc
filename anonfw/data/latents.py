"""An autoencoder's latents, computed once: of each picture and of the mirrored picture.

The encoding of a mirrored picture is not the mirrored encoding (TAESD's differ by 0.73 of the latents' spread), so both
are kept, and the loader's flip chooses. A picture is resized as a whole (bicubic, antialiased): there is no other crop.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from anonfw.data import arrays
from anonfw.data.card import Card, DataError, Shard
from anonfw.data.files import sha256_of


def folder_sha256(folder: Path) -> str:
    """One hash of the configuration and the weights in a network's folder."""
    files = sorted(path for path in folder.iterdir() if path.suffix in (".json", ".safetensors", ".txt", ".bin"))
    return hashlib.sha256("".join(f"{path.name} {sha256_of(path)}\n" for path in files).encode()).hexdigest()


def kind_of(dataset: Path, folder: Path, source: str, size: int) -> arrays.Kind:
    """What `embed --latents SOURCE --size PX` writes. Each autoencoder and size has files of its own."""
    return arrays.Kind(
        name=f"latents_{folder_sha256(folder)[:8]}_{size}",
        sha256=folder_sha256(folder),
        remedy=f"Run: python -m anonfw embed {dataset} --latents {source} --size {size}",
        about={"source": source, "size": size, "crop": "whole picture", "axes": "sample, mirrored, c, h, w"},
    )


class Latents:
    """The latents of a split.

    Args:
        spec: source, size, and optionally revision, as they were given to `embed`.
    Raises:
        DataError: the specification has other keys, or the arrays are missing, damaged or of another autoencoder.
    """

    def __init__(self, folder: Path, shards: Sequence[Shard], spec: Mapping[str, Any]) -> None:
        from anonfw.nets.autoencoders import autoencoder_folder

        if not {"source", "size"} <= set(spec) <= {"source", "size", "revision"}:
            raise DataError(f"latents are given as {{source: ..., size: ...}} (and revision), not {dict(spec)}")
        vae = autoencoder_folder(spec["source"], spec.get("revision"))
        kind = kind_of(folder, vae, spec["source"], spec["size"])
        self._arrays = arrays.Arrays(folder, shards, kind, lambda s: s.samples, lambda s: s.sha256)

    def of(self, shard: np.ndarray, row: np.ndarray, mirrored: np.ndarray) -> np.ndarray:
        """(n,) shard numbers, rows and mirroring -> (n,c,h,w) float32."""
        return self._arrays.take(shard, row, mirrored.astype(np.int64))

    def missing(self, shard: np.ndarray, row: np.ndarray) -> np.ndarray:
        """(n,) True where the picture was broken."""
        zero = np.zeros(len(shard), np.int64)
        return np.isnan(self._arrays.take(shard, row, zero, zero, zero, zero))


def write_latents(
    folder: Path,
    card: Card,
    shards: Sequence[Shard],
    source: str,
    size: int,
    revision: str | None,
    batch_size: int,
    device: str,
    bf16: bool,
    advance: Callable[[int], object],
) -> int:
    """Encode the shards that have no valid latents yet, and say how many these were.

    Raises:
        DataError: a damaged shard, or latents that are not finite (a half-precision autoencoder may overflow).
    """
    import torch
    import torch.nn.functional as F

    from anonfw.data.pictures import pictures
    from anonfw.nets.autoencoders import autoencoder, autoencoder_folder
    from anonfw.nets.codec import Autoencoder

    vae = autoencoder_folder(source, revision)
    kind, done = kind_of(folder, vae, source, size), 0
    codec: Autoencoder | None = None
    for shard in shards:
        if arrays.is_there(folder, shard, kind, shard.samples, shard.sha256):
            advance(shard.samples)
            continue
        codec = codec or autoencoder(source, revision).to(device)
        found = np.full(
            (shard.samples, 2, codec.channels, size // codec.factor, size // codec.factor), np.nan, np.float32
        )
        for rows, images in pictures(folder, card, shard, batch_size, advance):
            x = F.interpolate(images.to(device).float().div(127.5).sub(1), (size, size), mode="bicubic", antialias=True)
            with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
                for side, y in enumerate((x.clamp(-1, 1), x.clamp(-1, 1).flip(-1))):
                    found[rows, side] = codec.encode(y).float().cpu().numpy()
            if not np.isfinite(found[rows]).all():
                raise DataError(f"{source} gave latents that are not finite for pictures of {shard.file}.")
        arrays.save(folder, shard, kind, found, shard.sha256)
        done += 1
    return done
