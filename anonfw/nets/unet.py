"""Diffusers' U-Nets: built small from a recipe, or opened from released weights with a wider first convolution."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn


def small_unet(
    in_channels: int,
    out_channels: int,
    grid: int,
    token_width: int,
    widths: Sequence[int] = (96, 160, 256),
    attention: Sequence[bool] = (False, True, True),
    blocks: int = 1,
    heads: int = 4,
    vector_width: int | None = None,
    middle: bool = True,
) -> nn.Module:
    """A `UNet2DConditionModel` for grids of `grid` x `grid`: one width a level, halved between levels.

    Args:
        attention: which levels have self- and cross-attention (the middle always has).
        middle: whether there is a block at the coarsest grid between the way down and the way up.
        blocks: residual blocks a level. heads: of every attention.
        vector_width: of a vector that is added to the time embedding (diffusers' `class_labels`); None for none.
    """
    from diffusers import UNet2DConditionModel

    down = tuple("CrossAttnDownBlock2D" if on else "DownBlock2D" for on in attention)
    up = tuple("CrossAttnUpBlock2D" if on else "UpBlock2D" for on in reversed(attention))
    return UNet2DConditionModel(
        sample_size=grid,
        in_channels=in_channels,
        out_channels=out_channels,
        down_block_types=down,
        up_block_types=up,
        mid_block_type="UNetMidBlock2DCrossAttn" if middle else None,
        block_out_channels=tuple(widths),
        layers_per_block=blocks,
        cross_attention_dim=token_width,
        attention_head_dim=heads,
        norm_num_groups=16,
        class_embed_type="simple_projection" if vector_width else None,
        projection_class_embeddings_input_dim=vector_width,
    )


def pretrained_unet(
    in_channels: int,
    out_channels: int,
    grid: int,  # noqa: ARG001 a convolutional network takes any grid
    token_width: int,
    source: str,
    subfolder: str | None = "unet",
    revision: str | None = None,
) -> nn.Module:
    """Released weights (SD 1.5: 4 channels in and out) whose first convolution reads `in_channels`.

    The added input channels start at zero, so that the network begins as the released one (as inpainting models do).
    Raises:
        OSError: the weights are neither in the folder nor in the hub's cache (diffusers names what is missing).
        ValueError: the released network has more channels, another number of outputs, or tokens of another width.
    """
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(source, subfolder=subfolder, revision=revision)
    old = unet.conv_in
    if unet.config.cross_attention_dim != token_width:
        raise ValueError(f"{source} reads tokens of width {unet.config.cross_attention_dim}: set token_width to that")
    if unet.config.out_channels != out_channels or in_channels < old.in_channels:
        raise ValueError(
            f"{source} has {old.in_channels} channels in and {unet.config.out_channels} out; "
            f"this system needs at least {in_channels} and {out_channels}: is the codec the released one's?"
        )
    if in_channels > old.in_channels:
        unet.conv_in = nn.Conv2d(in_channels, old.out_channels, old.kernel_size, padding=old.padding)
        with torch.no_grad():
            unet.conv_in.weight.zero_()
            unet.conv_in.weight[:, : old.in_channels] = old.weight
            unet.conv_in.bias.copy_(old.bias)
        unet.register_to_config(in_channels=in_channels)
    return unet
