"""Writes data sets of data/SCHEMA.md: shards appear whole or not at all, the same input gives the same bytes."""

from __future__ import annotations

import fcntl
import io
import json
import math
import os
import tarfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np

from anonfw.align import ALIGNMENTS
from anonfw.data.card import CARD_NAME, KEY, NAME, Card, DataError, Shard
from anonfw.data.embeddings import save_sidecar
from anonfw.data.files import sha256_of
from anonfw.data.index import build_index, index_path, open_index


@dataclass
class Sample:
    """One picture on its way into a shard.

    Attributes:
        key: unique in the data set; letters, digits, `_` and `-`, at most 90.
        jpeg: the encoded picture, `image_size` x `image_size`, RGB.
        landmarks: (5,2) x, y in pixels of the picture (eyes, nose tip, mouth corners; image left first), or None.
        factors: measured properties such as yaw in degrees; finite numbers.
        embeddings: recogniser name -> (D,) vector, for each name in the writer's `sidecars`.
    """

    key: str
    jpeg: bytes
    landmarks: np.ndarray | list | None = None
    factors: Mapping[str, float] = field(default_factory=dict)
    embeddings: Mapping[str, np.ndarray] = field(default_factory=dict)


class _Open:
    """The shard of a split that is being filled."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        self.file: BinaryIO = open(self.partial, "wb")  # noqa: SIM115 (closed in finish or abandon)
        self.tar = tarfile.open(fileobj=self.file, mode="w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115
        self.samples = 0
        self.identities = 0
        self.embeddings: dict[str, list[np.ndarray]] = {}

    def add(self, name: str, content: bytes) -> None:
        member = tarfile.TarInfo(name)  # owner 0, mode 644, mtime 0: the bytes depend on the content alone
        member.size = len(content)
        self.tar.addfile(member, io.BytesIO(content))

    def finish(self) -> None:
        self.tar.close()
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        os.replace(self.partial, self.path)

    def abandon(self) -> None:
        self.file.close()
        self.partial.unlink(missing_ok=True)


class DatasetWriter:
    """Context manager that writes one data set, an identity at a time.

    A killed writer leaves finished shards and hidden `.partial` files; the same calls, made again, continue: ask
    `done(identity)` before making an identity's pictures. Identities must come in the same order as before; then the
    result is byte for byte that of an undisturbed run. Leaving the block by an exception keeps the finished shards.

    Args:
        out: folder, made if needed.
        name: of the data set (lower-case letters, digits, `_`).
        image_size, alignment, source, licence: see `Card`.
        shard_samples: a shard is closed when it has at least so many samples (an identity is never cut).
        sidecars: recogniser name -> sha256 of the encoder, for embeddings that come with the samples.
        about: further statements for the card.
    Raises:
        DataError: `out` holds another data set, or another writer is at work in it.
        ValueError: a name, key, size or vector that the schema does not allow.
    """

    def __init__(
        self,
        out: str | Path,
        *,
        name: str,
        image_size: int,
        alignment: str,
        source: str,
        licence: str,
        shard_samples: int = 4096,
        sidecars: Mapping[str, str] | None = None,
        about: dict | None = None,
    ) -> None:
        if not NAME.fullmatch(name):
            raise ValueError(f"data set name {name!r}: lower-case letters, digits and _ only, at most 40")
        if alignment not in ALIGNMENTS:
            raise ValueError(f"unknown alignment {alignment!r}; there are {', '.join(ALIGNMENTS)}")
        self.out = Path(out)
        self.shard_samples = shard_samples
        self.sidecars = dict(sidecars or {})
        self.card = Card(name, image_size, alignment, source, licence, about=dict(about or {}))
        self._open: dict[str, _Open] = {}
        self._keys: set[bytes] = set()
        self._done: set[str] = set()

    def __enter__(self) -> DatasetWriter:
        self.out.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(self.out, os.O_RDONLY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._resume()
        except BlockingIOError as error:
            os.close(self._lock)
            message = f"another writer is at work in {self.out}. Wait for it, or choose another folder."
            raise DataError(message) from error
        except BaseException:
            os.close(self._lock)
            raise
        return self

    def _resume(self) -> None:
        for left in self.out.glob(".*.partial"):  # the lock says that nobody is writing them
            left.unlink()
        if not (self.out / CARD_NAME).exists():
            if any(self.out.glob("*.tar")):
                raise DataError(f"{self.out} holds tars but no card.json. Choose an empty folder.")
            self.card.save(self.out)
            return
        before = Card.load(self.out, complete=False)
        for what in ("name", "image_size", "alignment"):
            old, new = getattr(before, what), getattr(self.card, what)
            if old != new:
                raise DataError(f"{self.out} is a data set with {what} {old!r}, not {new!r}. Choose another folder.")
        self.card.shards, self.card.complete = before.shards, before.complete
        self.card.about = {**before.about, **self.card.about}
        for shard in before.shards:
            index = open_index(self.out / shard.file, shard)
            self._keys.update(index.key.tolist())
            self._done.update(name.decode() for name in index.names.tolist())

    def done(self, identity: str) -> bool:
        """Whether the identity lies in a finished shard already."""
        return identity in self._done

    def add_identity(self, split: str, identity: str, samples: Iterable[Sample]) -> None:
        """Write all pictures of one person. They stay together in one shard of `split`.

        Raises:
            ValueError: the identity was written before, or a sample breaks the schema.
        """
        samples = list(samples)
        if not NAME.fullmatch(split):
            raise ValueError(f"split {split!r}: lower-case letters, digits and _ only")
        if identity in self._done:
            raise ValueError(f"identity {identity!r} was already written: all its samples go in one call")
        if not samples:
            raise ValueError(f"identity {identity!r} has no samples")
        records = [self._record(split, identity, sample) for sample in samples]
        shard = self._open.get(split)
        if shard is None:
            if self.card.complete:
                self.card.complete = False
                self.card.save(self.out)
            number = len(self.card.of_split(split))
            shard = self._open[split] = _Open(self.out / f"{self.card.name}-{split}-{number:06d}.tar")
        for sample, record in zip(samples, records, strict=True):
            shard.add(f"{sample.key}.jpg", sample.jpeg)
            shard.add(f"{sample.key}.json", record)
            for name in self.sidecars:
                shard.embeddings.setdefault(name, []).append(np.asarray(sample.embeddings[name], np.float32))
        shard.samples += len(samples)
        shard.identities += 1
        self._done.add(identity)
        if shard.samples >= self.shard_samples:
            self._finish(split)

    def _record(self, split: str, identity: str, sample: Sample) -> bytes:
        if not KEY.fullmatch(sample.key):
            raise ValueError(f"key {sample.key!r}: letters, digits, _ and - only, at most 90")
        if sample.key.encode() in self._keys:
            raise ValueError(f"key {sample.key!r} was already written: keys are unique in a data set")
        if sample.jpeg[:2] != b"\xff\xd8":
            raise ValueError(f"sample {sample.key!r}: `jpeg` is not a JPEG file")
        self._keys.add(sample.key.encode())
        value: dict = {"identity": identity, "source": self.card.name, "split": split}
        if sample.landmarks is not None:
            points = np.asarray(sample.landmarks, np.float64)
            if points.shape != (5, 2) or not np.isfinite(points).all():
                raise ValueError(f"sample {sample.key!r}: landmarks must be (5,2) and finite")
            value["landmarks"] = [[round(float(x), 2), round(float(y), 2)] for x, y in points]
        if sample.factors:
            factors = {name: float(number) for name, number in sorted(sample.factors.items())}
            for name, number in factors.items():
                if not math.isfinite(number):
                    raise ValueError(f"sample {sample.key!r}: factor {name} is {number}; leave it out instead")
            value["factors"] = {name: float(f"{number:.4g}") for name, number in factors.items()}
        for name in self.sidecars:
            if name not in sample.embeddings:
                raise ValueError(f"sample {sample.key!r} has no embedding of {name!r}, which the writer was promised")
        return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()

    def _finish(self, split: str) -> None:
        shard = self._open.pop(split)
        shard.finish()
        path = shard.path
        entry = Shard(path.name, split, shard.samples, shard.identities, path.stat().st_size, sha256_of(path))
        for name, vectors in shard.embeddings.items():
            save_sidecar(self.out, entry, name, self.sidecars[name], np.stack(vectors))
        build_index(path).save(index_path(path))
        self.card.shards.append(entry)  # last: from here on readers take the shard
        self.card.shards.sort(key=lambda shard: shard.file)
        self.card.save(self.out)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                for split in list(self._open):
                    self._finish(split)
                if not self.card.shards:
                    raise DataError(f"nothing was written to {self.out}: no identity had a usable picture")
                self.card.complete = True
                self.card.save(self.out)
        finally:
            for shard in self._open.values():
                shard.abandon()
            self._open.clear()
            os.close(self._lock)
