"""FaRL (Zheng et al., 2022): CLIP's ViT-B/16 image tower, trained on faces and their captions, through open_clip."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from anonfw.identity.base import Recognizer, origin
from anonfw.identity.checkpoint import load_state, read_state

if TYPE_CHECKING:
    from torch import nn

ARCHITECTURE = "ViT-B-16-quickgelu"
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
# Heads of FaRL's masked image modelling, kept in its checkpoints; embeddings do not need them.
PRETRAINING = ("lm_transformer.", "ln_lm.", "lm_head.", "mask_token")


class FaRL(Recognizer):
    """FaRL-Base-Patch16 at 224 px: the projected class token, 512-d.

    It was trained on photographs of people, not on tight crops: `window` is the whole portrait crop.

    Args:
        weights: a name of the weights table, or the path of a released checkpoint (`state_dict` of a CLIP model).
    Raises:
        WeightsError: neither a name nor a file, the file cannot be had, or it is not of this network.
    """

    window = (-14.0, -11.25, 140.0)

    def __init__(self, weights: str | Path = "farl_ep64") -> None:
        super().__init__()
        found = origin(weights)
        self.name, self.licence, self.sha256 = found.name, found.licence, found.sha256
        self.size, self.dim = 224, 512
        self.net = empty_tower()
        state = {
            name: value.float()
            for name, value in read_state(found.file, "visual.").items()
            if not name.startswith(PRETRAINING)
        }
        load_state(self.net, state, found.file, "FaRL ViT-B/16")
        # From [-1,1] to CLIP's normalisation in one step.
        self.register_buffer("scale", 0.5 / torch.tensor(STD).view(3, 1, 1))
        self.register_buffer("shift", ((0.5 - torch.tensor(MEAN)) / torch.tensor(STD)).view(3, 1, 1))
        self.freeze()

    def embed(self, images: Tensor) -> Tensor:
        return self.net(images * self.scale + self.shift)


def empty_tower() -> nn.Module:
    """The image tower before its weights are loaded; drawing its first values touches no random state."""
    import open_clip
    from open_clip.model import CLIPVisionCfg, _build_vision_tower

    configuration = open_clip.get_model_config(ARCHITECTURE)
    with torch.random.fork_rng(devices=[]):
        return _build_vision_tower(
            configuration["embed_dim"], CLIPVisionCfg(**configuration["vision_cfg"]), configuration["quick_gelu"]
        ).eval()
