"""Held-out batches of a fit: their source, and the module's own loss on them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import chain, islice
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.connectors.data_connector import _DataLoaderSource
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler, SequentialSampler, Subset
from typing_extensions import override

from fasc_lightning._utils import evaluating, same_rng, seed_rng
from fasc_lightning.batches import Place, TrainingStep, as_trained_on, graph_alone, untouched
from fasc_lightning.distributed import is_distributed

#: One sample in this many is held back.
EVERY = 8
#: Most samples held back, since each measurement runs through all of them.
MOST = 64


class HeldOutSplit(_DataLoaderSource):
    """Stands in for a fit's source of training batches and holds samples back from each loader.

    Args:
        source: The fit's own source.

    Attributes:
        held: Loader of the held-back samples; None before the first call of ``dataloader``.
    """

    def __init__(self, source: _DataLoaderSource) -> None:
        super().__init__(source.instance, source.name)
        self.source = source
        self.held: DataLoader[Any] | None = None

    @override
    def dataloader(self) -> Any:
        train, self.held = split_loader(self.source.dataloader())
        return train


def split_loader(loader: Any, every: int = EVERY, most: int = MOST) -> tuple[DataLoader[Any], DataLoader[Any]]:
    """Split a loader into one over most samples and one over the held-back samples, with the same batching.

    Args:
        loader: A DataLoader over a data set with a length, in order or shuffled by the loader itself.
        every: One sample in ``every`` is held back; the last one if there are fewer.
        most: Most samples held back.

    Returns:
        The loader to train on and the loader of held-back samples.

    Raises:
        MisconfigurationException: If the loader cannot be split.
    """
    size = _size(loader)
    if size is None:
        raise MisconfigurationException(
            "Expected held-out batches, whose loss decides what a recovery keeps: a validation loader, or a training "
            "DataLoader over a data set with a length, from which samples can be held back. But there is no "
            f"validation, and the training batches come from {_described(loader)}. HINT: trainer.fit(module, "
            "train_dataloaders, val_dataloaders)."
        )
    if size < 2:
        raise MisconfigurationException(
            f"Expected at least 2 samples, one of which is held out, but there are {size}. HINT: give more, or a "
            "validation loader."
        )
    every = max(every, math.ceil(size / most))
    held = list(range(min(every, size) - 1, size, every))
    train = sorted(set(range(size)) - set(held))
    shuffled = isinstance(loader.sampler, RandomSampler)
    return _over(loader, train, shuffled), _over(loader, held, False)


def _size(loader: Any) -> int | None:
    """Return the length of a loader's data set; None if it is unknown or a custom sampler chooses the samples."""
    if not isinstance(loader, DataLoader) or type(loader.sampler) not in (RandomSampler, SequentialSampler):
        return None
    if loader.batch_size is None and loader.batch_sampler is not None:  # a batch sampler uses the samples' numbers
        return None
    dataset: Any = loader.dataset
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        return None
    if isinstance(loader.sampler, RandomSampler) and loader.sampler.replacement:
        return None
    return len(dataset)


def _over(loader: DataLoader[Any], indices: list[int], shuffled: bool) -> DataLoader[Any]:
    options: dict[str, Any] = {
        "num_workers": loader.num_workers,
        "collate_fn": loader.collate_fn,
        "pin_memory": loader.pin_memory,
        "timeout": loader.timeout,
        "worker_init_fn": loader.worker_init_fn,
        "multiprocessing_context": loader.multiprocessing_context,
        "generator": loader.generator if shuffled else None,
        "prefetch_factor": loader.prefetch_factor,
        "persistent_workers": loader.persistent_workers and shuffled,
        "batch_size": loader.batch_size,
        "shuffle": shuffled,
    }
    if loader.batch_size is not None:
        options["drop_last"] = loader.drop_last and shuffled
    try:
        return type(loader)(Subset(loader.dataset, indices), **options)
    except TypeError as error:
        raise MisconfigurationException(
            "Expected a loader that can be constructed again over some of its samples but "
            f"{type(loader).__name__} takes other arguments than DataLoader ({error}). HINT: pass a validation loader, "
            "so that no samples have to be held back."
        ) from error


def _described(loader: Any) -> str:
    if isinstance(loader, DataLoader):
        custom = loader.batch_size is None and loader.batch_sampler is not None
        sampler = loader.batch_sampler if custom else loader.sampler
        what = "a batch sampler, " if custom else ""
        return f"a {type(loader).__name__} over {type(loader.dataset).__name__} with {what}{type(sampler).__name__}"
    return type(loader).__name__


def validates(trainer: pl.Trainer) -> bool:
    """Return whether a fit has validation batches, with or without a ``validation_step``."""
    return bool(trainer.fit_loop.epoch_loop.val_loop._data_source.is_defined() and trainer.limit_val_batches > 0)


def held_out_batches(trainer: pl.Trainer, source: HeldOutSplit | None) -> Iterable[Any]:
    """Return this process's share of the held-out batches, as the loader makes them."""
    if source is not None:
        if source.held is None:  # the Trainer has its loader from an earlier fit
            source.dataloader()
        assert source.held is not None
        return islice(source.held, trainer.global_rank, None, trainer.world_size)
    loop: Any = trainer.fit_loop.epoch_loop.val_loop
    if not trainer.enable_validation:  # without a `validation_step` the Trainer leaves the loaders alone
        loaders = CombinedLoader(loop._data_source.dataloader(), "sequential").flattened
        batches = chain.from_iterable(_limited(loader, trainer.limit_val_batches) for loader in loaders)
        return islice(batches, trainer.global_rank, None, trainer.world_size)
    if loop._combined_loader is None:
        loop.setup_data()
    limits = loop.max_batches
    return (
        batch
        for loader, limit in zip(loop._combined_loader.flattened, limits, strict=True)
        for batch in islice(loader, None if limit == float("inf") else int(limit))
    )


def _limited(loader: Any, limit: int | float) -> Iterable[Any]:
    """Return a loader's batches within ``limit_val_batches``."""
    if limit == 1.0 and isinstance(limit, float):
        return loader
    return islice(loader, limit if isinstance(limit, int) else int(len(loader) * limit))


@torch.no_grad()
def held_out_loss(
    trainer: pl.Trainer,
    pl_module: pl.LightningModule,
    batches: Iterable[Any],
    terms: Callable[[Any, Tensor | None], float],
    by_graph: Callable[[Any], bool] | None = None,
) -> float:
    """Return the mean of the module's own loss over the batches of all processes, in eval mode.

    The module runs in the precision of training. The module, its modes and random generators are restored. A step that
    draws random numbers draws the same ones in every call.

    Args:
        trainer: Trainer of the fit.
        pl_module: Module of the fit.
        batches: Batches of this process, as the loader makes them.
        terms: Function that returns the number of terms of a batch's loss from the batch and its loss; batches without
            terms do not count.
        by_graph: Function that returns whether the number of terms of a batch needs a loss with a graph; otherwise
            ``terms`` gets None as the loss.

    Raises:
        MisconfigurationException: If there is no batch with terms on any process.
    """
    device = trainer.strategy.root_device
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    step, now = TrainingStep(trainer), Place.of(trainer)
    with same_rng(), evaluating(pl_module):
        for number, batch in enumerate(batches):
            seed_rng(number)  # for hooks that augment
            batch, place = as_trained_on(trainer, batch), replace(now, batch_idx=number)
            loss: Tensor | None = None
            if by_graph is not None and by_graph(batch):
                with untouched(pl_module), graph_alone():
                    loss = step.loss(pl_module, batch, place)
            weight = terms(batch, loss)
            if weight > 0:
                loss = step.judge(pl_module, batch, place) if loss is None else loss
                sums += torch.tensor([float(loss) * weight, weight], dtype=torch.float64, device=device)
    if is_distributed(trainer):
        torch.distributed.all_reduce(sums)
    if not float(sums[1]):
        raise MisconfigurationException(
            "Expected held-out batches with something to predict but there are none. HINT: use more data, or other "
            "data in the validation loader."
        )
    return float(sums[0] / sums[1])
