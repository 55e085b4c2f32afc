"""Identity adapters on tiny pipelines, built by hand, for tests."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anonfw.batch import FaceBatch
from anonfw.losses.regression import Regression
from anonfw.nets.backbone import Backbone
from anonfw.systems.sdxl_adapter import IdentityAdapter

SIDE = 64


class Drawn(nn.Module):
    """A recogniser's name and width; the embeddings come with the batch."""

    name, dim = "drawn", 512


def system(folder: Path, awake: bool = True, **options) -> IdentityAdapter:
    """An adapter on the pipeline in `folder`; `awake`: its trained parameters are moved, so that all of them matter."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = IdentityAdapter(
            identity=Drawn(),
            backbone=Backbone(str(folder)),
            losses={"noise": Regression()},
            optimizer=partial(torch.optim.AdamW, lr=3e-3),
            **options,
        ).eval()
        if awake:
            with torch.no_grad():
                for parameter in made.trained_state().values():
                    parameter.add_(0.1 * torch.randn_like(parameter))
    return made


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def batch(n: int = 2, side: int = SIDE, **more) -> FaceBatch:
    rng = torch.Generator().manual_seed(7)
    return FaceBatch(
        image=torch.randint(0, 256, (n, 3, side, side), generator=rng, dtype=torch.uint8),
        identity=torch.arange(n),
        index=torch.arange(n),
        key=[f"face{row}" for row in range(n)],
        landmarks=torch.zeros(n, 5, 2),
        embeddings={"drawn": F.normalize(randn(n, 512, seed=3), dim=-1)},
        **more,
    )
