"""Decoding in order: jobs go in, pixels come out, first in first out; inline or by worker processes over a ring.

Why processes and a ring: threads give the interpreter lock up once a picture and starve behind a busy training loop,
and a fresh tensor sent by a worker costs as much as the decoding. Here a message is four bytes, and pictures are
decoded where the parent reads them. The workers are programs of their own: nothing is forked, so they start the
same with or without CUDA, threads and a `__main__` guard.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import weakref
from collections import deque
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from anonfw.data.card import DataError
from anonfw.data.decode import DESTINATION, JOB_WIDTH, KNOWN_BAD, OK, SIZE, Tars, decode
from anonfw.data.ring_layout import Layout, map_ring
from anonfw.data.worker import NUMBER

Decoded = tuple[np.ndarray, np.ndarray]


class Inline:
    """The same interface in this process: a job is done when it is collected."""

    depth = 1

    def __init__(self, tars: Sequence[Path], rows: int, pixel_bytes: int) -> None:
        self._tars = Tars(tars)
        self._status = np.zeros(rows, np.uint8)
        self._pixels = np.zeros(pixel_bytes, np.uint8)
        self._waiting: deque[np.ndarray] = deque()

    def submit(self, jobs: np.ndarray) -> None:
        self._waiting.append(jobs)

    def collect(self) -> Decoded:
        jobs = self._waiting.popleft()
        decode(jobs, self._status[: len(jobs)], self._pixels, self._tars)
        return self._status[: len(jobs)], self._pixels

    def drain(self) -> None:
        self._waiting.clear()

    def close(self) -> None:
        self._waiting.clear()


class NoPictures(Inline):
    """Where no picture is wanted: no tar is opened, and only what the index knows is bad."""

    def __init__(self) -> None:
        super().__init__([], 0, 0)

    def collect(self) -> Decoded:
        jobs = self._waiting.popleft()
        return np.where(jobs[:, SIZE] < 0, KNOWN_BAD, OK).astype(np.uint8), self._pixels


class Ring:
    """`workers` processes; batch k is done by worker k mod `workers`, two slots each.

    Args:
        tars: the files that jobs name by number.
        rows: most jobs of a batch.
        pixel_bytes: most bytes of pixels of a batch.
    """

    def __init__(self, tars: Sequence[Path], rows: int, pixel_bytes: int, workers: int) -> None:
        self.depth = 2 * workers
        self._layout = Layout(self.depth, rows, pixel_bytes)
        total = self._layout.slots * self._layout.slot_bytes
        descriptor = _anonymous_file(total)
        order = {
            "descriptor": descriptor,
            "layout": vars(self._layout),
            "tars": [str(Path(tar).resolve()) for tar in tars],
        }
        environment = dict(os.environ, OMP_NUM_THREADS="1")
        packages = str(Path(__file__).parents[2])
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [packages, os.environ.get("PYTHONPATH")]))
        command = [sys.executable, "-m", "anonfw.data.worker"]
        self._ring = map_ring(descriptor, self._layout)
        self._workers = [
            subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                bufsize=0,
                pass_fds=(descriptor,),
                env=environment,
            )
            for _ in range(workers)
        ]
        os.close(descriptor)
        for worker in self._workers:
            self._send(worker, json.dumps(order).encode() + b"\n")
        self._submitted = self._collected = 0
        self._finalizer = weakref.finalize(self, _stop, self._workers, os.getpid())

    def submit(self, jobs: np.ndarray) -> None:
        """Give a batch to its worker. At most `depth` batches may be under way."""
        slot = self._submitted % self.depth
        table, _, _ = self._layout.views(self._ring, slot)
        table[: len(jobs)] = jobs
        table[len(jobs) :, DESTINATION] = -1
        self._send(self._workers[self._submitted % len(self._workers)], NUMBER.pack(slot))
        self._submitted += 1

    def collect(self) -> Decoded:
        """(status, pixels) of the oldest batch under way: views, valid until the next `submit`.

        Raises:
            DataError: its worker died.
        """
        slot = self._collected % self.depth
        worker = self._workers[self._collected % len(self._workers)]
        answer = worker.stdout.read(NUMBER.size)
        if answer != NUMBER.pack(slot):
            raise DataError(
                f"a decoding process ended (exit code {worker.wait(timeout=10)}); what it printed stands above. "
                "A shard that was cut while it was being read does this; workers=0 decodes in the main process."
            )
        self._collected += 1
        jobs, status, pixels = self._layout.views(self._ring, slot)
        return status[: int(np.count_nonzero(jobs[:, DESTINATION] >= 0))], pixels

    def drain(self) -> None:
        """Wait for everything under way and forget it."""
        while self._collected < self._submitted:
            self.collect()

    def close(self) -> None:
        self._finalizer()

    @staticmethod
    def _send(worker: subprocess.Popen, message: bytes) -> None:
        try:
            while message:
                message = message[worker.stdin.write(message) :]
        except BrokenPipeError as error:
            raise DataError(f"a decoding process ended early (exit code {worker.wait(timeout=10)}).") from error


def open_decoder(tars: Sequence[Path], rows: int, pixel_bytes: int, workers: int) -> Inline | Ring:
    """Inline for 0 workers, else a ring."""
    return Ring(tars, rows, pixel_bytes, workers) if workers else Inline(tars, rows, pixel_bytes)


def empty_jobs(rows: int) -> np.ndarray:
    return np.zeros((rows, JOB_WIDTH), np.int64)


def _anonymous_file(size: int) -> int:
    """A descriptor of `size` bytes of memory (Linux), or of an unlinked temporary file (elsewhere)."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("anonfw-ring")
    else:
        descriptor, name = tempfile.mkstemp(prefix="anonfw-ring")
        os.unlink(name)
    os.ftruncate(descriptor, size)
    return descriptor


def _stop(workers: list[subprocess.Popen], owner: int) -> None:
    if os.getpid() != owner:  # a forked child inherited the object, not the workers
        return
    for worker in workers:
        worker.stdin.close()
        worker.terminate()  # it holds nothing that could be lost; one that is still starting would see the end late
    for worker in workers:
        worker.wait()
        worker.stdout.close()
