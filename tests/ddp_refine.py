"""Two fits by two processes, the second of which refines; each process saves what it ended with.

Run as a script, by each process of a group.
"""

from __future__ import annotations

import sys
from pathlib import Path

import lightning.pytorch as pl
import torch
from refine_cases import Refining
from tiny import causal_module, token_loader

from fasc_lightning import FascCallback
from fasc_lightning.layers import compressed_layers
from fasc_lightning.refit import refine_figures


def make_trainer(*callbacks, **options) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        **options,
    )


def main() -> None:
    module = causal_module()
    module.learning_rate = 1e-2
    loader = token_loader(batch_size=2, samples=16)  # what is refined on, too
    # A model that has learned something: what is nearer to the dense model then loses less, as the last check wants.
    make_trainer(max_epochs=12).fit(module, loader)
    compression = FascCallback(rank=0.4, update_weights=False)
    refining = Refining(compression)
    make_trainer(compression, refining, max_epochs=1).fit(module, loader)
    with torch.no_grad():
        for layer in compressed_layers(module).values():
            for parameter in layer.parameters():
                parameter.mul_(1.3)  # so that there is much to gain
    before = {name: value.clone() for name, value in module.state_dict().items()}
    trainer = make_trainer(refining, max_epochs=1, limit_train_batches=0)
    trainer.fit(module, loader)
    report = None if refining.report is None else refine_figures(refining.report)
    content = {"before": before, "state": module.state_dict(), "report": report}
    torch.save(content, Path(sys.argv[1]) / f"{trainer.global_rank}.pt")


if __name__ == "__main__":
    main()
