"""FaceLoader: shards in, `FaceBatch`es out; sized, resumable, the same batches for any ranks and workers."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from anonfw.batch import FaceBatch
from anonfw.data import decode as decoding
from anonfw.data import ring
from anonfw.data.bad import BadSamples
from anonfw.data.card import DataError
from anonfw.data.plan import MODES, Plan, Step
from anonfw.data.remote import open_folder
from anonfw.data.side import Side
from anonfw.data.table import open_table

STATE_VERSION = 1


class FaceLoader:
    """An iterable of batches over one split of a data set. Give it to Lightning as it is, or loop over it.

    With `shuffle` it is a training stream: an epoch visits every unit of the split once in an order that depends on
    (seed, epoch) alone, incomplete global batches are left out, and a new `iter` goes on where the last one stopped
    (at the next epoch after a whole one; so Lightning's `limit_train_batches` cuts the stream, not the epoch).
    Without, it is a fixed pass: each `iter` begins at the first sample, and the last batch is smaller. In both,
    rows are dropped for samples that cannot be used (`bad_samples_file`), so such a batch is smaller; which one
    depends on the data alone.

    Modes (the unit that is shuffled):
        images: a sample.
        pairs: a sample of a person who has at least two; `partner` is another photo of the same person.
        groups: a person who has at least two; each gives `per_identity` consecutive rows (random photos, repeated only
            where there are too few), so a batch holds `batch_size / per_identity` different people.
        cross: a sample; `partner` is a random sample of the data set `cross`.

    Args:
        dataset: folder, address of a folder (`http(s)://`, `s3://`, or `pipe:COMMAND {}` with the file's name for
            `{}`), or `embedded` for the faces inside the package.
        split: such as `train`.
        batch_size: rows of one rank's batch.
        mode: images, pairs, groups or cross.
        sidecars: recognisers whose cached embeddings are joined; a mapping names the sha256 of the weights, too.
        captions: True gives each picture's caption (`embed --captions`).
        latents: `{source: ..., size: ...}` gives the latents that `embed --latents SOURCE --size PX` made.
        text: `{source: ...}` gives the captions as `embed --text SOURCE` encoded them.
        flip: probability that a picture is mirrored, with its landmarks, yaw, roll, caption and latents (not its
            embeddings).
        shuffle: training stream or fixed pass.
        seed: of order, partners and mirroring.
        workers: decoding processes; 0 decodes in this one.
        rank, world: of this process; None asks torch.distributed, else RANK and WORLD_SIZE, when iterating.
        limit_identities, limit_samples: use only the first of the split.
        max_bad_share: share of the split's samples that may be bad before the run ends.
        bad_samples_file: JSON lines of what was dropped; None is `bad_samples.jsonl` where the command runs.
        cross, cross_split: the partners' data set and split (None: the same split name).
        per_identity: K of groups.
        decode: False reads labels, factors and what is precomputed: no tar is opened, `workers` start none, and the
            images are (B,3,0,0). Landmarks stay in pixels of the picture.
    Raises:
        DataError: the data cannot be used like this; raised here, or for what depends on the ranks by `len` and `iter`.
        ValueError: arguments that contradict each other.
    """

    def __init__(
        self,
        dataset: str | Path,
        split: str,
        batch_size: int,
        mode: str = "images",
        sidecars: Sequence[str] | Mapping[str, str] = (),
        flip: float = 0.0,
        shuffle: bool = True,
        seed: int = 0,
        workers: int = 2,
        rank: int | None = None,
        world: int | None = None,
        limit_identities: int | None = None,
        limit_samples: int | None = None,
        max_bad_share: float = 0.01,
        bad_samples_file: str | Path | None = None,
        cross: str | Path | None = None,
        cross_split: str | None = None,
        per_identity: int = 4,
        decode: bool = True,
        captions: bool = False,
        latents: Mapping[str, Any] | None = None,
        text: Mapping[str, str] | None = None,
    ) -> None:
        if mode not in MODES:
            raise ValueError(f"unknown mode {mode!r}; there are {', '.join(MODES)}")
        if (cross is not None) != (mode == "cross"):
            raise ValueError("`cross` names the partners' data set: give it with mode='cross' and only then")
        if (rank is None) != (world is None):
            raise ValueError("give both `rank` and `world`, or neither")
        if not 0 <= flip <= 1:
            raise ValueError(f"flip is a probability, not {flip}")
        if batch_size < 1 or (mode == "groups" and batch_size % per_identity):
            raise ValueError(f"batch_size {batch_size} must be positive, and in groups divisible by {per_identity=}")
        if not decode and not latents and (flip or not sidecars):
            raise ValueError(
                "decode=False takes embeddings from sidecars, which do not mirror, or latents: name some, and without "
                "latents flip=0"
            )
        names = dict(sidecars) if isinstance(sidecars, Mapping) else dict.fromkeys(sidecars)
        table = open_table(open_folder(dataset, split, names), split, limit_identities, limit_samples)
        self._sides = [Side(table, names, decode, captions, latents, text)]
        if mode == "cross":
            other_split = cross_split or split
            other = open_table(open_folder(cross, other_split, names), other_split)
            self._sides.append(Side(other, names, decode, captions, latents, text))
        elif mode == "pairs":
            self._sides.append(self._sides[0])
        self.table, self.mode, self.batch_size, self.shuffle, self.workers = table, mode, batch_size, shuffle, workers
        self.decode = decode
        self._place = None if rank is None else (rank, world)
        self._plan = Plan(self._sides[-1].table, table, mode, seed, flip, shuffle, per_identity)
        self._step_units = batch_size // per_identity if mode == "groups" else batch_size
        if self._plan.units < (self._step_units if shuffle else 1):
            raise DataError(f"{self._plan.describe()}: too few for batch_size={batch_size}. {self._plan.remedy()}")
        sides = self._unique_sides()
        total = sum(len(side.table) for side in sides)
        file = Path(bad_samples_file) if bad_samples_file is not None else Path("bad_samples.jsonl")
        self.bad = BadSamples(file, int(max_bad_share * total), total)
        for side in sides:
            self.bad.add(side.known_bad())
        self._tars = [tar for side in sides for tar in side.table.tars]
        self._first_tar = [0, len(table.tars) if mode == "cross" else 0]
        self._decoder: ring.Inline | ring.NoPictures | ring.Ring | None = None
        self._epoch = self._position = 0
        self._resuming = False
        self._turn = 0

    def place(self) -> tuple[int, int]:
        """(rank, world) of this process."""
        if self._place is not None:
            return self._place
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return torch.distributed.get_rank(), torch.distributed.get_world_size()
        if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
            return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        return 0, 1

    def __len__(self) -> int:
        """Batches that this rank gets in a whole epoch, wherever the stream stands now."""
        rank, world = self.place()
        whole, rest = divmod(self._plan.units, self._step_units * world)
        if self.shuffle and not whole:
            raise DataError(
                f"{self._plan.describe()}: too few for {world} ranks with batch_size={self.batch_size}. "
                f"Lower batch_size or use fewer ranks. {self._plan.remedy()}"
            )
        return whole + (not self.shuffle and rest > rank)

    def state_dict(self) -> dict[str, int | str]:
        """Where the stream stands, in units that all ranks have consumed together: valid for any ranks and workers."""
        return {
            "version": STATE_VERSION,
            "order": self._plan.fingerprint(),
            "epoch": self._epoch,
            "position": self._position,
        }

    def load_state_dict(self, state: Mapping[str, int | str]) -> None:
        """Go on where `state` was taken: the next `iter` yields the rest of that epoch.

        Raises:
            DataError: the state belongs to other data, another mode or another seed.
        """
        if state.get("version") != STATE_VERSION:
            raise DataError(f"the checkpoint's loader state has version {state.get('version')!r}, not {STATE_VERSION}.")
        if state["order"] != self._plan.fingerprint():
            raise DataError(
                "the checkpoint was made with other data, or another mode, limit, flip or seed of the loader, so its "
                f"position means nothing here ({self._plan.describe()}). Resume with the same data, or start a new run "
                "from its weights."
            )
        self._epoch, self._position = int(state["epoch"]), int(state["position"])
        self._resuming = True
        self._turn += 1

    def __iter__(self) -> Iterator[FaceBatch]:
        self._turn += 1
        return self._batches(self._turn)

    def close(self) -> None:
        """End the decoding processes. They start again when needed."""
        if self._decoder is not None:
            self._decoder.close()
            self._decoder = None
        self._turn += 1

    def _batches(self, turn: int) -> Iterator[FaceBatch]:
        self._check_turn(turn)
        rank, world = self.place()
        step = self._step_units * world
        if len(self) == 0:  # also refuses too few samples for the ranks
            return
        if not self.shuffle and not self._resuming:
            self._position = 0
        self._resuming = False
        if self.shuffle and self._position + step > self._plan.units:
            self._epoch, self._position = self._epoch + 1, 0
        end = self._plan.units if not self.shuffle else self._plan.units - step + 1
        starts = deque(range(self._position, end, step))
        if not self.shuffle and starts and starts[-1] + rank >= self._plan.units:
            starts.pop()  # the last, incomplete global batch has no row for this rank
        decoder = self._open_decoder()
        under_way: deque[Step] = deque()
        while starts or under_way:
            while starts and len(under_way) < decoder.depth:
                start = starts.popleft()
                planned = self._plan.step(self._epoch, start, min(start + step, self._plan.units), rank, world)
                decoder.submit(self._jobs(planned))
                under_way.append(planned)
            planned = under_way.popleft()
            batch = self._assemble(planned, *decoder.collect())
            self._position = planned.stop
            if batch is not None:
                yield batch
                self._check_turn(turn)

    def _check_turn(self, turn: int) -> None:
        if turn != self._turn:
            raise RuntimeError("this iterator was replaced by a later iter(), load_state_dict() or close()")

    def _open_decoder(self) -> ring.Inline | ring.NoPictures | ring.Ring:
        if self._decoder is None and not self.decode:
            self._decoder = ring.NoPictures()
        elif self._decoder is None:
            pixel_bytes = sum(self.batch_size * side.picture_bytes for side in self._sides)
            rows = self.batch_size * len(self._sides)
            self._decoder = ring.open_decoder(self._tars, rows, pixel_bytes, self.workers)
        self._decoder.drain()
        return self._decoder

    def _unique_sides(self) -> list[Side]:
        return list(dict.fromkeys(self._sides))

    def _jobs(self, step: Step) -> np.ndarray:
        jobs, start = [], 0
        for side, first_tar, rows, mirrored in zip(
            self._sides, self._first_tar, step.rows, step.mirrored, strict=False
        ):
            jobs.append(side.jobs(rows, mirrored, first_tar, start))
            start += len(rows) * side.picture_bytes
        return np.concatenate(jobs)

    def _assemble(self, step: Step, status: np.ndarray, pixels: np.ndarray) -> FaceBatch | None:
        """The batch without its bad rows; None where a fixed pass has no good one there."""
        count = len(step.rows[0])
        by_side = status.reshape(len(self._sides), count)
        for side, rows, answers in zip(self._sides, step.rows, by_side, strict=True):
            if not self.decode:
                answers[(answers == decoding.OK) & side.not_embedded(rows)] = decoding.NOT_EMBEDDED
            self.bad.add(side.found_bad(rows, answers))
        good = (by_side == 0).all(0)
        if not good.any():
            if not self.shuffle:
                return None
            raise DataError(  # one rank must not have fewer steps than the others
                f"none of the {count} samples of a batch can be used (see {self.bad.file}). Write the data set again, "
                "or take a larger batch_size."
            )
        parts, start = [], 0
        for side, rows, mirrored in zip(self._sides, step.rows, step.mirrored, strict=True):
            stop = start + count * side.picture_bytes
            parts.append(side.batch(rows, mirrored, pixels[start:stop], good))
            start = stop
        batch = parts[0]
        batch.partner = parts[1] if len(parts) > 1 else None
        return batch
