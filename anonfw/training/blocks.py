"""The repeated blocks of networks: what sharding gathers, what activations are recomputed for, what is compiled."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import lightning
from torch import nn
from torch.utils.checkpoint import checkpoint

# Of diffusers' U-Nets and autoencoders, and of the text and image encoders of transformers.
CLASSES = (
    "BasicTransformerBlock",
    "CLIPEncoderLayer",
    "JointTransformerBlock",
    "ResnetBlock2D",
    "ResnetBlockCondNorm2D",
)


def find_blocks(module: nn.Module, classes: Sequence[str] = CLASSES, min_parameters: int = 0) -> list[nn.Module]:
    """The outermost modules inside `module` of one of those classes and of at least that size, in order."""
    found = []
    for child in module.children():
        if type(child).__name__ in classes and sum(p.numel() for p in child.parameters()) >= min_parameters:
            found.append(child)
        else:
            found += find_blocks(child, classes, min_parameters)
    return found


def demand_blocks(module: nn.Module, classes: Sequence[str]) -> list[nn.Module]:
    """`find_blocks`, and at least one.

    Raises:
        ValueError: there is none; the message lists the classes that there are.
    """
    found = find_blocks(module, classes)
    if not found:
        kinds = {type(part).__name__ for part in module.modules() if next(part.parameters(False), None) is not None}
        there = ", ".join(sorted(kinds))
        raise ValueError(f"no module is a {' or '.join(classes)}; name other classes, of {there}")
    return found


class ActivationCheckpointing(lightning.Callback):
    """Keeps only the inputs of blocks for the backward pass and computes the rest again: less memory, about a third
    more time.

    Args:
        classes: of the blocks.
    """

    def __init__(self, classes: Sequence[str] = CLASSES) -> None:
        self.classes = tuple(classes)

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:  # noqa: ARG002
        for block in demand_blocks(pl_module, self.classes):
            # An attribute, not a wrapper: names of parameters stay as they are.
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)


class Compile(lightning.Callback):
    """`torch.compile` of each block in place: one graph serves all blocks of a kind, and names stay as they are.

    Worth it on GPUs. On CPUs it gains nothing for minutes of compilation (docs/training.md).

    Args:
        classes: of the blocks. backend, mode, dynamic: of `torch.compile`.
    """

    def __init__(
        self,
        classes: Sequence[str] = CLASSES,
        backend: str = "inductor",
        mode: str | None = None,
        dynamic: bool | None = None,
    ) -> None:
        self.classes, self.options = tuple(classes), {"backend": backend, "mode": mode, "dynamic": dynamic}

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:  # noqa: ARG002
        for block in demand_blocks(pl_module, self.classes):
            block.compile(**self.options)
