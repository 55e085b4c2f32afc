"""The verb `export`: a run becomes a folder that others can load, or a base that comes with the package.

model.safetensors  the trained parameters, averaged where the run averaged; frozen networks come from the weights table
recipe.yaml        the recipe as it was resolved: `anonfw.training.load_system(FOLDER)` builds the system from it
card.md            the model card
export.json        sha256 of the weights, precision, commit, steps
table.*            the result table of these weights, where there is one
and whatever the system offers others in their own layout (`interchange`), such as ip_adapter.safetensors for diffusers

There is no diffusers folder: the attention of the U-Nets here has parameters of our own (`anonfw.nets.attention`),
which diffusers alone would drop while loading, and then compute something else.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anonfw.errors import AnonfwError

if TYPE_CHECKING:
    from torch import Tensor

DTYPES = ("fp16", "fp32")
BASE_BYTES = 30_000_000  # what one base may weigh in the package


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `python -m anonfw export`."""
    parser.add_argument("run", metavar="RUN_OR_CHECKPOINT", type=Path, help="a run folder or a file of weights inside")
    parser.add_argument(
        "out", metavar="OUT", type=Path, help="folder to write; with --as-base the folder of the bases (anonfw/bases)"
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, default="fp16", help="precision of the stored parameters (default: fp16)"
    )
    parser.add_argument(
        "--table", metavar="FOLDER", type=Path, help="folder with the result table for the card (default: the run's)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export of the same name")
    parser.add_argument(
        "--as-base",
        metavar="NAME",
        help="write OUT/NAME.safetensors and its card OUT/NAME.md instead, for recipes that say `init: NAME`",
    )
    parser.add_argument(
        "--pipeline", action="store_true", help="of a text-to-image run: write OUT in diffusers' layout, half precision"
    )


def run(args: argparse.Namespace) -> int:
    """Writes the folder, or the base, and says what lies where."""
    if args.pipeline:
        from anonfw.nets.pipeline_base import write_pipeline

        print(f"pipeline {write_pipeline(args.run, args.out, args.overwrite)}")
        return 0
    if args.as_base:
        file = export_base(args.run, args.out, args.as_base, args.dtype, args.table, args.overwrite)
        print(f"base   {file} ({file.stat().st_size / 1e6:.1f} MB)\ncard   {file.with_suffix('.md')}")
        print(f"use    init: {args.as_base}")
        return 0
    folder = export(args.run, args.out, args.dtype, args.table, args.overwrite)
    size = (folder / "model.safetensors").stat().st_size
    print(f"export {folder} ({size / 1e6:.1f} MB)\ncard   {folder / 'card.md'}")
    for name in json.loads((folder / "export.json").read_text())["interchange"]:
        print(f"others {folder / name}")
    print(f"use    anonfw.training.load_system({str(folder)!r}), or init={folder / 'model.safetensors'} in a recipe")
    return 0


def export(run: Path, out: Path, dtype: str = "fp16", table: Path | None = None, overwrite: bool = False) -> Path:
    """Writes the export folder `out`, whole or not at all, and returns it.

    Args:
        run: a run folder, a checkpoint inside one, or an earlier export.
        dtype: fp16 (half the bytes) or fp32 (loads to bitwise the same parameters).
        table: folder with a table.json for the card; None takes the run's, if it is of these weights.
    Raises:
        AnonfwError: nothing to export there, `out` is in the way, or a parameter does not fit into fp16.
    """
    from anonfw.data.files import write_json
    from anonfw.recipe import dump

    _refuse(out, overwrite)
    source = read_source(run, dtype, table)
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    partial.mkdir(parents=True)
    try:
        (partial / "model.safetensors").write_bytes(source.weights)
        for name, content in source.interchange.items():
            (partial / name).write_bytes(content)
        # The file is called recipe.yaml from now on, and a recipe without a name is called like its file.
        (partial / "recipe.yaml").write_text(dump({"name": source.name, **source.recipe}))
        (partial / "card.md").write_text(source.card(f"`load_system({out.name!r})`"))
        write_json(partial / "export.json", source.facts)
        for kind in ("json", "csv", "md", "txt"):
            if source.table and (source.table / f"table.{kind}").exists():
                shutil.copyfile(source.table / f"table.{kind}", partial / f"table.{kind}")
        _replace(partial, out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return out


def export_base(
    run: Path, folder: Path, name: str, dtype: str = "fp16", table: Path | None = None, overwrite: bool = False
) -> Path:
    """Writes `folder`/NAME.safetensors and NAME.md, and returns the former.

    Raises:
        AnonfwError: as `export`; or the file would be larger than a base may be.
    """
    from anonfw.data.files import atomic

    if not name.isidentifier():
        raise AnonfwError(f"a base's name is letters, digits and underscores, not {name!r}")
    file = folder / f"{name}.safetensors"
    if file.exists() and not overwrite:
        raise AnonfwError(f"{file} exists: recipes that continue from it would change; --overwrite replaces it")
    source = read_source(run, dtype, table)
    if len(source.weights) > BASE_BYTES:
        raise AnonfwError(
            f"{name} would have {len(source.weights) / 1e6:.1f} MB, and a base has at most {BASE_BYTES / 1e6:.0f}: "
            "use --dtype fp16, or a smaller network"
        )
    folder.mkdir(parents=True, exist_ok=True)
    for path, content in ((file, source.weights), (file.with_suffix(".md"), source.card(f"`init: {name}`").encode())):
        with atomic(path) as stream:
            stream.write(content)
    return file


@dataclass
class Source:
    """What is exported.

    Attributes:
        name: of the recipe. recipe: resolved.
        weights: the bytes of the safetensors file. interchange: file name -> bytes, in the layouts of others.
        facts: content of export.json.
        folder: of the run. licences: of the recognisers inside, by name. table: folder of the result table or None.
    """

    name: str
    recipe: Mapping[str, Any]
    weights: bytes
    interchange: dict[str, bytes]
    facts: dict[str, Any]
    folder: Path
    licences: dict[str, str]
    table: Path | None

    def card(self, use: str) -> str:
        """The model card; `use` says how to load it."""
        from anonfw.model_card import model_card

        return model_card(self, use)


def read_source(run: Path, dtype: str, table: Path | None) -> Source:
    """The run's averaged parameters in the recipe's network, and all that is known about them.

    Raises:
        AnonfwError: no run or no weights there, they do not fit the recipe, or a value does not fit into fp16.
    """
    import hashlib

    from safetensors.torch import save

    from anonfw import __version__
    from anonfw.model_card import without_paths
    from anonfw.training.load import load_system, run_files
    from anonfw.training.storage import digest

    folder, weights_file = run_files(run)
    system, recipe = load_system(run)

    def packed(state: Mapping[str, Tensor]) -> bytes:
        trained = {name: value.detach().cpu().contiguous() for name, value in state.items()}
        return save({name: _cast(name, value, dtype) for name, value in trained.items()}, {"format": "pt"})

    content = packed(system.trained_state())
    others = system.interchange() if hasattr(system, "interchange") else {}
    interchange = {name: packed(state) for name, state in others.items()}
    known = {}
    for file in ("export.json", "run.json", "finished.json"):
        if (folder / file).exists():
            known[file] = json.loads((folder / file).read_text())
    earlier, begun = known.get("export.json", {}), known.get("run.json", {})
    facts = {
        "name": earlier.get("name") or begun.get("name") or recipe.name,
        "weights": "model.safetensors",
        "sha256": hashlib.sha256(content).hexdigest(),
        "bytes": len(content),
        "interchange": {name: hashlib.sha256(file).hexdigest() for name, file in interchange.items()},
        "parameters": sum(p.numel() for p in system.parameters() if p.requires_grad),
        "dtype": dtype,
        "from": {"file": weights_file.name, "sha256": digest(weights_file)},
        "steps": earlier.get("steps") or _steps(folder, weights_file, known.get("finished.json", {})),
        "ranks": earlier.get("ranks") or known.get("finished.json", {}).get("ranks"),
        "commit": earlier.get("commit") or begun.get("commit"),
        "command": earlier.get("command") or [without_paths(word) for word in begun.get("command", [])],
        "seconds": earlier.get("seconds") or known.get("finished.json", {}).get("seconds"),
        "anonfw": __version__,
    }
    nets = [module for module in system.modules() if hasattr(module, "licence") and hasattr(module, "sha256")]
    licences = {net.name: f"{net.licence} (sha256 {net.sha256[:16]})" for net in nets}
    return Source(
        facts["name"], recipe, content, interchange, facts, folder, licences, table or _table_of(folder, weights_file)
    )


def _cast(name: str, value: Tensor, dtype: str) -> Tensor:
    import torch

    if not value.is_floating_point():
        return value
    if not torch.isfinite(value).all():
        raise AnonfwError(f"parameter {name} is not finite: export an earlier checkpoint")
    if dtype == "fp32":
        return value.float()
    half = value.half()
    if not torch.isfinite(half).all():
        raise AnonfwError(f"parameter {name} reaches {value.abs().max():.3g}, too much for fp16: use --dtype fp32")
    return half


def _steps(folder: Path, weights_file: Path, finished: Mapping[str, Any]) -> int | None:
    """Optimizer steps behind the weights, where the run says so."""
    from anonfw.training import runs

    if weights_file.suffix == ".ckpt":
        return runs.step_of(weights_file)
    newest = runs.newest(folder)
    return finished.get("steps") or (runs.step_of(newest) if newest else None)


def _table_of(folder: Path, weights_file: Path) -> Path | None:
    """The folder of the newest result table that was measured on these weights: an older one is of others."""
    places = [weights_file.parent / "validate", folder / "validate", folder]
    tables = [p / "table.json" for p in places if (p / "table.json").exists()]
    mine = [table for table in tables if table.stat().st_mtime >= weights_file.stat().st_mtime]
    return max(mine, key=lambda table: table.stat().st_mtime).parent if mine else None


def _refuse(out: Path, overwrite: bool) -> None:
    if out.exists() and not out.is_dir():
        raise AnonfwError(f"{out} is a file; name a folder")
    if not out.exists() or not any(out.iterdir()):
        return
    if not overwrite:
        raise AnonfwError(f"{out} is not empty; name another folder, or replace an earlier export with --overwrite")
    if not (out / "export.json").exists():
        raise AnonfwError(f"{out} is no earlier export (no export.json in it): --overwrite does not delete it")


def _replace(new: Path, out: Path) -> None:
    """`new` takes the place of `out`; what was there goes last."""
    old = out.with_name(f".{out.name}.{os.getpid()}.old.partial")
    if out.exists():
        os.replace(out, old)
    os.replace(new, out)
    shutil.rmtree(old, ignore_errors=True)
