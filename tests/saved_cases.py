"""Everything that this package saves, made small: fits, folders, checkpoints, moments and caches.

Run as a script it writes them into a folder. Two such folders are in ``tests/data`` and must always load: ``format1``
by the commit fc953d9, the last one whose files have no checksums, and ``format2`` by 0273634, the last one before the
package had rooms (``git worktree add OLD fc953d9``; copy this file into ``OLD/tests``; there
``PYTHONPATH=.:tests python tests/saved_cases.py FOLDER``).
"""

from __future__ import annotations

import logging
import sys
from functools import cache
from pathlib import Path

import lightning.pytorch as pl
import torch
from interrupted import every_batch
from tiny import Tokens, causal_model
from torchdata.stateful_dataloader import StatefulDataLoader

from fasc_lightning import CausalLMModule, FascCallback, save_compressed
from fasc_lightning.calibration import _sidecar as sidecar
from fasc_lightning.hooks import Taps
from fasc_lightning.layers import layer_shapes, select_layers
from fasc_lightning.recovery._logit_cache import LogitCache
from fasc_lightning.statistics import CalibrationMoments, save_moments
from fasc_lightning.studies.rho import backward_windows

#: Of a model whose files are a few kilobytes.
SMALL = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
BATCHES, STOP = 6, 4
TARGETS = ["q_proj", "k_proj", "down_proj"]
OPTIONS = {
    "targets": TARGETS,
    "keep": 0.6,
    "update_weights": False,
    "refit": False,
    "allocation": "fisher",
    "monitor_every_n_steps": 2,
}
TEACHER = {"teacher": "0" * 32, "temperature": 2.0}
TOP_K = 8


class Killed(pl.Callback):
    """Ends the fit before a batch, as a killed process does: nothing more is saved."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == STOP:
            raise InterruptedError


def small_module() -> CausalLMModule:
    return CausalLMModule(causal_model(**SMALL).train(), learning_rate=1e-3)


def loader():
    return StatefulDataLoader(Tokens(samples=2 * BATCHES), batch_size=2, shuffle=True)


def trainer(folder, *callbacks, **options):
    return pl.Trainer(
        callbacks=list(callbacks),
        **{
            "accelerator": "cpu",
            "max_epochs": 1,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": folder,
            **options,
        },
    )


def fit(folder, *callbacks, ckpt_path=None, **options):
    """Fit the small module, from its start or from a checkpoint; return it and the callback."""
    torch.manual_seed(1)
    callback = FascCallback(**{**OPTIONS, **options})
    module = small_module()
    torch.manual_seed(2)
    trainer(folder, callback, *callbacks, enable_checkpointing=True).fit(module, loader(), ckpt_path=ckpt_path)
    return module, callback


def save_interrupted(folder: Path, beside: bool) -> Path:
    """Write a checkpoint of a calibration that was killed, with its statistics in it or beside it."""
    before, sidecar.SIDECAR_BYTES = sidecar.SIDECAR_BYTES, 0 if beside else 2**30
    try:
        fit(folder, every_batch(folder), Killed())
    except InterruptedError:
        pass
    finally:
        sidecar.SIDECAR_BYTES = before
    return folder / "last.ckpt"


def small_moments(needs=("plain", "coupled")) -> CalibrationMoments:
    model = causal_model(**SMALL).requires_grad_(False)
    layers = select_layers(model, TARGETS)
    moments = CalibrationMoments(layer_shapes(layers), torch.float32, needs=needs)
    windows = torch.randint(3, 64, (3, 16), generator=torch.Generator().manual_seed(1))
    for _ in backward_windows(model, Taps(layers, moments), windows):
        pass
    return moments


def batch():
    return {key: torch.stack([Tokens()[i][key] for i in range(2)]) for key in ("input_ids", "labels")}


def no_mask(batch):
    return None


def save_cache(folder: Path) -> LogitCache:
    """Write a teacher's predictions of one batch."""
    cache = LogitCache(folder, TEACHER, no_mask, TOP_K)
    logits = torch.randn(2 * 16, 64, generator=torch.Generator().manual_seed(3))
    cache.put(batch(), None, logits, TEACHER["temperature"])
    cache.flush()
    return cache


@cache
def finished():
    """A module that a fit has compressed, its callback and its Trainer."""
    module, callback = small_module(), FascCallback(**OPTIONS)
    made = trainer(".", callback)
    made.fit(module, loader())
    return module, callback, made


def main(target: Path) -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    save_interrupted(target / "calibration", beside=False)
    save_interrupted(target / "beside", beside=True)
    module, callback, made = finished()
    made.save_checkpoint(target / "compressed.ckpt", weights_only=False)
    save_compressed(module.model, target / "folder", report=callback.report)
    save_moments(small_moments(), target / "moments.safetensors", "source")
    save_cache(target / "teacher")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
