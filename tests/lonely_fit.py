"""Calibrations in which one of two processes dies or fails; says how the other one ends, and when.

Run as a script, which forks the processes of one fit after the other.
"""

from __future__ import annotations

import json
import os
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from sharded_fit import ShardedModule, make_loader, make_module, make_trainer

from fasc_lightning import FascCallback
from fasc_lightning.layers import is_compressed

#: How long a fit may take, in seconds.
LIMIT = 60

#: Strategy, options, and where the second process ends and how.
CASES: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "frozen, killed in a batch": ("ddp", {"update_weights": False}, "batch", "die"),
    "trained, killed in a batch": ("ddp", {}, "batch", "die"),
    "sharded, killed in a batch": ("fsdp2", {}, "batch", "die"),
    "frozen, killed before factors are shared": ("ddp", {"update_weights": False}, "factors", "die"),
    "frozen, fails and saves": ("ddp", {"update_weights": False}, "batch", "raise"),
    "trained, fails and saves": ("ddp", {}, "batch", "raise"),
    "frozen, hangs": ("impatient", {"update_weights": False}, "batch", "hang"),
}


class Ending(pl.Callback):
    """Ends the second process."""

    def __init__(self, where: str, how: str) -> None:
        self.where, self.how = where, how

    def end(self, trainer: pl.Trainer) -> None:
        if trainer.global_rank == 0:
            return
        if self.how == "die":
            os._exit(9)
        if self.how == "hang":
            time.sleep(LIMIT)
        raise InterruptedError("of the second process")

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if self.where == "batch" and batch_idx == 2:
            self.end(trainer)

    def on_fit_end(self, trainer, pl_module):
        if self.where == "factors":
            self.end(trainer)


def run(rank: int, port: int, folder: Path, case: str) -> None:
    """One process of a fit."""
    strategy, options, where, how = CASES[case]
    place = {"LOCAL_RANK": rank, "NODE_RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})
    module = make_module(ShardedModule)
    callback = FascCallback(rank=0.5, **options)
    saving = ModelCheckpoint(folder / case / str(rank), "failed", save_on_exception=True, every_n_epochs=0)
    more = [saving] if how == "raise" else []
    # Callbacks run in their order: the second process ends before it takes part in what the first one waits for.
    impatient = DDPStrategy(timeout=timedelta(seconds=3))
    trainer = make_trainer(impatient if strategy == "impatient" else strategy, Ending(where, how), callback, *more)
    said = "nothing"
    try:
        trainer.fit(module, make_loader())
    except BaseException as error:
        said = f"{type(error).__name__}: {error}"
        raise
    finally:
        found = {"error": said, "compressed": is_compressed(module), "report": callback.report is not None}
        (folder / f"{case}.{rank}.json").write_text(json.dumps(found))


def forked(rank: int, *arguments: Any) -> int:
    """Start a process; return its id."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        run(rank, *arguments)
        code = 0
    finally:
        os._exit(code)


def main(folder: Path, port: int) -> None:
    ends = {}
    for i, case in enumerate(CASES):
        began = time.monotonic()
        waiting = {forked(rank, port + i, folder, case): rank for rank in range(2)}
        codes: dict[int, Any] = {}
        last = 1 if CASES[case][3] == "hang" else 0  # one that hangs is there for good
        while len(waiting) > last and time.monotonic() - began < LIMIT:
            for pid in list(waiting):
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    codes[waiting.pop(pid)] = os.waitstatus_to_exitcode(status)
            time.sleep(0.02)
        for pid in waiting:
            os.kill(pid, 9)
            os.waitpid(pid, 0)
        ends[case] = {
            "codes": [codes.get(rank, "still there") for rank in range(2)],
            "seconds": time.monotonic() - began,
        }
    (folder / "ends.json").write_text(json.dumps(ends))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
