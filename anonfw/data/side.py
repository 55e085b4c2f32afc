"""One side of a batch, samples or partners: a table with its sidecars, from rows to jobs and from pixels to a batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

from anonfw.batch import FaceBatch
from anonfw.data import decode, index, ring
from anonfw.data.bad import BadSample
from anonfw.data.captions import Captions
from anonfw.data.embeddings import Sidecar
from anonfw.data.latents import Latents
from anonfw.data.table import Table
from anonfw.data.text_states import TextStates

MIRRORED_LANDMARKS = [1, 0, 2, 4, 3]
MIRRORED_FACTORS = ("yaw", "roll")  # change sign with the picture


class Side:
    """A table that pictures are read from.

    Args:
        sidecars: recogniser name -> sha256 of its weights, or None.
        decode: False makes pictures of 0 pixels.
        captions: read each picture's caption. latents, text: which precomputed ones (`Latents`, `TextStates`).
    """

    def __init__(
        self,
        table: Table,
        sidecars: Mapping[str, str | None],
        decode: bool = True,
        captions: bool = False,
        latents: Mapping[str, Any] | None = None,
        text: Mapping[str, Any] | None = None,
    ) -> None:
        self.table = table
        self.captions = Captions(table.folder, table.shards) if captions or text else None
        self.latents = Latents(table.folder, table.shards, latents) if latents else None
        self.text = TextStates(table.folder, table.shards, self.captions, text) if text else None
        self.sidecars = {name: Sidecar(table.folder, table.shards, name, sha256) for name, sha256 in sidecars.items()}
        self.size = table.card.image_size if decode else 0
        self.picture_bytes = 3 * self.size**2

    def jobs(self, rows: np.ndarray, mirrored: np.ndarray, first_tar: int, start: int) -> np.ndarray:
        """Decoding jobs (`anonfw.data.decode`) whose pixels go one behind the other from byte `start`."""
        table = self.table
        jobs = ring.empty_jobs(len(rows))
        jobs[:, decode.TAR] = table.shard[rows] + first_tar
        jobs[:, decode.OFFSET] = table.offset[rows]
        jobs[:, decode.SIZE] = np.where(table.fault[rows] == index.OK, table.size[rows], -1)
        jobs[:, decode.MIRRORED] = mirrored
        jobs[:, decode.SIDE] = self.size
        jobs[:, decode.DESTINATION] = start + np.arange(len(rows)) * self.picture_bytes
        return jobs

    def known_bad(self) -> Iterator[BadSample]:
        """What the index knows to be unusable."""
        for row in np.flatnonzero(self.table.fault != index.OK):
            yield self._bad(row, index.REASONS[int(self.table.fault[row])])

    def not_embedded(self, rows: np.ndarray) -> np.ndarray:
        """(n,) True where a sidecar has no embedding of a row (`write_sidecars` met a broken picture)."""
        missing = np.zeros(len(rows), bool)
        for sidecar in self.sidecars.values():
            missing |= sidecar.missing(self.table.shard[rows], self.table.row[rows])
        if self.latents is not None:
            missing |= self.latents.missing(self.table.shard[rows], self.table.row[rows])
        return missing

    def found_bad(self, rows: np.ndarray, status: np.ndarray) -> Iterator[BadSample]:
        """What could not be decoded."""
        for place in np.flatnonzero((status != decode.OK) & (status != decode.KNOWN_BAD)):
            yield self._bad(rows[place], decode.REASONS[int(status[place])])

    def _bad(self, row: int, reason: str) -> BadSample:
        shard = self.table.shards[self.table.shard[row]].file
        return BadSample(shard, self.table.key[row].decode() or None, int(self.table.row[row]), reason)

    def batch(self, rows: np.ndarray, mirrored: np.ndarray, pixels: np.ndarray, good: np.ndarray) -> FaceBatch:
        """The batch of the `good` rows. `pixels` is copied; with CUDA the tensors are pinned."""
        pinned = torch.cuda.is_available()
        picture = torch.from_numpy(pixels).view(len(rows), 3, self.size, self.size)
        kept = torch.from_numpy(np.flatnonzero(good))
        image = torch.empty((len(kept), 3, self.size, self.size), dtype=torch.uint8, pin_memory=pinned)
        if len(kept) == len(rows):
            image.copy_(picture)
        else:
            torch.index_select(picture, 0, kept, out=image)
        rows, mirrored = rows[good], mirrored[good]
        landmarks = self.table.landmarks[rows]
        turned = landmarks[mirrored][:, MIRRORED_LANDMARKS]
        turned[..., 0] = self.table.card.image_size - 1 - turned[..., 0]
        landmarks[mirrored] = turned
        factors = {name: values[rows] for name, values in self.table.factors.items()}
        for name in MIRRORED_FACTORS:
            if name in factors:
                factors[name][mirrored] *= -1
        shard, row = self.table.shard[rows], self.table.row[rows]
        batch = FaceBatch(
            image=image,
            identity=torch.from_numpy(self.table.person[rows]),
            index=torch.from_numpy(rows.astype(np.int64)),
            key=[key.decode() for key in self.table.key[rows].tolist()],
            landmarks=torch.from_numpy(landmarks),
            factors={name: torch.from_numpy(values) for name, values in factors.items()},
            embeddings={name: torch.from_numpy(sidecar.rows(shard, row)) for name, sidecar in self.sidecars.items()},
            caption=self.captions.of(shard, row, mirrored) if self.captions else [],
            latents=torch.from_numpy(self.latents.of(shard, row, mirrored)) if self.latents else None,
            text={
                part: torch.from_numpy(values)
                for part, values in (self.text.of(shard, row, mirrored) if self.text else {}).items()
            },
        )
        return batch.pin_memory() if pinned else batch
