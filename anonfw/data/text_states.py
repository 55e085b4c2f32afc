"""Encoded captions, computed once: a pipeline's text states for each distinct caption of a shard.

`text_HASH` holds (captions,77,D); with SDXL's second encoder `text_HASH_pooled` holds (captions,P).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from anonfw.data import arrays
from anonfw.data.captions import Captions, captions_path
from anonfw.data.card import DataError, Shard
from anonfw.data.files import sha256_of
from anonfw.data.latents import folder_sha256

PARTS = ("states", "pooled")


def kinds_of(dataset: Path, pipeline: Path, source: str) -> dict[str, arrays.Kind]:
    """`states` and, with two text encoders, `pooled`: what `embed --text SOURCE` writes."""
    folders = sorted(path for path in pipeline.iterdir() if path.name.startswith(("tokenizer", "text_encoder")))
    digest = hashlib.sha256("".join(f"{path.name} {folder_sha256(path)}\n" for path in folders).encode()).hexdigest()
    remedy = f"Run: python -m anonfw embed {dataset} --text {source}"
    names = {"states": f"text_{digest[:8]}"}
    if (pipeline / "text_encoder_2").is_dir():
        names["pooled"] = f"text_{digest[:8]}_pooled"
    return {part: arrays.Kind(name, digest, remedy, {"source": source}) for part, name in names.items()}


class TextStates:
    """The encoded captions of a split.

    Args:
        captions: of the same shards. spec: source, and optionally revision, as they were given to `embed`.
    Raises:
        DataError: the specification has other keys, or the arrays are missing, damaged, of another pipeline or of
            other captions.
    """

    def __init__(self, folder: Path, shards: Sequence[Shard], captions: Captions, spec: Mapping[str, Any]) -> None:
        from anonfw.nets import backbone

        if not {"source"} <= set(spec) <= {"source", "revision"}:
            raise DataError(f"text is given as {{source: ...}} (and revision), not {dict(spec)}")
        pipeline = backbone.find(spec["source"], spec.get("revision"))
        counts = {shard.stem: len(found) for shard, found in zip(shards, captions.distinct, strict=True)}
        self._captions = captions
        self._arrays = {
            part: arrays.Arrays(
                folder, shards, kind, lambda s: counts[s.stem], lambda s: sha256_of(captions_path(folder / s.file))
            )
            for part, kind in kinds_of(folder, pipeline, spec["source"]).items()
        }

    def of(self, shard: np.ndarray, row: np.ndarray, mirrored: np.ndarray) -> dict[str, np.ndarray]:
        """(n,) shard numbers, rows and mirroring -> `states` (n,77,D) and perhaps `pooled` (n,P), float32."""
        number = self._captions.number(shard, row, mirrored)
        return {part: found.take(shard, number) for part, found in self._arrays.items()}


def write_text(
    folder: Path,
    shards: Sequence[Shard],
    source: str,
    revision: str | None,
    batch_size: int,
    device: str,
    advance: Callable[[int], object],
) -> int:
    """Encode the captions of the shards that have no valid text states yet, and say how many shards these were.

    Raises:
        DataError: a shard without captions. AnonfwError: no such pipeline.
    """
    from anonfw.nets import backbone

    pipeline = backbone.find(source, revision)
    kinds, done = kinds_of(folder, pipeline, source), 0
    opened: backbone.Backbone | None = None
    for shard in shards:
        sentences = Captions(folder, [shard]).distinct[0]
        made_from = sha256_of(captions_path(folder / shard.file))
        if not all(arrays.is_there(folder, shard, kind, len(sentences), made_from) for kind in kinds.values()):
            opened = opened or backbone.Backbone(source, revision).to(device)
            parts: dict[str, list[np.ndarray]] = {part: [] for part in kinds}
            for start in range(0, len(sentences), batch_size):
                text = opened.encode_text(sentences[start : start + batch_size])
                for part in kinds:
                    parts[part].append(getattr(text, part).float().cpu().numpy())
            for part, kind in kinds.items():
                arrays.save(folder, shard, kind, np.concatenate(parts[part]), made_from)
            done += 1
        advance(shard.samples)
    return done
