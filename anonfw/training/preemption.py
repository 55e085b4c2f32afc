"""A run that is asked to stop saves itself between two optimizer steps and says that it can go on."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import lightning
import torch

from anonfw.data.files import write_json
from anonfw.errors import AnonfwError
from anonfw.training import signals

FILE = "stopped.json"


class Stopped(AnonfwError):
    """The run was asked to stop and has saved itself: the same command continues it."""

    exit_code = 75  # EX_TEMPFAIL


class Preemption(lightning.Callback):
    """Ends a run on SIGUSR1 (SLURM, before a time limit) or SIGTERM (preemption, scancel) with a checkpoint.

    Lightning saves inside the signal handler, where a rank may be in the middle of a step or of a collective. Here the
    handler only notes the signal; after each optimizer step the ranks agree whether any of them has got one.

    Args:
        folder: the run folder; `stopped.json` in it tells the job script the signal and the step.
    """

    def __init__(self, folder: str | Path) -> None:
        self.file = Path(folder) / FILE
        self._before: dict[signal.Signals, object] = {}
        self._step = -1
        self._stopping = 0

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:  # noqa: ARG002
        """Takes the signals over: Lightning has registered its own handlers just before."""
        self._step = trainer.global_step
        if trainer.is_global_zero:
            self.file.unlink(missing_ok=True)
        self._before = signals.listen(signal.SIGUSR1, signal.SIGTERM)

    def on_train_batch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, *_: object) -> None:
        if trainer.global_step == self._step:
            return  # still accumulating gradients
        self._step = trainer.global_step
        number = signals.received
        if trainer.world_size > 1:
            there = torch.tensor(float(number), device=pl_module.device)
            number = int(trainer.strategy.reduce(there, reduce_op="max").item())
        if number:
            self._stopping = number
            for checkpoint in trainer.checkpoint_callbacks:
                checkpoint.save(trainer)

    # The step's row of metrics is written between these hooks.

    def on_train_batch_start(self, trainer: lightning.Trainer, *_: object) -> None:
        self._stop(trainer)

    def on_validation_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:  # noqa: ARG002
        self._stop(trainer)

    def _stop(self, trainer: lightning.Trainer) -> None:
        if not self._stopping:
            return
        for checkpoint in trainer.checkpoint_callbacks:
            checkpoint.commit(trainer)
        trainer.strategy.barrier("anonfw-stopped")  # nobody leaves before all have written
        name = signal.Signals(self._stopping).name
        if trainer.is_global_zero:
            when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
            write_json(self.file, {"signal": name, "step": trainer.global_step, "time": when})
        raise Stopped(f"stopped by {name} at step {trainer.global_step}, and saved: the same command continues")

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:  # noqa: ARG002
        self._release()

    def on_exception(self, *_: object) -> None:
        self._release()

    def _release(self) -> None:
        signals.forget()  # one that came in the last step: another training of this process is not meant
        signals.restore(self._before)
        self._before = {}
