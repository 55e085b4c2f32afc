"""Fixtures that several test files share. Nothing heavy is imported before a test asks for it."""

from __future__ import annotations

import json
import os
import sys
import tarfile
from pathlib import Path

import pytest
from hypothesis import settings

ROOT = Path(__file__).resolve().parent.parent

# Tests run side by side: one thread each, set before OpenMP reads it and inherited by the processes they start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("WANDB_MODE", "disabled")

# The first example of a property test may import torch, and a loaded machine is slow: no deadline. The examples are the
# same in every run, so a red test stays red until it is mended.
settings.register_profile("anonfw", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("anonfw")


@pytest.fixture(autouse=True)
def one_thread():
    """One torch thread, where torch is loaded at all: sums come out in one order, and -n 2 does not oversubscribe."""
    if (torch := sys.modules.get("torch")) is not None and torch.get_num_threads() != 1:
        torch.set_num_threads(1)


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with real photographs: $ANONFW_SHARED, else `../shared` beside the repository. Skips without it."""
    folder = Path(os.environ.get("ANONFW_SHARED") or ROOT.parent / "shared")
    if not (folder / "data").is_dir():
        pytest.skip(f"needs real photographs: {folder}/data is absent (ANONFW_SHARED names the folder)")
    return folder


@pytest.fixture(scope="session")
def real_data(shared: Path) -> Path:
    """The data folder inside `shared`: `lfw/NAME/NAME_0001.jpg`, `lfw_pairs.txt`, `video/`, `weights/`."""
    return shared / "data"


@pytest.fixture(scope="session")
def embedded(root: Path) -> Path:
    """The shipped data set of people who do not exist."""
    folder = root / "anonfw" / "faces"
    if not (folder / "card.json").is_file():
        pytest.skip("the embedded faces are not in anonfw/faces: write them with data/synthetic_people.py")
    return folder


@pytest.fixture(scope="session")
def tiny_faces(embedded: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of its own, cut from the embedded faces: 12 people for training, 8 for each other split.

    The shards hold at most 24 samples each, so that several are read. The embeddings come along, and captions. Read it,
    never write into it: tests share it.
    """
    from anonfw.data.card import Card
    from anonfw.data.writer import DatasetWriter

    card = Card.load(embedded)
    folder = tmp_path_factory.mktemp("tiny_faces")
    # Latents and encoded texts that somebody has made beside the shards (`embed`) are not part of what is shipped.
    embeddings = [path for path in embedded.glob("*.sidecar.json") if not path.name.startswith(("latents_", "text_"))]
    records = {path.name.split(".")[0]: json.loads(path.read_text()) for path in embeddings}
    hashes = {name: record["sha256"] for name, record in records.items()}
    with DatasetWriter(
        folder,
        name="tiny",
        image_size=card.image_size,
        alignment=card.alignment,
        source=card.source,
        licence=card.licence,
        shard_samples=24,
        sidecars=hashes,
    ) as writer:
        for split in card.splits():
            people = _people(embedded / card.of_split(split)[0].file, list(hashes))
            for identity, samples in list(people.items())[: 12 if split == "train" else 8]:
                writer.add_identity(split, identity, samples)
    _describe(folder)
    return folder


def _describe(folder: Path) -> None:
    """Captions from the factors alone."""
    from anonfw.data.captions import describe, mirrored, save_captions
    from anonfw.data.card import Card
    from anonfw.data.index import open_index

    for shard in Card.load(folder).shards:
        index = open_index(folder / shard.file, shard)
        names = [name.decode() for name in index.factor_names.tolist()]
        rows = [dict(zip(names, values, strict=True)) for values in index.factors.tolist()]
        save_captions(folder, shard, [(describe(row), describe(mirrored(row))) for row in rows])


def _people(tar: Path, recognizers: list[str]) -> dict[str, list]:
    """Identity -> samples of one shard, read with nothing but tarfile."""
    import numpy as np

    from anonfw.data.writer import Sample

    rows = {name: np.load(tar.with_name(f"{tar.stem}.{name}.npy")) for name in recognizers}
    pictures: dict[str, bytes] = {}
    records: dict[str, dict] = {}
    with tarfile.open(tar) as opened:
        for member in opened:
            key, _, kind = member.name.partition(".")
            content = opened.extractfile(member).read()
            if kind == "jpg":
                pictures[key] = content
            elif kind == "json":
                records[key] = json.loads(content)
    people: dict[str, list] = {}
    for row, (key, record) in enumerate(records.items()):
        embeddings = {name: rows[name][row] for name in recognizers}
        sample = Sample(key, pictures[key], record.get("landmarks"), record.get("factors", {}), embeddings)
        people.setdefault(record["identity"], []).append(sample)
    return people
