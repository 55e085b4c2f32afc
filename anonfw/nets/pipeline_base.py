"""Text-to-image pipelines of our own that come with the package: `anonfw/bases/NAME`, whole and hash-checked.

    from anonfw.nets.backbone import Backbone
    Backbone("face_model")

The folder has diffusers' layout and `files.json` with the sha256 of every file; diffusers opens it, too.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch

from anonfw.data.files import sha256_of, write_json
from anonfw.errors import AnonfwError

RECORD = "files.json"


def base_folder(name: str) -> Path | None:
    """The folder of the base, every file of it checked; None where no base has that name.

    Raises:
        AnonfwError: a file is missing or is not the one that was written.
    """
    from anonfw.training.load import BASES

    folder = BASES / name
    if "/" in name or not (folder / RECORD).is_file():
        return None
    files: dict[str, str] = json.loads((folder / RECORD).read_text(encoding="utf-8"))["files"]
    for file, digest in files.items():
        if not (folder / file).is_file() or sha256_of(folder / file) != digest:
            raise AnonfwError(
                f"the base {name} is damaged: {folder / file} is missing or changed. Install anonfw again"
            )
    return folder


def write_pipeline(run: Path, out: Path, overwrite: bool = False) -> Path:
    """Writes a text-to-image run's averaged weights as a pipeline in half precision, whole or not at all.

    Args:
        run: run folder, or a checkpoint inside one. out: the folder to write.
    Raises:
        AnonfwError: no text-to-image run, `out` is in the way, or a parameter does not fit into half precision.
    """
    from anonfw.training.load import load_system, run_files

    system, _ = load_system(run)
    if not hasattr(system, "save_pipeline"):
        raise AnonfwError(
            f"{run} holds a {type(system).__name__}, which is no text-to-image system (recipes/face_model)"
        )
    if out.exists() and not overwrite:
        raise AnonfwError(f"{out} is there already: give another folder, or --overwrite")
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        system.save_pipeline(partial, torch.float16)
        record(partial, _steps(run_files(run)[1]))
        if (card := out / "card.md").is_file():
            shutil.copy(card, partial)
        shutil.rmtree(out, ignore_errors=True)
        os.rename(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return out


def record(folder: Path, steps: int | None) -> None:
    """Writes `files.json`: the hash of each file of `folder`, and how many steps its weights were trained."""
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    value: dict[str, Any] = {"files": {file: sha256_of(folder / file) for file in files}, "steps": steps}
    write_json(folder / RECORD, value)


def _steps(weights: Path) -> int | None:
    if weights.suffix != ".ckpt":
        return None
    return torch.load(weights, map_location="cpu", weights_only=True, mmap=True).get("global_step")
