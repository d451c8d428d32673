from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from fasc_lightning.batches import ResumableLoader, restore_loaders


def loader():
    return ResumableLoader(list(range(10)), batch_size=3, collate_fn=list)


def test_it_is_an_ordinary_loader_otherwise():
    found = loader()
    for _ in range(2):
        assert list(found) == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9]]
    assert found.state_dict() == {"given": 0}


def test_it_goes_on_where_another_was():
    first = iter(stopped := loader())
    assert [next(first), next(first)] == [[0, 1, 2], [3, 4, 5]]
    resumed = loader()
    resumed.load_state_dict(stopped.state_dict())
    assert resumed.state_dict() == {"given": 2}
    assert list(resumed) == [[6, 7, 8], [9]]
    assert len(list(resumed)) == 4  # the next epoch is a whole one


class Seen(pl.LightningModule):
    """Writes down the batches it is given."""

    def __init__(self, stop: int | None = None) -> None:
        super().__init__()
        self.seen, self.stop = [], stop
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def training_step(self, batch, batch_idx):
        if len(self.seen) == self.stop:
            raise RuntimeError("stopped")
        self.seen.append(batch[0])
        return self.weight**2

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(module, folder, ckpt_path=None):
    keeper = ModelCheckpoint(folder, filename="last", every_n_train_steps=1, enable_version_counter=False)
    trainer = pl.Trainer(
        max_epochs=3,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[keeper],
        accelerator="cpu",
    )
    trainer.fit(module, loader(), ckpt_path=ckpt_path)
    return module.seen


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
@pytest.mark.parametrize("stop", [2, 4, 5, 8])  # within epochs, and between two
def test_a_fit_that_is_resumed_sees_every_batch_once(tmp_path, stop):
    whole = fit(Seen(), tmp_path / "whole")
    stopped = Seen(stop)
    with pytest.raises(RuntimeError, match="stopped"):
        fit(stopped, tmp_path / "kept")
    assert stopped.seen + fit(Seen(), tmp_path / "kept", tmp_path / "kept" / "last.ckpt") == whole


class Scheduled(Seen):
    """Asks for the length of the fit before its checkpoint is read."""

    def configure_optimizers(self):
        assert self.trainer.estimated_stepping_batches == 12
        return super().configure_optimizers()

    def on_train_start(self):
        restore_loaders(self.trainer)


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_a_schedule_does_not_cost_the_place(tmp_path):
    stopped = Scheduled(6)
    with pytest.raises(RuntimeError, match="stopped"):
        fit(stopped, tmp_path)
    assert stopped.seen + fit(Scheduled(), tmp_path, tmp_path / "last.ckpt") == fit(Seen(), tmp_path / "whole")
