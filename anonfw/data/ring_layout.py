"""The memory that the parent and its decoding processes share: equal slots of jobs, answers and pixels."""

from __future__ import annotations

import mmap
from dataclasses import dataclass

import numpy as np

from anonfw.data.decode import JOB_WIDTH

PAGE = 4096


def _pages(size: int) -> int:
    return -(-size // PAGE) * PAGE


@dataclass(frozen=True)
class Layout:
    """`slots` slots, each for at most `rows` pictures that take `pixel_bytes` together."""

    slots: int
    rows: int
    pixel_bytes: int

    @property
    def slot_bytes(self) -> int:
        return _pages(self.rows * JOB_WIDTH * 8) + _pages(self.rows) + _pages(self.pixel_bytes)

    def views(self, ring: np.ndarray, slot: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """jobs (rows,6) int64, status (rows,) uint8, pixels (pixel_bytes,) uint8 of a slot. No copies."""
        start = slot * self.slot_bytes
        status = start + _pages(self.rows * JOB_WIDTH * 8)
        pixels = status + _pages(self.rows)
        jobs = ring[start : start + self.rows * JOB_WIDTH * 8].view(np.int64).reshape(self.rows, JOB_WIDTH)
        return jobs, ring[status : status + self.rows], ring[pixels : pixels + self.pixel_bytes]


def map_ring(descriptor: int, layout: Layout) -> np.ndarray:
    """The whole ring as flat uint8, shared with every process that maps the same descriptor."""
    return np.frombuffer(mmap.mmap(descriptor, layout.slots * layout.slot_bytes), np.uint8)
