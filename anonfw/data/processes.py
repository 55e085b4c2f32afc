"""Which of several processes this one is, for work that is shared out before torch.distributed exists."""

from __future__ import annotations

import os

# What torchrun sets, and what srun sets in each task of a step (an sbatch script itself is no task of one).
LAUNCHERS = (("RANK", "WORLD_SIZE", "LOCAL_RANK"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"))


def place() -> tuple[int, int]:
    """(rank, world) of this process, as torchrun or srun started it; (0, 1) for one that was started alone."""
    for rank, world, _ in LAUNCHERS:
        if rank in os.environ and world in os.environ:
            return int(os.environ[rank]), int(os.environ[world])
    return 0, 1


def device() -> str:
    """The device of this process: its own of the machine's GPUs, or the CPU."""
    import torch

    if not torch.cuda.is_available():
        return "cpu"
    for rank, world, local in LAUNCHERS:
        if rank in os.environ and world in os.environ:
            return f"cuda:{int(os.environ.get(local, 0)) % torch.cuda.device_count()}"
    return "cuda"
