"""Pictures of results: the sample grid of a run, and contact sheets of any columns of images."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from anonfw.batch import FaceBatch

HEADER = 22  # pixels above the first row
GAP = 4  # pixels between cells


def contact_sheet(columns: Mapping[str, Tensor], zoom: int = 2, rows: list[str] | None = None) -> bytes:
    """A PNG with one column of images per entry under its name.

    Args:
        columns: heading -> (R,3,H,W), uint8 or float in [-1,1] (clamped). All columns have the same shape.
        zoom: enlargement for viewing.
        rows: a label beside each of the R rows.
    Raises:
        ValueError: no columns, or shapes that differ.
    """
    from PIL import Image, ImageDraw, ImageFont

    shapes = {name: tuple(images.shape) for name, images in columns.items()}
    if not shapes or len(set(shapes.values())) != 1:
        raise ValueError(f"a contact sheet needs columns of one shape, got {shapes}")
    count, _, height, width = next(iter(shapes.values()))
    if rows is not None and len(rows) != count:
        raise ValueError(f"{len(rows)} row labels for {count} rows")
    height, width = height * zoom, width * zoom
    font = ImageFont.load_default(size=13)
    left = GAP + (max(int(font.getlength(label)) for label in rows) + 2 * GAP if rows else 0)
    sheet = Image.new("RGB", (left + len(shapes) * (width + GAP), HEADER + count * (height + GAP)), "white")
    draw = ImageDraw.Draw(sheet)
    for c, (name, images) in enumerate(columns.items()):
        x = left + c * (width + GAP)
        draw.text((x + width / 2, HEADER / 2), name, fill="black", font=font, anchor="mm")
        for r, image in enumerate(_as_uint8(images)):
            cell = Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC)
            sheet.paste(cell, (x, HEADER + r * (height + GAP)))
    for r, label in enumerate(rows or []):
        draw.text((GAP, HEADER + r * (height + GAP) + height / 2), label, fill="black", font=font, anchor="lm")
    stream = io.BytesIO()
    sheet.save(stream, "PNG")
    return stream.getvalue()


@torch.no_grad()  # not inference_mode: a sharded network that is training keeps what it gathers here
def sample_grid(system: Any, batch: FaceBatch, draws: int = 3, zoom: int = 2) -> bytes:
    """The PNG of a system's samples: one row a photo; original, self-reconstruction, `draws` anonymizations.

    Args:
        system: has `anonymize(batch, draw)`, `device`, and `reconstruct(batch)` (the photo with its own identity);
            a system without `reconstruct` has no such column.
        batch: the photos.
    """
    batch = batch.to(system.device)
    columns = {"original": batch.image.cpu()}
    if hasattr(system, "reconstruct"):
        columns["own identity"] = system.reconstruct(batch).cpu()
    for draw in range(draws):
        columns[f"anonymized {draw + 1}"] = system.anonymize(batch, draw).cpu()
    return contact_sheet(columns, zoom)


def _as_uint8(images: Tensor) -> np.ndarray:
    """(R,3,H,W) -> (R,H,W,3) uint8."""
    if images.dtype != torch.uint8:
        images = images.float().clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)
    return np.ascontiguousarray(images.permute(0, 2, 3, 1).cpu().numpy())
