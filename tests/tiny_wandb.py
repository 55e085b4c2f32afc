"""Rows of a small training, for the loggers; as a program: log eight of them into FOLDER and fall to a kill -9."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterable, Sequence

from lightning.pytorch.loggers import Logger

from anonfw.training.loggers import JsonLines, Wandb


def log(loggers: Sequence[Logger], steps: Iterable[int]) -> None:
    """A row a step, a validation after every other one."""
    for step in steps:
        for logger in loggers:
            logger.log_metrics({"train/loss": 1 / (step + 1)}, step)
            if step % 2:
                logger.log_metrics({"val/loss": 2.0 + step}, step)


if __name__ == "__main__":
    both = [JsonLines(sys.argv[1]), Wandb(sys.argv[1])]
    for each in both:
        each.rewind(0)
    log(both, range(8))
    os.kill(os.getpid(), signal.SIGKILL)
