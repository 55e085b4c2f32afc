"""Jobs and pixels: JPEGs at known places of mapped tars, decoded into one array that was there before.

A job is one row of int64: (tar, offset, size, mirrored, side, destination), the last one a byte offset into the pixels.
A size of -1 says that there is nothing to decode.
No torch here: worker processes import this file.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import simplejpeg

TAR, OFFSET, SIZE, MIRRORED, SIDE, DESTINATION = range(6)
JOB_WIDTH = 6
OK, UNREADABLE, BROKEN, WRONG_SIZE, KNOWN_BAD, NOT_EMBEDDED = range(6)
REASONS = {
    UNREADABLE: "lies behind the end of its tar",
    BROKEN: "its JPEG is broken",
    WRONG_SIZE: "its picture does not have the image size of the card",
    NOT_EMBEDDED: "its row of a sidecar is NaN: its picture was broken when it was embedded",
}


class Tars:
    """Tars by number, mapped when first used."""

    def __init__(self, paths: Sequence[Path | str]) -> None:
        self.paths = list(paths)
        self._maps: list[mmap.mmap | bytes | None] = [None] * len(self.paths)

    def map(self, number: int) -> mmap.mmap | bytes:
        content = self._maps[number]
        if content is None:
            try:
                with open(self.paths[number], "rb") as file:
                    content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except (OSError, ValueError):  # gone since the index was read, or empty: each of its samples is bad
                content = b""
            self._maps[number] = content
        return content


def decode(jobs: np.ndarray, status: np.ndarray, pixels: np.ndarray, tars: Tars) -> None:
    """Do all jobs.

    Args:
        jobs: (n,6) int64.
        status: (n,) uint8, written: OK or why there is no picture.
        pixels: flat uint8; a job's RGB planes (3,side,side) are written at its destination.
    """
    cv2.setNumThreads(1)
    interleaved: dict[int, np.ndarray] = {}
    mirror: dict[int, np.ndarray] = {}
    for number, (tar, offset, size, mirrored, side, destination) in enumerate(jobs.tolist()):
        if size < 0:
            status[number] = KNOWN_BAD
            continue
        content = tars.map(tar)
        if offset + size > len(content):
            status[number] = UNREADABLE
            continue
        jpeg = memoryview(content)[offset : offset + size]
        if side not in interleaved:
            interleaved[side] = np.empty((side, side, 3), np.uint8)
            mirror[side] = np.empty((side, side, 3), np.uint8)
        try:
            height, width = simplejpeg.decode_jpeg_header(jpeg)[:2]
            if (height, width) != (side, side):
                status[number] = WRONG_SIZE
                continue
            picture = simplejpeg.decode_jpeg(jpeg, colorspace="RGB", buffer=interleaved[side])
        except ValueError:  # simplejpeg's only error, also for recoverable damage such as a missing end
            status[number] = BROKEN
            continue
        if mirrored:
            picture = cv2.flip(picture, 1, mirror[side])
        planes = pixels[destination : destination + 3 * side * side].reshape(3, side, side)
        cv2.split(picture, [planes[0], planes[1], planes[2]])
        status[number] = OK
