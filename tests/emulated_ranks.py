"""What several ranks compute together, computed by one process without torch.distributed, Lightning or checkpoints."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from anonfw.data.open import open_loader
from anonfw.recipe import Recipe
from anonfw.system import System, seed_of
from anonfw.training.load import build_system


class Emulated(NamedTuple):
    """losses: the mean over ranks of each step's. state: trained state. average: of the parameters, in float64."""

    losses: list[float]
    state: dict[str, Tensor]
    average: dict[str, Tensor]


def emulate(recipe: Recipe, world: int) -> Emulated:
    """The recipe's training on `world` ranks: every rank's batch and draws, the mean of the gradients, one step.

    BatchNorm's running statistics are rank 0's, as they are under DDP.
    """
    system: System = build_system(recipe)
    loaders = [open_loader(recipe, "train", seed=recipe["seed"], rank=rank, world=world) for rank in range(world)]
    streams = [endless(loader) for loader in loaders]
    made = system.configure_optimizers()
    optimizer, schedule = made["optimizer"], made["lr_scheduler"]["scheduler"]
    trainer, losses = recipe["trainer"], []
    parameters = {name: p for name, p in system.named_parameters() if p.requires_grad}
    statistics = {name: value for name, value in system.trained_state().items() if name not in parameters}
    average = {name: p.detach().double() for name, p in parameters.items()}
    accumulate = trainer.get("accumulate_grad_batches", 1)
    for step in range(trainer["max_steps"]):
        optimizer.zero_grad()
        for part in range(accumulate):
            index = step * accumulate + part
            before = {name: value.clone() for name, value in statistics.items()}
            found = []
            for rank in reversed(range(world)):
                for name, value in statistics.items():
                    value.copy_(before[name])
                rng = torch.Generator().manual_seed(seed_of(recipe["seed"], "train", rank, index))
                loss, _ = system.total(next(streams[rank]), rng)
                (loss / (world * accumulate)).backward()
                found.append(loss.item())
        losses.append(sum(found) / world)  # of the last part: what Lightning logs
        torch.nn.utils.clip_grad_norm_(parameters.values(), trainer["gradient_clip_val"])
        optimizer.step()
        schedule.step()
        decay = min(0.99, (step + 2) / (step + 11))
        for name, mean in average.items():
            mean.lerp_(parameters[name].detach().double(), 1 - decay)
    for loader in loaders:
        loader.close()
    return Emulated(losses, {name: value.detach() for name, value in system.trained_state().items()}, average)


def endless(loader):
    while True:
        yield from loader
