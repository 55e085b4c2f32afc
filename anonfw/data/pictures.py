"""The pictures of a shard one after the other, for what is computed once from all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from anonfw.data import decode
from anonfw.data.card import Card, DataError, Shard
from anonfw.data.index import OK, open_index

if TYPE_CHECKING:
    from torch import Tensor


def pictures(
    folder: Path, card: Card, shard: Shard, batch_size: int, advance: Callable[[int], object]
) -> Iterator[tuple[np.ndarray, Tensor]]:
    """Pairs of (n,) rows of the shard and their pictures (n,3,s,s) uint8. Broken pictures are left out.

    Args:
        advance: told how many rows were done after each batch.
    Raises:
        DataError: the tar is not the one that the card describes.
    """
    import torch

    tar = folder / shard.file
    index = open_index(tar, shard)
    if index.sha256 != shard.sha256 or tar.stat().st_size != shard.bytes:
        raise DataError(f"{tar} is not the shard that the card describes: it is damaged. Copy or write it again first.")
    tars, side = decode.Tars([tar]), card.image_size
    for start in range(0, len(index), batch_size):
        rows = np.arange(start, min(start + batch_size, len(index)))
        jobs = np.zeros((len(rows), decode.JOB_WIDTH), np.int64)
        jobs[:, decode.OFFSET] = index.offset[rows]
        jobs[:, decode.SIZE] = np.where(index.fault[rows] == OK, index.size[rows], -1)
        jobs[:, decode.SIDE] = side
        jobs[:, decode.DESTINATION] = np.arange(len(rows)) * 3 * side * side
        status, pixels = np.zeros(len(rows), np.uint8), np.zeros(len(rows) * 3 * side * side, np.uint8)
        decode.decode(jobs, status, pixels, tars)
        good = np.flatnonzero(status == decode.OK)
        if len(good):
            yield rows[good], torch.from_numpy(pixels.reshape(-1, 3, side, side)[good])
        advance(len(rows))
