"""A frozen calibration under the strategy and number of devices given; each process saves what it ended with.

Run as a script, by each process of a group.
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import lightning.pytorch as pl
import torch
import torchmetrics
from inside import moments_of
from tiny import causal_module, token_loader

from fasc_lightning import FascCallback


class Saving(FascCallback):
    """Saves moments and weights of every process."""

    def on_fit_end(self, trainer, pl_module):
        moments = copy.deepcopy(moments_of(self))
        super().on_fit_end(trainer, pl_module)
        layers = {name: vars(moments.layer(name)) for name in list(moments.shapes)}
        ranks = {row.name: row.rank for row in self.report.layers}
        rhos = {row.name: row.rho_debiased for row in self.report.layers}
        content = {"moments": layers, "ranks": ranks, "rhos": rhos, "state": pl_module.state_dict()}
        content["refit"] = self.report.refit
        torch.save(content, Path(sys.argv[3]) / f"{sys.argv[2]}-{trainer.global_rank}.pt")


def refuse_gathering(*args, **kwargs):
    raise AssertionError("statistics must be all-reduced, not gathered")


def main() -> None:
    torchmetrics.metric.gather_all_tensors = refuse_gathering
    devices, fraction = int(sys.argv[1]), float(sys.argv[4])
    module = causal_module()
    # More than one batch a process, of unequal padding; two samples a batch, so that halves are whole batches.
    loader = token_loader(batch_size=2, samples=16, length=24, padded=True)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[
            Saving(
                rank=0.5,
                update_weights=False,
                token_fraction=fraction,
                allocation=sys.argv[5],
                refit=sys.argv[6] == "True",
            )
        ],
    )
    trainer.fit(module, loader)


if __name__ == "__main__":
    main()
