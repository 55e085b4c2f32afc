"""Faces in a photograph: SCRFD-500M through onnxruntime, with five points for alignment.

Coordinates are pixels of the given image, x to the right and y down, pixel centres at whole numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

STRIDES = (8, 16, 32)
ANCHORS = 2  # per cell
LARGEST = 640  # the network sees no image with a longer side ...
SMALLEST = 320  # ... and none with a shorter one: a 112 px crop is enlarged first
BORDER = 0.2  # a face that fills its crop is found better with some canvas around it
LANDMARK_106 = 106


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
        canvas, scale, shift = self._letterbox(check_image(image))
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

    @staticmethod
    def _letterbox(image: np.ndarray) -> tuple[np.ndarray, float, np.ndarray]:
        """Canvas whose sides are multiples of 32, the enlargement, and the (x,y) shift of the image in the canvas."""
        import cv2

        height, width = image.shape[:2]
        small = max(height, width) <= SMALLEST
        side = SMALLEST if small else LARGEST
        border = BORDER if small else 0.0
        scale = min(side / (1 + 2 * border) / max(height, width), 1.0 if not small else np.inf)
        new_width, new_height = max(round(width * scale), 1), max(round(height * scale), 1)
        method = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
        resized = cv2.resize(image, (new_width, new_height), interpolation=method)
        if small:
            canvas_width = canvas_height = side
        else:
            canvas_width, canvas_height = -(-new_width // 32) * 32, -(-new_height // 32) * 32
        canvas = np.full((canvas_height, canvas_width, 3), 127, np.uint8)
        left = (canvas_width - new_width) // 2 if small else 0
        top = (canvas_height - new_height) // 2 if small else 0
        canvas[top : top + new_height, left : left + new_width] = resized
        return canvas, scale, np.array([left, top], np.float32)
