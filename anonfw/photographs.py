"""The verb `anonymize`: photographs as they come from a camera, through any trained system, and back into the picture.

Every face is found, cut out as the system was trained (`anonfw.align`), anonymized, and what the system changed is set
back in its place. What it did not change keeps the photograph's own pixels.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anonfw.errors import AnonfwError

if TYPE_CHECKING:
    import numpy as np

    from anonfw.attributes import Attributes
    from anonfw.batch import FaceBatch
    from anonfw.detect import Detector

CHANGED = 3  # levels of 255: a smaller difference is the rounding of an image that was kept
RIM = 0.04  # of the crop's side: how far a change is grown, and over which it fades out


class NoFaceError(AnonfwError):
    """A photograph in which no face was found: nothing in it was anonymized, so nothing is written."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `python -m anonfw anonymize`."""
    parser.add_argument(
        "run",
        metavar="RUN_OR_RECIPE",
        help="a run folder, a checkpoint in one, an export, or a recipe (.yaml) whose `init` names the weights",
    )
    parser.add_argument(
        "photographs",
        metavar="PHOTOGRAPH|key=value",
        nargs="+",
        help="pictures; or keys of the run's recipe with a YAML value: system.guidance=1.5",
    )
    parser.add_argument("--out", type=Path, default=Path("anonymized"), help="folder to write to (default: anonymized)")
    parser.add_argument("--draw", type=int, default=0, help="another number is another stranger (default: 0)")
    parser.add_argument("--threshold", type=float, default=0.5, help="of the face detector (default: 0.5)")
    parser.add_argument("--device", help="torch device (default: cuda where there is one, else cpu)")


def run(args: argparse.Namespace) -> int:
    """Write one picture for each photograph with a face. The others are named at the end, as an error."""
    import numpy as np
    from PIL import Image, ImageOps

    from anonfw.data.files import atomic
    from anonfw.detect import Detector

    overrides = [word for word in args.photographs if "=" in word and not Path(word).exists()]
    files = [Path(word) for word in args.photographs if word not in overrides]
    targets = _targets(files, args.out)
    anonymize, size, alignment, attributes = _opened(args.run, overrides, args.device)
    detector, faceless = Detector(), []
    args.out.mkdir(parents=True, exist_ok=True)
    for file, target in targets.items():
        with Image.open(file) as opened:
            image = np.array(ImageOps.exif_transpose(opened).convert("RGB"))
        try:
            out, count = anonymize_photograph(
                anonymize, image, size, file.stem, detector, alignment, attributes, args.draw, args.threshold
            )
        except NoFaceError as error:
            faceless.append(str(error))
            print(f"{file}: no face", file=sys.stderr, flush=True)
            continue
        with atomic(target) as stream:
            Image.fromarray(out).save(stream, "PNG")
        print(f"{target}  {count} face{'s' if count != 1 else ''}", flush=True)
    if faceless:
        raise NoFaceError(f"{len(faceless)} of {len(files)} photographs were not written: {faceless[0]}")
    return 0


def anonymize_photograph(
    anonymize: Callable[[FaceBatch, int], Any],
    image: np.ndarray,
    size: int,
    key: str,
    detector: Detector,
    alignment: str = "portrait",
    attributes: Attributes | None = None,
    draw: int = 0,
    threshold: float = 0.5,
) -> tuple[np.ndarray, int]:
    """The photograph with every face that is found anonymized, and the number of faces.

    Args:
        anonymize: `System.anonymize`: aligned faces, draw -> (B,3,size,size) in [-1,1].
        image: (h,w,3) uint8 RGB.
        size, alignment: of the crops that the system was trained on.
        key: names the photograph: noise is a function of it, of the face's rank by size, and of `draw`.
        attributes: measures the factors that a system may read; None leaves them out.
    Raises:
        NoFaceError: the detector finds none at `threshold`.
        ValueError: not such an image.
    """
    import torch

    faces = detector.detect(image, threshold)
    if not len(faces):
        raise NoFaceError(
            f"no face was found in {key} ({image.shape[1]} x {image.shape[0]} px) at threshold {threshold}: "
            "lower --threshold, or give a picture in which the face is larger and upright"
        )
    batch, matrices = _batch_of(image, faces.landmarks, size, alignment, key, attributes)
    with torch.inference_mode():
        made = anonymize(batch, draw).float().clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8).cpu()
    out = image
    # The largest face last: where two crops overlap, the face in front wins.
    for row in reversed(range(len(matrices))):
        crops = (picture[row].permute(1, 2, 0).numpy() for picture in (batch.image, made))
        out = paste(out, *crops, matrices[row])
    return out, len(matrices)


def paste(image: np.ndarray, before: np.ndarray, after: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """The photograph with what differs between two versions of a crop of it, faded in over a rim around the change.

    Args:
        image: (h,w,3) uint8. before, after: (s,s,3) uint8. matrix: (2,3), photograph to crop.
    """
    import cv2
    import numpy as np

    size = before.shape[0]
    rim = max(round(RIM * size), 1)
    changed = (np.abs(after.astype(np.int16) - before).max(-1) >= CHANGED).astype(np.float32)
    # Grown by twice the rim before it is blurred by one: every changed pixel is replaced as a whole.
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (4 * rim + 1, 4 * rim + 1))
    mask = cv2.blur(cv2.dilate(changed, kernel), (2 * rim + 1, 2 * rim + 1))
    edge = np.minimum(np.arange(size), np.arange(size)[::-1])
    mask *= np.clip(np.minimum(edge[:, None], edge[None]) / rim, 0, 1)  # no seam where the crop ends
    shape = image.shape[1::-1]
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    placed = cv2.warpAffine(after, matrix, shape, flags=flags, borderMode=cv2.BORDER_REPLICATE).astype(np.float32)
    weight = cv2.warpAffine(mask, matrix, shape, flags=flags)[..., None]
    return (image + weight * (placed - image)).round().astype(np.uint8)


def _batch_of(
    image: np.ndarray,
    landmarks: np.ndarray,
    size: int,
    alignment: str,
    key: str,
    attributes: Attributes | None,
) -> tuple[FaceBatch, list[np.ndarray]]:
    """The faces as a batch, and each one's (2,3) matrix from photograph to crop."""
    import numpy as np
    import torch

    from anonfw.align import similarity, template, transform_points, warp
    from anonfw.batch import FaceBatch

    matrices = [similarity(points, template(alignment, size)) for points in landmarks]
    crops = [warp(image, matrix, size) for matrix in matrices]
    moved = [transform_points(points, matrix) for points, matrix in zip(landmarks, matrices, strict=True)]
    measured = (
        [attributes.measure(crop, points) for crop, points in zip(crops, moved, strict=True)] if attributes else []
    )
    batch = FaceBatch(
        image=torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).contiguous(),
        identity=torch.arange(len(crops)),
        index=torch.arange(len(crops)),
        key=[f"{key}-{rank}" for rank in range(len(crops))],
        landmarks=torch.from_numpy(np.stack(moved)).float(),
        factors={name: torch.tensor([row[name] for row in measured]) for name in (measured[0] if measured else ())},
    )
    return batch, matrices


def _targets(files: list[Path], out: Path) -> dict[Path, Path]:
    """Photograph -> picture to write, checked before anything heavy begins."""
    targets = {file: out / f"{file.stem}.png" for file in files}
    for file, target in targets.items():
        if not file.is_file():
            raise AnonfwError(f"there is no photograph {file}")
        if target.resolve() == file.resolve():
            raise AnonfwError(f"{target} would replace the photograph itself: choose another --out")
    if len(set(targets.values())) < len(files) or not files:
        raise AnonfwError(
            f"{len(files)} photographs for {len(set(targets.values()))} names in {out}: names must differ"
        )
    return targets


def open_system(place: str, overrides: Sequence[str] = ()) -> tuple[Any, Any]:
    """(system in eval mode, its recipe) of a run folder, a checkpoint, an export, or a recipe with its `init`.

    Raises:
        AnonfwError: as `anonfw.training.load_system`; or a recipe that names no weights.
    """
    from anonfw.recipe import read
    from anonfw.training.load import build_system, load_system, start_from

    if Path(place).suffix not in (".yaml", ".yml"):
        return load_system(place, overrides)
    recipe = read(place, list(overrides))
    if not recipe.get("init"):
        raise AnonfwError(f"{place} names no trained weights: add init=FILE (or give a run folder)")
    system = build_system(recipe)
    start_from(system, recipe["init"])
    return system.eval(), recipe


def _opened(place: str, overrides: list[str], device: str | None) -> tuple[Callable, int, str, Attributes]:
    """What anonymizes on its device, the crops' size and alignment, and what measures factors."""
    import torch

    from anonfw.attributes import Attributes

    system, recipe = open_system(place, overrides)
    size, alignment = _crop_of(recipe)
    system = system.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return lambda batch, draw: system.anonymize(batch.to(system.device), draw), size, alignment, Attributes()


def _crop_of(recipe: Mapping[str, Any]) -> tuple[int, str]:
    """Size and alignment of the faces that the recipe's system works on: its own, or those of its data set's card."""
    from anonfw.data.open import open_loader

    node = recipe["system"]
    if node.get("size"):
        return node["size"], node.get("alignment", "portrait")
    loader = open_loader(recipe, "train", rank=0, world=1)
    try:
        card = loader.table.card
        return card.image_size, card.alignment
    finally:
        loader.close()
