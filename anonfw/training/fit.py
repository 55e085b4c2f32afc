"""The verb `fit`: recipe -> run folder -> training -> averaged weights -> result table."""

from __future__ import annotations

import argparse
import functools
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from anonfw import recipe as recipes
from anonfw.errors import AnonfwError
from anonfw.training import signals

# What says where a run lies and on what it runs, not what is trained: equal runs may differ in these.
PLACE = ("run", "resume", "trainer.accelerator", "trainer.devices", "trainer.num_nodes", "trainer.strategy")
# What another number of ranks may ask for, too. A run that is named (run=FOLDER) may continue with these changed.
LAYOUT = (
    "trainer.accumulate_grad_batches", "trainer.precision", "trainer.enable_progress_bar",
    *(f"data.{loader}.{key}" for loader in ("train", "validate", "test") for key in ("batch_size", "workers")),
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `python -m anonfw fit`."""
    recipes.add_arguments(parser)
    parser.add_argument(
        "--new", action="store_true", help="start a new run even if an unfinished one could be continued"
    )


def run(args: argparse.Namespace) -> int:
    """Trains, or continues the unfinished run of the same recipe: repeating a command resumes it."""
    signals.listen(signal.SIGUSR1)  # SLURM's warning may come during the seconds of imports
    from anonfw.training.ranks import decided_once

    quiet()
    recipe = recipes.read(args.recipe, args.overrides)
    place = decided_once(lambda: [str(path) if path else None for path in open_run(recipe, new=args.new)])
    folder, checkpoint = (Path(path) if path else None for path in place)
    fit(recipe, folder, checkpoint)
    return 0


def open_run(recipe: recipes.Recipe, new: bool = False) -> tuple[Path, Path | None]:
    """(run folder, checkpoint to continue from or None).

    `run=FOLDER` continues or creates exactly that folder. Otherwise the newest unfinished run of an equal recipe is
    continued; with `resume=auto` there must be one.
    """
    from anonfw.training import runs

    text, mark = recipes.dump(without(recipe, PLACE[:2])), runs.fingerprint(recipes.dump(without(recipe, PLACE)))
    if recipe.get("run"):
        folder = Path(recipe["run"])
        if not (folder / "run.json").exists():
            return runs.create(recipe.name, text, folder=folder, mark=mark), None
        if new:
            raise AnonfwError(f"--new, but {folder} holds a run already; name another folder")
        theirs = without(recipes.load(folder / "recipe.yaml"), (*PLACE, *LAYOUT))
        if recipes.dump(theirs) != recipes.dump(without(recipe, (*PLACE, *LAYOUT))):
            raise AnonfwError(
                f"{folder} holds a run of another recipe (compare {folder / 'recipe.yaml'}); name another folder"
            )
        if (folder / "finished.json").exists():
            raise AnonfwError(f"the run in {folder} has finished; look at it with `python -m anonfw validate {folder}`")
    else:
        folder = None if new else runs.find_unfinished(recipe.name, mark)
        if folder is None:
            if recipe.get("resume") == "auto":
                raise AnonfwError(f"resume=auto: no unfinished run of this recipe in {runs.ROOT / recipe.name}")
            return runs.create(recipe.name, text, mark=mark), None
    checkpoint = runs.newest(folder)
    print(f"continuing {folder} " + (f"from {checkpoint.name}" if checkpoint else "from its start"), flush=True)
    return folder, checkpoint


def without(recipe: Mapping[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    """The recipe without these dotted keys."""
    kept = {key: value for key, value in recipe.items() if key not in keys}
    for head in {key.partition(".")[0] for key in keys if "." in key} & kept.keys():
        inside = [key.partition(".")[2] for key in keys if key.startswith(f"{head}.")]
        if isinstance(kept[head], Mapping):
            kept[head] = without(kept[head], inside)
    return kept


def fit(recipe: Mapping[str, Any], folder: Path, checkpoint: Path | None) -> None:
    """Trains in `folder` and ends with the result table. `checkpoint` continues bitwise where it was written."""
    import lightning
    import torch
    from lightning.pytorch.callbacks import ProgressBar

    from anonfw.data.open import open_loader
    from anonfw.training import runs
    from anonfw.training.fsdp import FSDP2
    from anonfw.training.load import build_system, load_weights, start_from
    from anonfw.training.precision import BFloat16Weights
    from anonfw.training.preemption import Preemption
    from anonfw.training.ranks import is_first, launched_by
    from anonfw.training.storage import Storage

    started = time.time()
    quiet()
    if not torch.cuda.is_available():
        # On CPUs the fused attention's backward pass is slower than two matrix products at these sizes.
        torch.backends.cuda.enable_flash_sdp(False)
    if is_first():
        print(f"run folder {folder}", flush=True)
    seed = recipe.get("seed", 0)
    system = build_system(recipe)
    if recipe.get("init"):
        start_from(system, recipe["init"])
    loaders = {
        name: open_loader(recipe, name, seed=seed, bad_samples_file=folder / "bad_samples.jsonl")
        for name, node in recipe["data"].items()
        if node is not None and name != "test"
    }
    callbacks, loggers = built(recipe.get("callbacks"), folder), built(recipe.get("loggers"), folder)
    callbacks.append(Preemption(folder))
    for logger in loggers:
        if hasattr(logger, "rewind"):  # also without a checkpoint: a kill before the first one leaves lines, too
            logger.rewind(runs.step_of(checkpoint) if checkpoint else 0)
    node = dict(recipe["trainer"])
    if node.get("enable_progress_bar") is False:  # Lightning refuses a bar of the recipe's together with it
        callbacks = [callback for callback in callbacks if not isinstance(callback, ProgressBar)]
    node.setdefault("inference_mode", False)  # sharded and compiled networks do not mix it with training
    plugins = [*recipes.build(node.pop("plugins", [])), Storage(), *filter(None, [launched_by()])]
    if node.get("precision") is None:
        node["precision"] = best_precision()
    elif node["precision"] == "bf16-true":
        del node["precision"]
        plugins.append(BFloat16Weights("cuda" if torch.cuda.is_available() else "cpu"))
    trainer: lightning.Trainer = recipes.build(
        node,
        callbacks=callbacks,
        logger=loggers,
        plugins=plugins,
        default_root_dir=folder,
        enable_model_summary=False,
    )
    sharded = isinstance(trainer.strategy, FSDP2)
    if sharded and "validate" in loaders:
        trainer.limit_val_batches = shared_batches(recipe, trainer, folder / "bad_samples.jsonl")
    try:
        trainer.fit(
            system,
            loaders["train"],
            loaders.get("validate"),
            ckpt_path=checkpoint and str(checkpoint),
            weights_only=True,
        )
    except SystemExit as end:
        if trainer.interrupted:  # Lightning turns Ctrl-C into exit code 1
            raise KeyboardInterrupt from end
        raise
    finally:
        for loader in loaders.values():
            loader.close()
    save_average(trainer, system, folder)
    if torch.distributed.is_initialized():  # the others end here, while rank 0 measures
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    if not trainer.is_global_zero:
        return
    if recipe.get("evaluate") is not None:
        if sharded:
            system = build_system(recipe)
            load_weights(system, folder / "model.safetensors")
        report(system.to(trainer.strategy.root_device), recipe, folder, started)  # Lightning leaves it on the CPU
    device = trainer.strategy.root_device
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()
    runs.finish(folder, time.time() - started, trainer.global_step, trainer.world_size, kind)
    for logger in loggers:
        if hasattr(logger, "conclude"):
            logger.conclude()


def shared_batches(recipe: Mapping[str, Any], trainer: Any, bad_samples: Path) -> int:
    """Batches of the validation that every rank has: a rank that gathers parameters alone would wait for ever.

    Raises:
        AnonfwError: some rank has none.
    """
    from anonfw.data.open import open_loader

    world = trainer.world_size
    loader = open_loader(recipe, "validate", rank=world - 1, world=world, bad_samples_file=bad_samples)
    count = len(loader)
    loader.close()
    if not count:
        raise AnonfwError(
            f"with sharding each of the {world} ranks needs a sample of the validation split, and it has "
            "fewer: use fewer ranks, or data.validate=null"
        )
    limit = trainer.limit_val_batches
    return min(count, limit if isinstance(limit, int) else int(limit * count))


def built(nodes: Mapping[str, Any] | None, folder: Path) -> list:
    """What the nodes describe; a partial one wants to know the run folder."""
    made = [recipes.build(node) for node in (nodes or {}).values() if node is not None]
    return [part(folder=folder) if isinstance(part, functools.partial) else part for part in made]


def best_precision() -> str:
    """bf16-mixed where the device computes it natively (GPUs since Ampere, CPUs with AVX512-BF16 or AMX), else fp32."""
    import torch

    if torch.cuda.is_available():
        return "bf16-mixed" if torch.cuda.is_bf16_supported() else "32-true"
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bf16-mixed" if native else "32-true"


def save_average(trainer: Any, system: Any, folder: Path) -> None:
    """`model.safetensors`: the trained state, averaged where the run averages; it stays in `system`."""
    from anonfw.training.ema import EMA
    from anonfw.training.storage import write_weights

    for callback in trainer.callbacks:
        if isinstance(callback, EMA):
            callback.put_into(system)
    write_weights(system.trained_state(), folder / "model.safetensors", trainer.is_global_zero)


def report(system: Any, recipe: Mapping[str, Any], folder: Path, started: float) -> None:
    from anonfw.evaluate.evaluation import evaluate_system

    table = evaluate_system(system.eval(), recipe, folder)
    print(table.text())
    print("\n".join(["", *table.closing(folder)]))
    print(f"took   {(time.time() - started) / 60:.1f} minutes", flush=True)


def quiet() -> None:
    """Lightning's hints about things that a recipe decides (workers, logger defaults) are not for our users."""
    import logging
    import warnings

    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.pytorch.accelerators.cuda"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*`srun` command is available on your system but is not used.*")
    warnings.filterwarnings("ignore", message=".*`isinstance\\(treespec, LeafSpec\\)` is deprecated.*")
    warnings.filterwarnings("ignore", message=".*Checkpoint directory .* exists and is not empty.*")
    warnings.filterwarnings("ignore", message=".*module\\(s\\) in eval mode at the start of training.*")
