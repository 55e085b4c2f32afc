"""Trainings of seconds: every recipe as it is, only smaller, on the `tiny_faces`."""

from __future__ import annotations

import json
import time
from pathlib import Path

import lightning
import torch
from torch import Tensor

from anonfw import recipe as recipes
from anonfw.batch import FaceBatch, StepOut
from anonfw.losses.base import Loss
from anonfw.recipe import Recipe
from anonfw.training import fit as fitting

ROOT = Path(__file__).resolve().parent.parent
RECIPE = ROOT / "recipes" / "id2face.yaml"
STEPS = 6

SMALL = (
    "init=null",
    "evaluate=null",
    "trainer.precision=32-true",
    f"trainer.max_steps={STEPS}",
    "trainer.log_every_n_steps=1",
    "trainer.val_check_interval=100",
    "trainer.enable_progress_bar=false",
    "trainer.accelerator=cpu",
    "callbacks.checkpoint.every=1",
    "data.train.workers=0",
    "data.validate.workers=0",
    "data.test.workers=0",
)

# What makes a system small. Three batches an epoch: a training of six steps crosses epochs.
SYSTEMS = {
    "anonfw.systems.sdxl_adapter.IdentityAdapter": (
        "system.anonymizer.steps=2",
        "data.train.batch_size=4",
        "data.train.limit_samples=14",
        "data.validate.batch_size=4",
        "data.validate.limit_samples=8",
        "data.test.batch_size=4",
    ),
    "anonfw.systems.text_to_image.TextToImage": (
        "system.size=32",
        "system.unet.widths=[16,32,32]",
        "system.token_width=32",
        "system.steps=2",
        "callbacks.grid.rows=1",
        "data.train.batch_size=4",
        "data.train.limit_samples=14",
        "data.validate.batch_size=4",
        "data.validate.limit_samples=8",
    ),
    "anonfw.systems.id2face.ID2Face": (
        "system.unet.widths=[16,32,32]",
        "system.token_width=32",
        "system.latent_dim=8",
        "system.steps=2",
        "data.train.batch_size=4",
        "data.train.limit_samples=14",
        "data.validate.batch_size=4",
        "data.validate.limit_samples=8",
        "data.test.batch_size=4",
    ),
    "anonfw.systems.iddiffuse.IDDiffuse": (
        "system.unet.widths=[16,32,32]",
        "system.token_width=32",
        "system.identity.demographics=null",
        "system.judged=1",
        "system.texture_side=10",
        "system.steps=2",
        "data.train.batch_size=4",
        "data.train.limit_samples=14",
        "data.validate.batch_size=4",
        "data.validate.limit_samples=8",
        "data.test.batch_size=4",
    ),
    "anonfw.systems.identity_mapper.IdentityMapper": (
        "system.hidden=[32]",
        "system.dim=16",
        "data.train.batch_size=8",
        "data.train.per_identity=2",
        "data.validate.batch_size=8",
        "data.validate.per_identity=2",
    ),
}


def overrides(faces: Path, *more: str, path: Path = RECIPE) -> list[str]:
    """`key=value`s that make a recipe a matter of seconds."""
    loaded = recipes.load(path)
    target, data = loaded["system"]["_target_"], loaded["data"]
    assert target in SYSTEMS, f"say in tests/tiny_training.py how {target} is made small"
    small = [value for value in (*SMALL, *SYSTEMS[target]) if "test" in data or not value.startswith("data.test.")]
    pictures = ("decode=true", "latents=null")  # in place of latents that are not there
    small += [f"data.{name}.{value}" for name in data if data[name].get("latents") for value in pictures]
    return [*small, f"dataset={faces}", *more]


def recipe(faces: Path, *more: str, path: Path = RECIPE) -> Recipe:
    """The tiny recipe, checked."""
    return recipes.read(path, overrides(faces, *more, path=path))


def train(tiny: Recipe, new: bool = False) -> Path:
    """What the verb `fit` does, in this process; returns the run folder."""
    folder, checkpoint = fitting.open_run(tiny, new=new)
    fitting.fit(tiny, folder, checkpoint)
    return folder


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def curve(folder: Path, name: str = "train/loss") -> dict[int, float]:
    """Step -> value; asserts that no step was logged twice."""
    entries = [(entry["step"], entry[name]) for entry in metrics(folder) if name in entry]
    assert len(dict(entries)) == len(entries), f"{name} was logged twice at a step: {entries}"
    return dict(entries)


def checkpoint(folder: Path) -> dict:
    return torch.load(folder / "checkpoints" / "last.ckpt", map_location="cpu", weights_only=True)


def differences(one: object, other: object, at: str = "") -> list[str]:
    """Where two trees of a checkpoint differ by as little as a bit."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return [] if one.dtype == other.dtype and torch.equal(one, other) else [at]
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        one, other = dict(enumerate(one)), dict(enumerate(other))
    if isinstance(one, dict) and isinstance(other, dict):
        found = [f"{at}.{key}" for key in one.keys() ^ other.keys()]
        for key in one.keys() & other.keys():
            found += differences(one[key], other[key], f"{at}.{key}")
        return found
    return [] if one == other else [at]


def assert_same_end(one: Path, other: Path) -> None:
    """Parameters, averages, optimizer, schedule, loader's position and counters: bit for bit."""
    first, second = checkpoint(one), checkpoint(other)
    assert first["state_dict"], "nothing was saved"
    for saved in (first, second):
        # Some of Lightning's own counters tell in which hook a checkpoint was written and how a run was cut.
        saved["loader"] = saved.pop("loops")["fit_loop"]["state_dict"]["combined_loader"]
        del saved["epoch"]
    assert differences(first, second) == []
    assert (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()


class PlantedNaN(Loss):
    """Zero, but from the `after`-th call on NaN for the sample in row 1. For recipes of tests."""

    def __init__(self, after: int, weight: float = 1.0) -> None:
        super().__init__(weight)
        self.after, self.calls = after, 0

    def forward(self, out: StepOut, batch: FaceBatch) -> Tensor:
        self.calls += 1
        zero = 0.0 * out.prediction.flatten(1).mean(1)
        zero[1] = float("nan") if self.calls >= self.after else 0.0
        return zero


class Hold(lightning.Callback):
    """Waits for its killer before batch `batch`, as long as FOLDER.hold exists; says so in FOLDER.held."""

    def __init__(self, folder: Path, batch: int) -> None:
        self.hold, self.held, self.batch = Path(f"{folder}.hold"), Path(f"{folder}.held"), batch

    def on_train_batch_start(self, trainer: lightning.Trainer, *_: object) -> None:
        if trainer.fit_loop.total_batch_idx < self.batch:
            return
        until = time.monotonic() + 120
        while self.hold.exists():
            self.held.touch()
            assert time.monotonic() < until, "nobody came to kill this process"
            time.sleep(0.02)


class Measured:
    """An evaluation that tells what it was given: the sum of the weights, and with how many others."""

    def measure(self, system: torch.nn.Module, recipe: Recipe, folder: Path) -> Measured:
        world = torch.distributed.get_world_size() if hasattr(system, "reshard") else 1
        total = sum(float(value.detach().double().sum()) for value in system.trained_state().values())
        (folder / "measured.json").write_text(json.dumps({"sum": total, "world": world}))
        return self

    def save(self, folder: Path) -> None:
        """The verb's own table; here `measure` has written all there is."""

    def text(self) -> str:
        return "measured"

    def closing(self, folder: Path) -> list[str]:
        return [str(folder)]
