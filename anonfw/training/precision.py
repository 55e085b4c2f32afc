"""bfloat16 weights: half the memory of parameters and gradients, for what bears it."""

from __future__ import annotations

import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import nn

MATRICES = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class BFloat16Weights(MixedPrecision):
    """`trainer.precision: bf16-true`. The trained weights of linear and convolutional layers are bfloat16; autocast
    would round them for each product anyway. Norms, single parameters and everything frozen stay as they are.

    Lightning's own bf16-true casts every input and every frozen network, too: recognisers lose digits, and images that
    a step makes itself meet weights of another type. The optimizer's states are bfloat16 as well, so steps below
    1/256 of a weight are lost: take it where memory is short, not by default. The average (`EMA`) stays float32.
    """

    def __init__(self, device: str) -> None:
        super().__init__("bf16-mixed", device)

    def convert_module(self, module: nn.Module) -> nn.Module:
        for part in module.modules():
            if isinstance(part, MATRICES):
                for parameter in part.parameters(recurse=False):
                    if parameter.requires_grad and parameter.dtype == torch.float32:
                        parameter.data = parameter.data.bfloat16()
        return module
