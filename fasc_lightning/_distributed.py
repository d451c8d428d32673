"""What several processes of one fit have to agree on."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist

from fasc_lightning.factorize import CompressionResult, parameter_tensors


def is_distributed(trainer: pl.Trainer) -> bool:
    """Tell whether other processes take part in the fit."""
    return dist.is_available() and dist.is_initialized() and trainer.world_size > 1


def gather_everywhere(trainer: pl.Trainer, value: Any) -> list[Any]:
    """Return a value, of plain data and tensors, of every process, in their order."""
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


def share_layers(trainer: pl.Trainer, pl_module: pl.LightningModule, names: Iterable[str]) -> None:
    """Give every process the first one's parameters and buffers of layers, in place."""
    if not is_distributed(trainer):
        return
    modules = dict(pl_module.named_modules())
    for name in sorted(names):
        for tensor in modules[name].state_dict().values():
            dist.broadcast(tensor, src=0)


def same_everywhere(trainer: pl.Trainer, result: CompressionResult) -> CompressionResult:
    """Give every process the factors of the first: rounding must not make replicas differ.

    The moments are the same everywhere, but a tie in the allocation may fall differently on other hardware.

    Raises:
        RuntimeError: If the processes did not even choose the same ranks.
    """
    if not is_distributed(trainer):
        return result
    plans: list[Any] = [[(p.name, p.rank, p.layout) for p in result.layers]]
    dist.broadcast_object_list(plans, src=0)
    if plans[0] != [(p.name, p.rank, p.layout) for p in result.layers]:
        raise RuntimeError(
            "The processes chose different ranks from the same moments, which different hardware or libraries on "
            "the ranks can cause. Compress on one process instead. The model is unchanged."
        )
    device = trainer.strategy.root_device
    for tensor in parameter_tensors(result.replacements):
        shared = tensor.to(device).contiguous()
        dist.broadcast(shared, src=0)
        tensor.copy_(shared)
    return result
