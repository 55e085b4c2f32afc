"""A person that does not exist, photographed: generator, detector, estimators and recognisers in one object.

A style is (8,512): one row of 512 numbers for each level of the generator, from 4 px (row 0) to 512 px (row 7).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from anonfw.align import similarity, template, transform_points, warp, window_to_arcface

DIRECTIONS = Path(__file__).with_name("synthetic_directions.npz")
SIZE = 112
JPEG_QUALITY = 85
RECOGNISERS = ("arcface_mbf", "edgeface_s")
LAYERS = 8  # style inputs, from 4 px to 512 px
LOWEST_SCORE = 0.62  # detector; artefacts and odd framings score lower
SECOND_FACE = 0.25  # anything at the margin that looks so much like a face is a half-made neighbour
# Cosines of (ArcFace MobileFaceNet, EdgeFace-S), chosen from the distributions in docs/synthetic_people.md.
SAME_AS_BASE = np.array([0.45, 0.50])
SAME_AS_CENTRE = np.array([0.62, 0.66])
COLLISION = np.array([0.50, 0.60])
# Which layers of the generator a direction is applied to: those with the best gain for the identity that it costs.
MOVED = {"yaw": (0, 1, 2), "pitch": (0, 1, 2), "mouth_open": (0, 1, 2, 3), "smile": (1, 2, 3), "eye_open": (2, 3, 4)}
SPREAD = {"yaw": 1.05, "pitch": 0.8, "mouth_open": 1.3, "smile": 1.0, "eye_open": 1.0}  # in standard deviations
LONGEST_MOVE = 2.2
TRUNCATION, OTHER_TRUNCATION = (0.7, 0.95), 0.75  # of people, and of whom the fine layers come from
# Levels from 128 px on carry light and colours: somebody else's cost a cosine of .1, with the level below .3.
FINE, MIDDLE = (5, 6, 7), 4
FINE_SHARE, MIDDLE_SHARE = (0.6, 1.0), (0.0, 0.35)
SWING, CYCLES = (0.5, 1.2), (0.5, 1.5)  # of a clip: amplitude in spreads, and how often a factor goes to and fro
EXTRA_PHOTOS = 2  # tried beyond those asked for before a person is given up


class Generator:
    """MobileStyleGAN: `style` (8,512) -> (512,512,3) uint8 RGB.

    The graph is cut at the low band of its last inverse wavelet transform, which is the image at half size, and each
    of its eight levels gets a style input of its own.
    """

    def __init__(self, threads: int):
        import openvino
        from openvino import opset13

        from anonfw.weights import path

        core = openvino.Core()
        mapping = core.read_model(path("style_mapping_xml"), path("style_mapping_bin"))
        graph = core.read_model(path("style_synthesis_xml"), path("style_synthesis_bin"))
        settings = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
        self.mapping = core.compile_model(mapping, "CPU", settings)
        inputs = [opset13.parameter([1, 512], np.float32, name=f"style_{level}") for level in range(LAYERS)]
        for user in list(graph.input(0).get_target_inputs()):
            node = user.get_node()
            level = 0
            if node.get_type_name() == "MatMul":
                weight = node.input(1).get_source_output().get_node().get_friendly_name()
                level = 0 if weight.startswith("m.conv1") else 1 + int(weight.split(".")[2])
            user.replace_source_output(inputs[level].output(0))
        band = next(node for node in graph.get_ordered_ops() if node.get_friendly_name() == "Slice_764/Split")
        half = opset13.multiply(band.output(0), opset13.constant(np.float32(0.5)))
        self.synthesis = core.compile_model(openvino.Model([half.output(0)], inputs, "half"), "CPU", settings)

    def style(self, rng: np.random.Generator) -> np.ndarray:
        """(512,) style of a random person, not truncated."""
        return self.mapping([rng.standard_normal((1, 512)).astype(np.float32)])[0][0].astype(np.float64)

    def render(self, style: np.ndarray) -> np.ndarray:
        style = np.asarray(style, np.float32)
        image = self.synthesis([style[level : level + 1] for level in range(LAYERS)])[0][0]
        return np.clip((image.transpose(1, 2, 0) + 1) * 127.5 + 0.5, 0, 255).astype(np.uint8)


@dataclass
class Photo:
    """One aligned photograph: JPEG bytes, its five points, measured factors and the recognisers' vectors (2,512)."""

    jpeg: bytes
    landmarks: np.ndarray
    factors: dict[str, float]
    vectors: np.ndarray


class Studio:
    """Renders, detects, aligns, measures and recognises; one per process."""

    def __init__(self, threads: int = 1):
        from anonfw.attributes import Attributes
        from anonfw.detect import Detector, load_session

        self.generator = Generator(threads)
        self.detector = Detector(threads=threads)
        self.attributes = Attributes(threads=threads)
        self.recognisers = [load_session(name, threads) for name in RECOGNISERS]

    @cached_property
    def fitted(self) -> dict[str, np.ndarray]:
        """Arrays of data/synthetic_directions.npz."""
        with np.load(DIRECTIONS) as file:
            return dict(file)

    def direction(self, name: str) -> np.ndarray:
        """(512,) move of a style that changes a factor by one standard deviation."""
        return self.fitted["directions"][list(self.fitted["names"]).index(name)]

    def predict(self, name: str, style: np.ndarray) -> float:
        """Factor of a (512,) style in standard deviations, by a linear fit."""
        return self.fitted["predictors"][list(self.fitted["names"]).index(name)] @ (style - self.fitted["mean"])

    def photograph(self, style: np.ndarray) -> Photo | None:
        """The face of a (8,512) style, or None where the detector is not content."""
        import cv2

        image = self.generator.render(style)
        faces = self.detector.detect(image, SECOND_FACE)
        if len(faces) != 1 or faces.scores[0] < LOWEST_SCORE:
            return None
        points = faces.landmarks[0].astype(np.float64)
        matrix = similarity(points, template("portrait", SIZE))
        crop = warp(image, matrix, SIZE)
        options = [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY, cv2.IMWRITE_JPEG_OPTIMIZE, 1]
        jpeg = cv2.imencode(".jpg", crop[..., ::-1], options)[1].tobytes()
        factors = self.attributes.measure(image, points)
        return Photo(jpeg, transform_points(points, matrix), factors, self.recognise(jpeg))

    def recognise(self, jpeg: bytes) -> np.ndarray:
        """(2,512) unit vectors of the photo as it is stored, cut out as every reader of the data set does it."""
        import cv2
        import torch

        image = cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_COLOR)[..., ::-1].astype(np.float32)
        portrait = torch.from_numpy(image / 127.5 - 1).permute(2, 0, 1)[None]
        crop = window_to_arcface(portrait, "portrait").numpy()
        vectors = [session.run(None, {session.get_inputs()[0].name: crop})[0][0] for session in self.recognisers]
        return np.stack([vector / np.linalg.norm(vector) for vector in vectors])

    def base(self, seed: int, number: int) -> tuple[np.ndarray, Photo | None]:
        """Style (512,) and first photo of candidate `number`: a random person who looks about straight ahead."""
        rng = np.random.default_rng([seed, number, 0])
        mean = self.fitted["mean"]
        style = mean + rng.uniform(*TRUNCATION) * (self.generator.style(rng) - mean)
        for name in ("yaw", "pitch"):
            style = style - np.clip(self.predict(name, style), -1.5, 1.5) * self.direction(name)
        return style, self.photograph(np.repeat(style[None], LAYERS, axis=0))

    def moved(self, style: np.ndarray, amounts: dict[str, float]) -> np.ndarray:
        """(8,512): a (512,) style after moves along the directions, in standard deviations, `LONGEST_MOVE` at most."""
        length = np.sqrt(sum(amount**2 for amount in amounts.values()))
        shrink = min(1.0, LONGEST_MOVE / max(length, 1e-9))
        moved = np.repeat(style[None], LAYERS, axis=0)
        for name, amount in amounts.items():
            moved[list(MOVED[name])] += shrink * amount * self.direction(name)
        return moved

    def moment(self, style: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """(8,512) style of another moment of the person."""
        amounts = {name: rng.normal(0, spread) for name, spread in SPREAD.items()}
        amounts["mouth_open"] = abs(amounts["mouth_open"])
        moved = self.moved(style, amounts)
        mean = self.fitted["mean"]
        other = mean + OTHER_TRUNCATION * (self.generator.style(rng) - mean)
        moved[list(FINE)] += rng.uniform(*FINE_SHARE) * (other - moved[list(FINE)])
        moved[MIDDLE] += rng.uniform(*MIDDLE_SHARE) * (other - moved[MIDDLE])
        return moved

    def photos(self, seed: int, number: int, first: Photo, style: np.ndarray, count: int) -> list[Photo]:
        """Up to `count` photos of one person, every one near the first and near their common centre."""
        photos = [first]
        for attempt in range(1, count + EXTRA_PHOTOS):
            if len(photos) == count:
                break
            photo = self.photograph(self.moment(style, np.random.default_rng([seed, number, attempt])))
            if photo is not None and (cosines(photo.vectors, first.vectors) >= SAME_AS_BASE).all():
                photos.append(photo)
        while len(photos) > 1:
            near = np.array([cosines(photo.vectors, centre(photos)) - SAME_AS_CENTRE for photo in photos]).min(1)
            if near.min() >= 0:
                break
            photos.pop(int(near.argmin()))
        return photos

    def clip(self, seed: int, number: int, first: Photo, style: np.ndarray, count: int) -> list[Photo]:
        """The frames of one shot: head and face move smoothly, light and background stay. [] where a frame fails."""
        frames = []
        for amounts in motion(np.random.default_rng([seed, number, 1]), count):
            photo = self.photograph(self.moved(style, amounts))
            if photo is None or (cosines(photo.vectors, first.vectors) < SAME_AS_BASE).any():
                return []
            frames.append(photo)
        return frames


def motion(rng: np.random.Generator, count: int) -> list[dict[str, float]]:
    """`count` steps of smooth to and fro along every direction, each with its own amplitude, pace and phase."""
    paths = {}
    for name, spread in SPREAD.items():
        swing, cycles, phase = spread * rng.uniform(*SWING), rng.uniform(*CYCLES), rng.uniform(0, 2 * np.pi)
        wave = np.sin(2 * np.pi * cycles * np.arange(count) / count + phase)
        paths[name] = swing * ((1 + wave) / 2 if name == "mouth_open" else wave)
    return [{name: float(path[step]) for name, path in paths.items()} for step in range(count)]


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(...,D), (...,D) unit vectors -> (...)."""
    return (a * b).sum(-1)


def centre(photos: list[Photo]) -> np.ndarray:
    """(2,512) unit mean vectors."""
    mean = np.mean([photo.vectors for photo in photos], axis=0)
    return mean / np.linalg.norm(mean, axis=-1, keepdims=True)


def collides(vectors: np.ndarray, others: list[np.ndarray]) -> bool:
    """Whether (2,512) is too near to one of `others` for either recogniser."""
    if not others:
        return False
    return bool((cosines(np.stack(others), vectors[None]).max(0) > COLLISION).any())
