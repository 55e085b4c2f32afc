"""AdaFace (Kim et al., 2022): the improved residual networks IR-18, IR-50 and IR-101 with its released checkpoints.

The layers' names are those of the released `state_dict`, so that it loads as it is.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from anonfw.identity.base import Recognizer, origin
from anonfw.identity.checkpoint import load_state, read_state

# Blocks a stage. A checkpoint tells its depth by how many blocks it holds.
STAGES = {"IR-18": (2, 2, 2, 2), "IR-50": (3, 4, 14, 3), "IR-101": (3, 13, 30, 3)}
WIDTHS = (64, 128, 256, 512)


class Block(nn.Module):
    """Residual block: BN, conv, BN, PReLU, strided conv, BN; the shortcut is strided, and projected to a new width."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        if width_in == width:
            self.shortcut_layer: nn.Module = nn.MaxPool2d(1, stride)
        else:
            project = nn.Conv2d(width_in, width, 1, stride, bias=False)
            self.shortcut_layer = nn.Sequential(project, nn.BatchNorm2d(width))
        self.res_layer = nn.Sequential(
            nn.BatchNorm2d(width_in),
            nn.Conv2d(width_in, width, 3, 1, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.PReLU(width),
            nn.Conv2d(width, width, 3, stride, 1, bias=False),
            nn.BatchNorm2d(width),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.res_layer(x) + self.shortcut_layer(x)


class ImprovedResNet(nn.Module):
    """(B,3,112,112) BGR in [-1,1] -> (B,512), not normalised. Four stages, each halving the resolution first."""

    def __init__(self, stages: tuple[int, ...]) -> None:
        super().__init__()
        self.input_layer = nn.Sequential(
            nn.Conv2d(3, WIDTHS[0], 3, 1, 1, bias=False), nn.BatchNorm2d(WIDTHS[0]), nn.PReLU(WIDTHS[0])
        )
        blocks, width_in = [], WIDTHS[0]
        for count, width in zip(stages, WIDTHS, strict=True):
            for number in range(count):
                blocks.append(Block(width_in, width, 1 if number else 2))
                width_in = width
        self.body = nn.Sequential(*blocks)
        self.output_layer = nn.Sequential(
            nn.BatchNorm2d(width_in),
            nn.Dropout(0.4),
            nn.Flatten(),
            nn.Linear(width_in * 7 * 7, 512),
            nn.BatchNorm1d(512, affine=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.output_layer(self.body(self.input_layer(x)))


class AdaFace(Recognizer):
    """AdaFace from a released Lightning checkpoint (`state_dict` with the prefix `model.`).

    `features` is the output of one block of the body. Block 2, the default, ends the first stage: (B,64,56,56). IR-50
    has (B,128,28,28) at 3..6, (B,256,14,14) at 7..20 and (B,512,7,7) at 21..23; IR-101 at 3..15, 16..45 and 46..48.

    Args:
        weights: a name of the weights table (`adaface_ir50`, `adaface_ir101`, ...) or the path of a checkpoint. The
            depth is read from it.
        block: of the body, counted from 0.
    Raises:
        WeightsError: neither a name nor a file, the file cannot be had, or it is not an AdaFace checkpoint.
        ValueError: no such block.
    """

    def __init__(self, weights: str | Path = "adaface_ir50_webface4m", block: int = 2) -> None:
        super().__init__()
        found = origin(weights)
        self.name, self.licence, self.sha256 = found.name, found.licence, found.sha256
        self.size, self.dim = 112, 512
        state = read_state(found.file, "model.")
        blocks = len({key.split(".")[1] for key in state if key.startswith("body.")})
        # A file of another depth fails on its names, against IR-50's.
        depth = next((name for name, stages in STAGES.items() if sum(stages) == blocks), "IR-50")
        net = ImprovedResNet(STAGES[depth])
        load_state(net, state, found.file, f"AdaFace {depth}")
        if not 0 <= block < len(net.body):
            raise ValueError(f"{self.name} has the blocks 0 to {len(net.body) - 1}, not {block}")
        self.first = nn.Sequential(net.input_layer, *net.body[: block + 1])
        self.last = nn.Sequential(*net.body[block + 1 :], net.output_layer)
        self.freeze()

    def early(self, images: Tensor) -> Tensor:
        return self.first(images.flip(1))

    def embed(self, images: Tensor) -> Tensor:
        return self.last(self.early(images))
