"""One progress line for a whole run: steps, not epochs, are what a recipe counts."""

from __future__ import annotations

import sys

import lightning
from lightning.pytorch.callbacks import ProgressBar
from tqdm import tqdm


class Progress(ProgressBar):
    """`step 120/400  loss 0.71  48 images/s`, refreshed `every` steps. Off a terminal it prints a line now and then.

    Lightning's own bars count epochs and show `-2` of them where a run is as long as its steps say.
    """

    def __init__(self, every: int = 10) -> None:
        super().__init__()
        self.every = every
        self._bar: tqdm | None = None
        self._enabled = True

    def enable(self) -> None:
        self._enabled = True

    def disable(self) -> None:
        self._enabled = False

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:  # noqa: ARG002
        quiet_place = not sys.stderr.isatty()
        self._bar = tqdm(
            desc="training",
            unit="step",
            total=trainer.max_steps if trainer.max_steps > 0 else None,
            initial=trainer.global_step,
            disable=not self._enabled or not trainer.is_global_zero,
            dynamic_ncols=not quiet_place,
            mininterval=30 if quiet_place else 0.5,
        )

    def on_train_batch_end(self, trainer: lightning.Trainer, *_: object) -> None:
        step = trainer.global_step
        if self._bar is None or step == self._bar.n or (step % self.every and step != trainer.max_steps):
            return
        self._bar.update(step - self._bar.n)
        shown = {"loss": "train/loss", "images/s": "speed/images_per_second"}
        known = trainer.callback_metrics
        self._bar.set_postfix({name: f"{known[key]:.3g}" for name, key in shown.items() if key in known}, refresh=False)

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:  # noqa: ARG002
        self._close()

    def on_exception(self, *_: object) -> None:
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def print(self, *args: object, **_: object) -> None:
        """Lightning's hook for text beside a bar."""
        tqdm.write(" ".join(map(str, args)), file=sys.stderr)
