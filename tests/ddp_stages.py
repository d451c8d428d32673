"""A calibration in two stages by two processes; each saves what it ended with.

Run as a script, by each process of a group.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from ddp_refine import make_trainer
from tiny import causal_module, token_loader

from fasc_lightning import FascCallback


def main() -> None:
    states = {}
    for stages in (1, 2):
        module = causal_module()
        callback = FascCallback(keep=0.6, stages=stages, allocation="fisher", refit=False, update_weights=False)
        trainer = make_trainer(callback, max_epochs=1)
        trainer.fit(module, token_loader(batch_size=2, samples=16))
        states[stages] = {"state": module.state_dict(), "tokens": [layer.tokens for layer in callback.report.layers]}
    torch.save(states, Path(sys.argv[1]) / f"{trainer.global_rank}.pt")


if __name__ == "__main__":
    main()
