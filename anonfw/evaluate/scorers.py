"""The networks that measure: a recogniser as judge, a face detector, and estimators of pose and expression.

Every distinct image is measured once: results are kept in memory under a hash of its pixels. So the originals, and the
photos that the "random other face" reference shows, cost nothing the second time.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections import defaultdict
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Lock

import numpy as np
import torch
from torch import Tensor

from anonfw import weights as weights_table
from anonfw.detect import load_session
from anonfw.errors import AnonfwError
from anonfw.evaluate.protocols import face_ellipse
from anonfw.identity import Recognizer, embed_aligned, open_recognizer

POSE = ("yaw", "pitch", "roll")
EXPRESSION = ("mouth_open", "smile", "eye_open", "brow_raise")


class JudgeError(AnonfwError):
    """The recogniser that should judge had a part in what it would judge."""


def refuse_own_judge(judge_name: str, judge_sha256: str, system_names: Collection[str]) -> None:
    """Refuse a judge that conditioned or trained the system: its score would say nothing about other recognisers.

    Args:
        system_names: names or sha256 of every recogniser that conditioned or trained the system.
    Raises:
        JudgeError: the judge is among them.
    """
    own = {name.lower() for name in system_names}
    if judge_name.lower() in own or judge_sha256.lower() in own:
        raise JudgeError(
            f"the recogniser {judge_name!r} conditioned or trained this system, so it must not judge it; "
            "choose another with evaluation.judge=..."
        )


def open_judge(judge: str | Recognizer, device: str | torch.device) -> Recognizer:
    """The recogniser of a row of the weights table, on its device; on a CPU through onnxruntime where that is faster.

    Raises:
        WeightsError: no such row, or its file cannot be had.
    """
    if isinstance(judge, str):
        fast = torch.device(device).type == "cpu" and weights_table.weight(judge).file.endswith(".onnx")
        judge = SessionRecognizer(judge) if fast else open_recognizer(judge)
    return judge.to(device)


@dataclass
class Measured:
    """Measurements of B images.

    Attributes:
        embedding: (B,D) float32, unit norm, by the judge.
        detected: (B,) bool, a face was found where the face is expected.
        score: (B,) float32, the detector's score of that face; 0 where none was found.
        factors: name -> (B,) float64 pose (degrees) and expression; NaN where no face was found or none was asked for.
    """

    embedding: np.ndarray
    detected: np.ndarray
    score: np.ndarray
    factors: dict[str, np.ndarray] = field(default_factory=dict)

    def table(self, names: tuple[str, ...]) -> np.ndarray:
        """(B,len(names)) of those factors."""
        return np.stack([self.factors[name] for name in names], -1)


class Scorers:
    """Judge, detector and attribute estimators behind one call.

    The judge always sees the fixed aligned crop (the attacker keeps the alignment of the source), whether or not a
    face is detected in the output. A face counts as detected when the detector's score is at least `threshold` and the
    centre of the box lies in the fixed face ellipse. Pose and expression are measured on the detected landmarks.

    Args:
        judge: recogniser of `anonfw.identity`.
        detector: `detect(image uint8 (h,w,3), threshold) -> Faces`.
        attributes: `measure(image uint8 (h,w,3), landmarks (5,2)) -> dict`.
        alignment: crop of the images that will be measured.
        threshold: detection threshold.
        batch_size: images per forward pass of the judge.
        device: of the judge; detector and estimators run on the CPU.
        threads: images that are looked at at a time; None for one a core.
    """

    def __init__(
        self,
        judge: Recognizer,
        detector: object,
        attributes: object,
        alignment: str = "portrait",
        threshold: float = 0.5,
        batch_size: int = 64,
        device: str | torch.device = "cpu",
        threads: int | None = None,
    ):
        self.threads = threads or os.cpu_count() or 1
        self.lock = Lock()
        self.judge = judge.to(device)
        self.detector, self.attributes = detector, attributes
        self.alignment, self.threshold, self.batch_size, self.device = alignment, threshold, batch_size, device
        self.seconds: dict[str, float] = defaultdict(float)
        self.images: dict[str, int] = defaultdict(int)
        self._embeddings: dict[bytes, np.ndarray] = {}
        self._faces: dict[bytes, tuple[float, np.ndarray] | None] = {}
        self._factors: dict[bytes, dict[str, float]] = {}

    def embed(self, images: Tensor) -> np.ndarray:
        """(B,D) float32 unit-norm embeddings of (B,3,H,W) uint8 images by the judge."""
        array = images.cpu().numpy()
        keys = _hashes(array)
        new = list({key: row for row, key in enumerate(keys) if key not in self._embeddings}.values())
        for start in range(0, len(new), self.batch_size):
            self._run_judge(array, keys, new[start : start + self.batch_size])
        return np.stack([self._embeddings[key] for key in keys])

    def measure(self, images: Tensor, attributes: bool = True) -> Measured:
        """Measure (B,3,H,W) uint8 images; `attributes=False` leaves pose and expression out (they cost most)."""
        array = images.cpu().numpy()
        keys = _hashes(array)
        pictures = {key: np.ascontiguousarray(image.transpose(1, 2, 0)) for key, image in zip(keys, array, strict=True)}
        with ThreadPoolExecutor(self.threads) as pool:
            list(pool.map(lambda item: self._look(*item, attributes), pictures.items()))
        faces = [self._faces[key] for key in keys]
        known = [self._factors.get(key, {}) if attributes else {} for key in keys]
        return Measured(
            self.embed(images),
            np.array([face is not None for face in faces]),
            np.array([face[0] if face is not None else 0.0 for face in faces], np.float32),
            {name: np.array([values.get(name, np.nan) for values in known]) for name in POSE + EXPRESSION},
        )

    def cost(self) -> dict[str, float]:
        """Milliseconds per image of each scorer so far."""
        return {name: 1000 * self.seconds[name] / self.images[name] for name in sorted(self.images)}

    @torch.inference_mode()
    def _run_judge(self, array: np.ndarray, keys: list[bytes], rows: list[int]) -> None:
        with self._timed("judge", len(rows)):
            pixels = torch.from_numpy(array[rows]).to(self.device).float().div_(127.5).sub_(1.0)
            embedding = embed_aligned(self.judge, pixels, self.alignment).float().cpu().numpy()
        self._embeddings.update(zip([keys[row] for row in rows], embedding, strict=True))

    def _look(self, key: bytes, picture: np.ndarray, attributes: bool) -> None:
        """Detect, and estimate pose and expression of the face, unless that is known already."""
        if key not in self._faces:
            with self._timed("detector"):
                self._faces[key] = self._detect(picture)
        face = self._faces[key]
        if attributes and face is not None and key not in self._factors:
            with self._timed("attributes"):
                measured = self.attributes.measure(picture, face[1])
            self._factors[key] = {name: float(measured[name]) for name in POSE + EXPRESSION}

    def _detect(self, picture: np.ndarray) -> tuple[float, np.ndarray] | None:
        """Score and (5,2) landmarks of the best face whose box is centred inside the face ellipse."""
        faces = self.detector.detect(picture, self.threshold)
        size = picture.shape[0]
        ellipse = face_ellipse(size, self.alignment)
        best = None
        for box, points, score in zip(faces.boxes, faces.landmarks, faces.scores, strict=True):
            x, y = (round(float(v)) for v in ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2))
            inside = 0 <= x < size and 0 <= y < size and ellipse[y, x]
            if inside and (best is None or score > best[0]):
                best = (float(score), np.asarray(points))
        return best

    def _timed(self, name: str, images: int = 1) -> _Timed:
        return _Timed(self, name, images)


def _hashes(array: np.ndarray) -> list[bytes]:
    return [hashlib.blake2b(np.ascontiguousarray(image), digest_size=16).digest() for image in array]


class SessionRecognizer(Recognizer):
    """A recogniser of the weights table through onnxruntime: the same numbers, on a CPU about twice as fast as the
    torch module of `anonfw.identity`, without gradients. Images go one by one (EdgeFace's exported graph holds a batch
    of one), several at a time.

    Args:
        weights: a name of the weights table.
        threads: images at a time; None for one a core.
    Raises:
        WeightsError: no such weight.
    """

    def __init__(self, weights: str, threads: int | None = None):
        super().__init__()
        self.threads = threads or os.cpu_count() or 1
        row = weights_table.weight(weights)
        self.name, self.licence, self.sha256 = row.name, row.licence, row.sha256
        self.session = load_session(weights, 1)
        self.size = self.session.get_inputs()[0].shape[2]
        self.dim = self.session.get_outputs()[0].shape[1]

    def embed(self, images: Tensor) -> Tensor:
        name = self.session.get_inputs()[0].name
        array = images.float().cpu().numpy()
        with ThreadPoolExecutor(self.threads) as pool:
            rows = list(pool.map(lambda image: self.session.run(None, {name: image[None]})[0], array))
        return torch.from_numpy(np.concatenate(rows))


class _Timed:
    def __init__(self, scorers: Scorers, name: str, images: int):
        self.scorers, self.name, self.images = scorers, name, images

    def __enter__(self) -> None:
        self.start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        spent = time.perf_counter() - self.start
        with self.scorers.lock:
            self.scorers.seconds[self.name] += spent
            self.scorers.images[self.name] += self.images
