"""Collective operations on plain values and layers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist


def is_distributed(trainer: pl.Trainer) -> bool:
    """Tell whether the fit has other processes."""
    return dist.is_available() and dist.is_initialized() and trainer.world_size > 1


def gather_everywhere(trainer: pl.Trainer, value: Any) -> list[Any]:
    """Return the value of every process, in the order of the processes; values are plain data and tensors."""
    if not is_distributed(trainer):
        return [value]
    values: list[Any] = [None] * trainer.world_size
    dist.all_gather_object(values, value)
    return values


def sum_everywhere(trainer: pl.Trainer, count: int) -> int:
    """Return the sum of a count over every process."""
    if not is_distributed(trainer):
        return count
    total = torch.tensor(count, device=trainer.strategy.root_device)
    dist.all_reduce(total)
    return int(total)


def union_everywhere(names: set[str]) -> set[str]:
    """Return the names that any process of a distributed fit has."""
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, names)
    return set().union(*every)


def share_layers(trainer: pl.Trainer, pl_module: pl.LightningModule, names: Iterable[str]) -> None:
    """Broadcast the first process's parameters and buffers of the layers to all processes, in place."""
    if not is_distributed(trainer):
        return
    modules = dict(pl_module.named_modules())
    for name in sorted(names):
        for tensor in modules[name].state_dict().values():
            dist.broadcast(tensor, src=0)
