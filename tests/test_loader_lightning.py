"""FaceLoader as Lightning's train dataloader: a resumed run sees exactly the batches of an uninterrupted one."""

from __future__ import annotations

from pathlib import Path

import lightning as L
import pytest
import tiny_dataset as tiny
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from anonfw.data.loader import FaceLoader

pytestmark = pytest.mark.filterwarnings("ignore:.*")  # Lightning advises on logging intervals and the like


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    return tiny.write(tmp_path_factory.mktemp("lightning") / "tiny", 17, 5, [3, 1, 4, 2], 8)


class Watcher(L.LightningModule):
    """Writes down the batches that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen: list[tuple] = []
        self.validated: list[tuple] = []

    def training_step(self, batch, batch_idx):
        self.seen.append((batch_idx, tuple(batch.key), tuple(batch.partner.key), int(batch.image.sum())))
        return (self.weight * batch.pixels().mean()).sum()

    def validation_step(self, batch, batch_idx):
        self.validated.append(tuple(batch.key))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(
    dataset: Path, folder: Path, max_steps: int, resume: Path | None = None, workers: int = 0, **trainer
) -> Watcher:
    model = Watcher()
    train = FaceLoader(dataset, "train", 6, mode="pairs", flip=0.5, workers=workers)
    train_images = FaceLoader(dataset, "val", 4, shuffle=False, workers=0)
    saver = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1, save_weights_only=False)
    made = L.Trainer(
        max_steps=max_steps,
        max_epochs=-1,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[saver],
        **{"num_sanity_val_steps": 0, **trainer},
    )
    made.fit(model, train, train_images, ckpt_path=resume)
    train.close()
    return model


@pytest.mark.parametrize(
    "trainer",
    [{}, {"limit_val_batches": 0}, {"limit_train_batches": 4}, {"val_check_interval": 2}, {"num_sanity_val_steps": 1}],
    ids=["validated", "no validation", "short epochs", "validated inside", "sanity check"],
)
def test_resumed_run_sees_the_batches_of_an_uninterrupted_one(dataset: Path, tmp_path: Path, trainer: dict):
    steps = 15
    whole = fit(dataset, tmp_path / "whole", steps, **trainer)
    assert len(whole.seen) == steps
    assert len({keys for _, keys, _, _ in whole.seen}) == steps
    for stop in (1, 3, 6, 7, 8, 14):  # six batches an epoch
        resumed = fit(dataset, tmp_path / f"from {stop}", steps, tmp_path / "whole" / f"step={stop}.ckpt", **trainer)
        found, expected = resumed.seen, whole.seen[stop:]
        if "limit_train_batches" in trainer:  # cuts the stream, not the loader's epochs: Lightning's numbers differ
            found, expected = [row[1:] for row in found], [row[1:] for row in expected]
        assert found == expected, f"resumed after step {stop}"


def test_resume_with_worker_processes_and_weights_only(dataset: Path, tmp_path: Path):
    whole = fit(dataset, tmp_path / "whole", 10)
    checkpoint = tmp_path / "whole" / "step=4.ckpt"
    state = torch.load(checkpoint, weights_only=True)["loops"]["fit_loop"]["state_dict"]["combined_loader"]
    assert [each["position"] for each in state] == [24]
    assert fit(dataset, tmp_path / "again", 10, checkpoint, workers=2).seen == whole.seen[4:]


def test_a_validation_pass_is_the_same_each_time(dataset: Path, tmp_path: Path):
    model = fit(dataset, tmp_path, 14, limit_val_batches=2)
    assert model.validated[:2] == model.validated[2:] and len(model.validated) == 4
