"""Fits of two processes whose weights are sharded by FSDP2, beside the same ones under DDP; each saves how it ends.

Run as a script, since Lightning launches its other processes by running the script again.
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from interrupted import Between, every_batch
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from tiny import causal_model, token_loader
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torchdata.stateful_dataloader import StatefulDataLoader
from watching import RecordingCallback

from fasc_lightning import CausalLMModule, FascCallback
from fasc_lightning.distributed import _fsdp as sharding

FROZEN: dict[str, Any] = {"update_weights": False}
PREDICTED: dict[str, Any] = {"allocation": "fisher", "refit": False}


class ShardedModule(CausalLMModule):
    """Shards each block and then the model; under other strategies nothing."""

    parts = (nn.Module,)

    def configure_model(self) -> None:
        if self.device_mesh is None or isinstance(self.model, FSDPModule):
            return
        mesh = self.device_mesh["data_parallel"]
        for block in self.model.model.layers:
            self.shard_block(block, mesh)
        fully_shard(self.model, mesh=mesh)

    def shard_block(self, block: nn.Module, mesh: Any) -> None:
        fully_shard(block, mesh=mesh)


class FinelySharded(ShardedModule):
    """Shards every linear layer on its own."""

    def shard_block(self, block, mesh):
        for layer in block.modules():
            if isinstance(layer, nn.Linear):
                fully_shard(layer, mesh=mesh)


#: Fits that are made under both strategies.
CASES: dict[str, dict[str, Any]] = {
    "one by one": {**FROZEN, **PREDICTED, "gate": 0.0, "gate_by": "pooled"},
    "replayed": {**FROZEN, "allocation": "measured", "refit": True},
    "trained": {**PREDICTED, "monitor_every_n_steps": 2},
    "tied": {**FROZEN, **PREDICTED, "tied": True},
    "in passes": {**FROZEN, **PREDICTED, "sketch": "projected", "passes": 2},
    "sharded finely": {**FROZEN, **PREDICTED, "kind": FinelySharded},
}


class Saving(FascCallback):
    """Keeps a copy of the moments, and how much of the weights was spread over processes."""

    def on_fit_end(self, trainer, pl_module):
        weights = list(pl_module.parameters())
        self.spread = sum(isinstance(weight, DTensor) for weight in weights) / len(weights)
        self.kept = copy.deepcopy(self._calibration.moments)
        super().on_fit_end(trainer, pl_module)


class FailingAfter(pl.Callback):
    """Fails once the module is compressed."""

    def on_fit_end(self, trainer, pl_module):
        raise InterruptedError("after the swap")


def make_trainer(strategy: Any, *callbacks: pl.Callback, in_parts: bool = False, **options: Any) -> pl.Trainer:
    """A Trainer of two processes, or with "auto" of one."""
    if strategy == "fsdp2":
        sizes = {"data_parallel_size": 2, "tensor_parallel_size": 1}
        strategy = ModelParallelStrategy(**sizes, save_distributed_checkpoint=in_parts)
    defaults = {
        "accelerator": "cpu",
        "devices": 1 if strategy == "auto" else 2,
        "strategy": strategy,
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": any(isinstance(callback, Checkpoint) for callback in callbacks),
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return pl.Trainer(callbacks=list(callbacks), **{**defaults, **options})


def make_module(kind: type[CausalLMModule] = ShardedModule, **settings: Any) -> CausalLMModule:
    # In double precision, so that the order of sums does not decide what is compared.
    return kind(causal_model(**settings).train().double(), learning_rate=1e-3)


def make_loader() -> Any:
    return token_loader(batch_size=2, samples=16, length=24, padded=True)


def fit(strategy: str, *more: pl.Callback, kind: type[CausalLMModule] = ShardedModule, **options: Any) -> dict:
    """What a fit ends with, in plain data."""
    settings = {"tie_word_embeddings": True} if options.pop("tied", False) else {}
    callback, module = Saving(rank=0.5, **options), make_module(kind, **settings)
    trainer = make_trainer(strategy, callback, *more, max_epochs=callback.passes)
    trainer.fit(module, make_loader())
    kept = callback.kept
    return {
        "moments": {
            name: vars(kept.layer(name)) for name in kept.shapes if kept.tokens(name) and not kept.projects(name)
        },
        "ranks": {row.name: row.rank for row in callback.report.layers},
        "rhos": {row.name: row.rho_debiased for row in callback.report.layers},
        "whole": callback.report.whole,
        "refit": callback.report.refit,
        "state": module.state_dict(),
        "plain": is_plain(module),
        "spread": callback.spread,
        "history": [row["rho"] for row in callback.rho_history],
    }


def is_plain(module: nn.Module) -> bool:
    """Whether nothing of FSDP2 is left in a module."""
    spread = any(isinstance(t, DTensor) for t in (*module.parameters(), *module.buffers()))
    hooks = [
        h
        for part in module.modules()
        for kind in ("_forward_hooks", "_forward_pre_hooks", "_state_dict_pre_hooks")
        for h in vars(part)[kind].values()
    ]
    foreign = any("torch.distributed.fsdp" in getattr(hook, "__module__", "") for hook in hooks)
    named = any(isinstance(part, FSDPModule) or "FSDP" in type(part).__name__ for part in module.modules())
    return not (spread or foreign or named)


def losses(module: CausalLMModule, strategy: str = "fsdp2") -> list[float]:
    """What a training of two batches without the callback loses, from the weights that a module has."""
    seen: list[float] = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            seen.append(outputs["loss"].item())

    make_trainer(strategy, Watch(), limit_train_batches=2).fit(module, make_loader())
    return seen


def error_of(function: Any, *args: Any, **kwargs: Any) -> str:
    """What a call raises."""
    try:
        function(*args, **kwargs)
    except BaseException as error:  # as those of PyTorch's checkpoints
        return f"{type(error).__name__}: {error}"
    return "nothing"


def compare(folder: Path) -> dict[str, Any]:
    """The same fits under both strategies."""
    return {name: {s: fit(s, **options) for s in ("ddp", "fsdp2")} for name, options in CASES.items()}


def fail(folder: Path) -> dict[str, Any]:
    """A module whose fit fails once it is compressed, and one whose fit does not."""
    found: dict[str, Any] = {}
    found["straight"] = losses(make_module())
    for name, options in {"one by one": PREDICTED, "replayed": {}}.items():
        module, callback = make_module(), FascCallback(rank=0.5, **FROZEN, **options)
        trainer = make_trainer("fsdp2", callback, FailingAfter())
        found[name] = {"error": error_of(trainer.fit, module, make_loader())}
        kinds = {type(part).__name__ for part in module.modules() if isinstance(part, FSDPModule)}
        spread = all(isinstance(p, DTensor) for p in module.parameters())
        found[name] |= {"kinds": sorted(kinds), "spread": spread, "report": callback.report, "losses": losses(module)}

    room = sharding.available_memory
    sharding.available_memory = lambda device: 100_000
    try:
        found["no room"] = fit("fsdp2", **FROZEN)
        found["no room, insisted"] = error_of(fit, "fsdp2", refit=True, **FROZEN)
    finally:
        sharding.available_memory = room

    tensor = ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=2)
    trainer = make_trainer(tensor, FascCallback(rank=0.5))
    found["tensor parallel"] = error_of(trainer.fit, make_module(), make_loader())

    class Unsharded(ShardedModule):
        def configure_model(self):
            pass

    found["unsharded"] = error_of(fit, "fsdp2", kind=Unsharded)

    module, callback = make_module(), FascCallback(rank=0.5, recovery="factors", **FROZEN, **PREDICTED)
    make_trainer("ddp", callback).fit(module, make_loader())
    found["recovery"] = error_of(make_trainer("fsdp2", callback).fit, module, make_loader())
    return found


def save(folder: Path) -> dict[str, Any]:
    """A module that is saved in every way, and trained on."""
    module, callback = make_module(), FascCallback(rank=0.5, **FROZEN, **PREDICTED)
    trainer = make_trainer("fsdp2", callback)
    trainer.fit(module, make_loader())
    if trainer.is_global_zero:
        module.model.save_pretrained(folder / "folder")
    trainer.save_checkpoint(folder / "one.ckpt")
    trainer.strategy._save_distributed_checkpoint = True
    trainer.save_checkpoint(folder / "parts.ckpt")
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    twin = ShardedModule(copy.deepcopy(module.model), learning_rate=1e-3)
    return {"state": state, "losses": losses(module), "expected": losses(twin, "ddp")}


def resume(folder: Path) -> dict[str, Any]:
    """Fits that are interrupted in their calibration and go on, from a checkpoint of one file and of several."""
    found: dict[str, Any] = {}
    for name, in_parts, options in (("one file", False, {}), ("parts, frozen", True, FROZEN)):

        def run(place: str, *more: pl.Callback, in_parts: bool = in_parts, options: Any = options, **arguments: Any):
            callback, module = RecordingCallback(rank=0.5, allocation="uniform", refit=False, **options), make_module()
            trainer = make_trainer("fsdp2", callback, every_batch(folder / place), *more, in_parts=in_parts)
            loader = StatefulDataLoader(make_loader().dataset, batch_size=2)
            said = error_of(trainer.fit, module, loader, **arguments)
            return {"error": said, "batches": callback.batches, "state": module.state_dict()}

        found[name] = {"straight": run(f"{name}, straight")}
        stopped = run(name, Between(2))
        resumed = run(name, ckpt_path=folder / name / "last.ckpt")
        found[name] |= {"stopped": (stopped["error"], stopped["batches"]), "resumed": resumed}
    return found


if __name__ == "__main__":
    target = Path(sys.argv[2])
    results = {"compare": compare, "fail": fail, "save": save, "resume": resume}[sys.argv[1]](target)
    torch.save(results, target / f"{torch.distributed.get_rank()}.pt")
