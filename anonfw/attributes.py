"""Measured properties of a face: head pose (WHENet), 106 landmarks and what mouth, eyes and brows do, brightness.

WHENet's convention was found by mirroring faces (docs/synthetic_people.md): RGB, ImageNet mean and standard deviation,
channels last, 224 px, the face's box as a square without margin. The sign of yaw is turned here, so that all can
be read off the picture: `yaw` > 0 looks to the image's right, `pitch` > 0 looks up, `roll` > 0 is tilted clockwise.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from anonfw.align import similarity, template, transform_points, warp
from anonfw.detect import check_image, load_session

FACTORS = ("yaw", "pitch", "roll", "mouth_open", "smile", "eye_open", "brow_raise", "brightness")
IMAGENET_MEAN = np.array([0.485, 0.456, 0.406], np.float32)
IMAGENET_STD = np.array([0.229, 0.224, 0.225], np.float32)
POSE_SIZE = 224
# The detector's box in a 112 px portrait crop, as a square: centre x, centre y, half side.
HEAD_BOX = (56.0, 61.0, 46.0)
# Indices of insightface's 106 points (x to the right in the image).
MOUTH_CORNERS, INNER_LIPS = (52, 61), (62, 60)
EYES = ((35, 39, 40, 33), (93, 89, 94, 87))  # outer corner, inner corner, upper lid, lower lid
BROWS = (slice(43, 52), slice(97, 106))


class Attributes:
    """Head pose and expression of one face at a time.

    Args:
        pose_weights, landmark_weights: names in the table of weights, or .onnx files.
        threads: onnxruntime's threads.
    """

    def __init__(
        self, pose_weights: str | Path = "head_pose", landmark_weights: str | Path = "landmarks_106", threads: int = 1
    ):
        self.pose_session = load_session(pose_weights, threads)
        self.landmark_session = load_session(landmark_weights, threads)

    def measure(self, image: np.ndarray, landmarks5: np.ndarray) -> dict[str, float]:
        """All of `FACTORS`.

        Args:
            image: (h,w,3) uint8 RGB.
            landmarks5: (5,2) pixels of `image`.
        Returns:
            yaw, pitch, roll in degrees; mouth_open, smile, eye_open, brow_raise dimensionless and scale-free (larger
            is more open, more smiling, more raised); brightness in [0,1], mean luma between brows and upper lip.
        Raises:
            ValueError: unusable image or landmarks.
        """
        check_image(image)
        landmarks5 = np.asarray(landmarks5, np.float64)
        if landmarks5.shape != (5, 2):
            raise ValueError(f"landmarks of shape {landmarks5.shape}, expected (5,2): eyes, nose tip, mouth corners")
        yaw, pitch, roll = self.pose(image, landmarks5)
        return {
            "yaw": yaw,
            "pitch": pitch,
            "roll": roll,
            **expression(self.landmarks(image, landmarks5)),
            "brightness": brightness(image, landmarks5),
        }

    def pose(self, image: np.ndarray, landmarks5: np.ndarray) -> tuple[float, float, float]:
        """Yaw, pitch and roll in degrees."""
        matrix = similarity(landmarks5, template("portrait", 112))
        scale = np.sqrt(np.linalg.det(matrix[:, :2]))
        inverse = np.linalg.inv(np.vstack([matrix, [0, 0, 1]]))[:2]
        centre = transform_points(np.array(HEAD_BOX[:2]), inverse)
        # Upright square (no rotation: roll is to be measured), enlarged to the network's input.
        zoom = scale * POSE_SIZE / (2 * HEAD_BOX[2])
        upright = np.concatenate([np.eye(2) * zoom, (POSE_SIZE / 2 - zoom * centre)[:, None]], axis=1)
        crop = warp(image, upright, POSE_SIZE)
        blob = ((crop.astype(np.float32) / 255 - IMAGENET_MEAN) / IMAGENET_STD)[None]
        angles = self.pose_session.run(["yaw", "pitch", "roll"], {"face": blob})
        yaw, pitch, roll = (float(np.ravel(angle)[0]) for angle in angles)
        return -yaw, pitch, roll

    def landmarks(self, image: np.ndarray, landmarks5: np.ndarray) -> np.ndarray:
        """(106,2) points in pixels of `image`."""
        matrix = similarity(landmarks5, template("portrait", 192))
        crop = warp(image, matrix, 192, border="constant")
        blob = crop.astype(np.float32).transpose(2, 0, 1)[None]
        points = (self.landmark_session.run(None, {"data": blob})[0].reshape(-1, 2) + 1) * 96
        inverse = np.linalg.inv(np.vstack([matrix, [0, 0, 1]]))[:2]
        return transform_points(points, inverse)


def expression(points: np.ndarray) -> dict[str, float]:
    """mouth_open, smile, eye_open and brow_raise of (106,2) landmarks, free of scale, place and tilt."""
    outer, inner, upper, lower = (np.stack([points[eye[k]] for eye in EYES]) for k in range(4))
    eyes = (outer + inner) / 2
    axis = eyes[1] - eyes[0]
    between_eyes = np.linalg.norm(axis)
    axis = axis / between_eyes
    down = np.array([-axis[1], axis[0]])
    corners, lips = points[list(MOUTH_CORNERS)], points[list(INNER_LIPS)]
    height = abs((corners.mean(0) - eyes.mean(0)) @ down)  # eyes to mouth: little changed by yaw
    lift = (lips.mean(0) - corners.mean(0)) @ down / height
    lids = np.linalg.norm(upper - lower, axis=1) / np.linalg.norm(outer - inner, axis=1)
    brows = np.mean([points[brow].mean(0) for brow in BROWS], axis=0)
    return {
        "mouth_open": float(abs((lips[1] - lips[0]) @ down) / height),
        "smile": float(np.linalg.norm(corners[1] - corners[0]) / between_eyes + lift),
        "eye_open": float(lids.mean()),
        "brow_raise": float((eyes.mean(0) - brows) @ down / height),
    }


def brightness(image: np.ndarray, landmarks5: np.ndarray) -> float:
    """Mean luma (BT.601) in [0,1] of the inner face, from between the brows to the upper lip."""
    crop = warp(image, similarity(landmarks5, template("arcface", 112)), 112)[46:92, 34:78]
    return float((crop.reshape(-1, 3) @ np.array([0.299, 0.587, 0.114])).mean() / 255)
