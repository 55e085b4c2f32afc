"""Faces in a photograph: SCRFD-500M through onnxruntime, with five points for alignment.

Coordinates are pixels of the given image, x to the right and y down, pixel centres at whole numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

STRIDES = (8, 16, 32)
ANCHORS = 2  # per cell
LARGEST = 640  # the network sees no longer side
CLOSE = 320  # canvas for crops: small pictures are enlarged into it, with a border of ...
BORDER = 0.2  # ... this share of the picture, since a face that fills its picture is not found


@dataclass(frozen=True)
class Faces:
    """n faces of one image, the largest first.

    Attributes:
        boxes: (n,4) float32, left, top, right, bottom.
        landmarks: (n,5,2) float32, eyes, nose tip, mouth corners (image left first).
        scores: (n,) float32 in [0,1].
    """

    boxes: np.ndarray
    landmarks: np.ndarray
    scores: np.ndarray

    def __len__(self) -> int:
        return len(self.scores)


def check_image(image: np.ndarray) -> np.ndarray:
    """The image itself, if it is what detector and estimators take.

    Raises:
        ValueError: not a (h,w,3) uint8 array with at least 16 px a side.
    """
    if not isinstance(image, np.ndarray) or image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        got = f"{image.dtype} of shape {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__
        raise ValueError(f"expected an RGB image as a (h,w,3) uint8 array, got {got}")
    if min(image.shape[:2]) < 16:
        raise ValueError(f"the image is {image.shape[1]} x {image.shape[0]} px; at least 16 px a side are needed")
    return image


def load_session(weights: str | Path, threads: int):
    """onnxruntime session of a weight by its name in `anonfw.weights`, or of an .onnx file."""
    import onnxruntime

    path = Path(weights)
    if path.suffix != ".onnx":
        from anonfw.weights import path as weight_path

        path = weight_path(str(weights))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def non_maximum_suppression(boxes: np.ndarray, scores: np.ndarray, overlap: float) -> np.ndarray:
    """Indices of the boxes to keep, best score first: (n,4), (n,) -> (k,)."""
    order = np.argsort(-scores, kind="stable")
    areas = np.prod(np.maximum(boxes[:, 2:] - boxes[:, :2], 0), axis=1)
    kept = []
    while order.size:
        best, rest = order[0], order[1:]
        kept.append(best)
        corners = np.minimum(boxes[best, 2:], boxes[rest, 2:]) - np.maximum(boxes[best, :2], boxes[rest, :2])
        shared = np.prod(np.maximum(corners, 0), axis=1)
        union = np.maximum(areas[best] + areas[rest] - shared, 1e-9)
        order = rest[shared / union <= overlap]
    return np.array(kept, np.int64)


class Detector:
    """SCRFD-500M (insightface, research-only weights).

    Args:
        weights: name in the table of weights, or an .onnx file with SCRFD's nine outputs.
        threads: onnxruntime's threads.
        overlap: boxes that share more than this intersection over union are one face.
    """

    def __init__(self, weights: str | Path = "scrfd_500m", threads: int = 1, overlap: float = 0.4):
        self.session = load_session(weights, threads)
        self.overlap = overlap
        self.input = self.session.get_inputs()[0].name
        self.outputs = [f"{kind}_{stride}" for kind in ("score", "bbox", "kps") for stride in STRIDES]
        present = {output.name for output in self.session.get_outputs()}
        missing = [name for name in self.outputs if name not in present]
        if missing:
            raise ValueError(f"{weights} is not a SCRFD detector with landmarks: no output {', '.join(missing)}")

    def detect(self, image: np.ndarray, threshold: float = 0.5) -> Faces:
        """Every face of a (h,w,3) uint8 RGB image whose score is at least `threshold`.

        Raises:
            ValueError: the image is not (h,w,3) uint8, or smaller than 16 px.
        """
        check_image(image)
        faces = None
        if max(image.shape[:2]) * (1 + 2 * BORDER) > CLOSE:
            faces = self._detect(image, threshold, LARGEST, 0.0)
        # A small picture, or a large one without a face so far: perhaps the face fills it.
        return faces if faces else self._detect(image, threshold, CLOSE, BORDER)

    def _detect(self, image: np.ndarray, threshold: float, side: int, border: float) -> Faces:
        canvas, scale, shift = letterbox(image, side, border)
        blob = (canvas.astype(np.float32).transpose(2, 0, 1)[None] - 127.5) / 128.0
        raw = [
            np.asarray(value).reshape(-1, np.shape(value)[-1])
            for value in self.session.run(self.outputs, {self.input: blob})
        ]
        boxes, points, scores = [], [], []
        for level, stride in enumerate(STRIDES):
            rows, columns = canvas.shape[0] // stride, canvas.shape[1] // stride
            ys, xs = np.mgrid[:rows, :columns]
            centres = np.repeat(np.stack([xs, ys], -1).reshape(-1, 2) * stride, ANCHORS, axis=0).astype(np.float32)
            score, box, kps = raw[level][:, 0], raw[level + 3] * stride, raw[level + 6] * stride
            found = score >= threshold
            centre = centres[found]
            boxes.append(np.concatenate([centre - box[found, :2], centre + box[found, 2:]], axis=1))
            points.append(centre[:, None] + kps[found].reshape(-1, 5, 2))
            scores.append(score[found])
        all_boxes, all_points, all_scores = np.concatenate(boxes), np.concatenate(points), np.concatenate(scores)
        kept = non_maximum_suppression(all_boxes, all_scores, self.overlap)
        all_boxes, all_points, all_scores = all_boxes[kept], all_points[kept], all_scores[kept]
        # (canvas + 0.5) = (image + 0.5) * scale + shift, with pixel centres at whole numbers on both sides.
        all_boxes = (all_boxes + 0.5 - np.tile(shift, 2)) / scale - 0.5
        all_points = (all_points + 0.5 - shift) / scale - 0.5
        order = np.argsort(-np.prod(all_boxes[:, 2:] - all_boxes[:, :2], axis=1), kind="stable")
        return Faces(
            all_boxes[order].astype(np.float32),
            all_points[order].astype(np.float32),
            all_scores[order].astype(np.float32),
        )


def letterbox(image: np.ndarray, side: int, border: float) -> tuple[np.ndarray, float, np.ndarray]:
    """The picture on a grey canvas that SCRFD can take: sides are multiples of 32.

    Args:
        image: (h,w,3) uint8.
        side: longest side of the canvas; a picture without border is only shrunk to it, never enlarged.
        border: grey on each side, as a share of the picture's longer side.
    Returns:
        canvas, scale from picture to canvas, (2,) x and y of the picture's corner in the canvas.
    """
    import cv2

    height, width = image.shape[:2]
    scale = side / (1 + 2 * border) / max(height, width)
    if not border:
        scale = min(scale, 1.0)
    new_width, new_height = max(round(width * scale), 1), max(round(height * scale), 1)
    method = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    resized = cv2.resize(image, (new_width, new_height), interpolation=method)
    canvas_width, canvas_height = (side, side) if border else (-(-new_width // 32) * 32, -(-new_height // 32) * 32)
    left, top = ((canvas_width - new_width) // 2, (canvas_height - new_height) // 2) if border else (0, 0)
    canvas = np.full((canvas_height, canvas_width, 3), 127, np.uint8)
    canvas[top : top + new_height, left : left + new_width] = resized
    return canvas, scale, np.array([left, top], np.float32)
