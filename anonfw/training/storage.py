"""Checkpoints as files: one file, or a folder of shards with one file a rank; both beside a manifest of hashes.

step=N.ckpt   a file: `torch.save` of Lightning's dictionary. A folder: `shards` (torch.distributed.checkpoint) holds
              its tensors, each under its path inside the dictionary, and structure.pt the dictionary around them.
step=N.json   the manifest: step, and bytes and sha256 of every file

A manifest is written before its checkpoint gets its name, so a checkpoint without one was never whole.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import CheckpointIO
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from anonfw.data.files import atomic, sha256_of, write_json

STRUCTURE = "structure.pt"
TENSOR = "tensor in the shards"
# What a full or failing disk raises: through Python's files, through torch's own, and on the other ranks of a shard's.
WRITE_ERRORS = (OSError, RuntimeError, CheckpointException)


class Storage(CheckpointIO):
    """Writes plain checkpoints and reads both kinds. A failed write is kept in `failure` instead of being raised:
    the other ranks wait in a barrier for this one, and learn of it afterwards.
    """

    def __init__(self) -> None:
        self.failure: str | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:  # noqa: ARG002
        self.failure = attempt(lambda: write_file(checkpoint, Path(path)))

    def load_checkpoint(self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = True) -> dict:  # noqa: ARG002
        return read(Path(path))

    def remove_checkpoint(self, path: str | Path) -> None:
        remove(Path(path))


def attempt(write: Callable[[], None]) -> str | None:
    """None, or in one line why `write` could not."""
    try:
        write()
    except WRITE_ERRORS as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return None


def write_file(tree: Any, path: Path) -> None:
    """`torch.save`, and on the disk before this returns."""
    with open(path, "wb") as file:
        torch.save(tree, file)
        file.flush()
        os.fsync(file.fileno())


def write_shards(tree: dict[str, Any], folder: Path, rank: int) -> None:
    """Every rank calls this with its shards; what is whole on each rank is written by rank 0."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.tensor import DTensor

    tensors: dict[str, Tensor] = {}

    def take(path: str, tensor: Tensor) -> dict[str, str]:
        tensors[path] = tensor
        return {TENSOR: path}

    structure = map_tensors(tree, take)
    folder.mkdir(exist_ok=True)
    mine = {path: tensor for path, tensor in tensors.items() if rank == 0 or isinstance(tensor, DTensor)}
    dcp.save(mine, storage_writer=dcp.FileSystemWriter(folder, overwrite=True))
    if rank == 0:
        write_file(structure, folder / STRUCTURE)


def read(path: Path) -> dict[str, Any]:
    """The dictionary with whole tensors, of a file or of a folder of shards.

    Torch reads the index of a folder of shards with pickle: open one only if you trust its maker.
    """
    if path.is_dir():
        return read_shards(path)
    return torch.load(path, map_location="cpu", weights_only=True)


def read_shards(path: Path, place: Callable[[str, torch.Size, torch.dtype], Tensor] | None = None) -> dict[str, Any]:
    """The dictionary of a folder of shards.

    Args:
        place: (path inside the dictionary, shape, dtype) -> where that tensor is read into, on every rank together;
            None reads it whole, without the other ranks.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    reader = dcp.FileSystemReader(path)
    tensors = {}
    for name, stored in reader.read_metadata().state_dict_metadata.items():
        if isinstance(stored, TensorStorageMetadata):
            size, dtype = stored.size, stored.properties.dtype
            tensors[name] = place(name, size, dtype) if place else torch.empty(size, dtype=dtype)
    dcp.load(tensors, storage_reader=reader, no_dist=place is None)

    def put_back(tree: Any) -> Any:
        if isinstance(tree, Mapping):
            return tensors[tree[TENSOR]] if TENSOR in tree else {key: put_back(value) for key, value in tree.items()}
        return type(tree)(map(put_back, tree)) if isinstance(tree, list | tuple) else tree

    return put_back(torch.load(path / STRUCTURE, map_location="cpu", weights_only=True))


def map_tensors(tree: Any, function: Callable[[str, Tensor], Any], path: str = "") -> Any:
    """The tree of mappings and lists with `function(path, tensor)` for each tensor; a path is `a/b/0/c`."""
    if isinstance(tree, Tensor):
        return function(path, tree)
    inside = f"{path}/" if path else ""
    if isinstance(tree, Mapping):
        return {key: map_tensors(value, function, f"{inside}{key}") for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(map_tensors(value, function, f"{inside}{index}") for index, value in enumerate(tree))
    return tree


def remove(path: Path) -> None:
    """A file, a link or a folder; nothing where there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


# Manifests.


def manifest_of(checkpoint: Path) -> Path:
    return checkpoint.with_suffix(".json")


def hashes(path: Path, rank: int) -> dict[str, dict[str, Any]]:
    """Bytes and sha256 by relative name ("" is a file itself) of what this rank wrote of a checkpoint."""
    files = sorted(path.glob(f"__{rank}_*")) if path.is_dir() else []
    if rank == 0:
        files += [path / ".metadata", path / STRUCTURE] if path.is_dir() else [path]
    return {
        "" if file == path else file.name: {"bytes": file.stat().st_size, "sha256": sha256_of(file)} for file in files
    }


def digest(checkpoint: Path) -> str:
    """sha256 of a file; of a folder of shards, that of its manifest, which holds those of its files."""
    return sha256_of(checkpoint if checkpoint.is_file() else manifest_of(checkpoint.resolve()))


def write_manifest(checkpoint: Path, step: int, files: Mapping[str, Any]) -> None:
    write_json(manifest_of(checkpoint), {"step": step, "files": files})


def damage(checkpoint: Path) -> str | None:
    """What is wrong with the files of a checkpoint, in a few words; None if they are as they were written."""
    try:
        manifest = json.loads(manifest_of(checkpoint).read_text())
    except (OSError, json.JSONDecodeError):
        return f"{manifest_of(checkpoint).name} is missing or unreadable"
    for name, facts in manifest["files"].items():
        file = checkpoint / name if name else checkpoint
        if not file.is_file():
            return f"{file.name} is missing"
        if (size := file.stat().st_size) != facts["bytes"]:
            return f"{file.name} has {size} of {facts['bytes']} bytes"
        if sha256_of(file) != facts["sha256"]:
            return f"the sha256 of {file.name} differs"
    return None


# Weights alone.


def whole(tensor: Tensor) -> Tensor:
    """The tensor on the CPU; of shards every rank must ask for it, and only rank 0 needs to keep the answer."""
    tensor = tensor.detach()
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).cpu().contiguous()


def write_weights(state: Mapping[str, Tensor], file: Path, first: bool) -> None:
    """One safetensors file by rank 0 (`first`). Shards are joined one tensor at a time: every rank calls this."""
    from safetensors.torch import save

    joined = {}
    for name, tensor in state.items():
        one = whole(tensor)
        if first:
            joined[name] = one
    if first:
        with atomic(file) as stream:
            stream.write(save(joined))
