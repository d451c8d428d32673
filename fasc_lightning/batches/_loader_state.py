"""The position of a fit in its data and its random numbers, from which another process can continue.

Lightning saves the state of stateful loaders, but with gaps. It saves the first process's state only. It leaves out the
order that a sampler drew before Lightning distributed it over processes. For a loader without a length it saves the
state after the batch that it has fetched ahead. And it restores the state before samplers know their epoch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.data import _set_sampler_epoch
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from lightning.pytorch.loops.fetchers import _PrefetchDataFetcher
from torch.utils.data import RandomSampler, SequentialSampler, SubsetRandomSampler, WeightedRandomSampler

from fasc_lightning._utils import (
    FLOATS,
    INTEGERS,
    Entry,
    SchemaError,
    anything,
    boolean,
    check_names,
    check_rng_state,
    integer,
    listed,
    mapping,
    optional,
    record,
    rng_state,
    set_rng_state,
    undoing,
)
from fasc_lightning.batches._codec import UnsavableBatchError, pack_batch, tensor_names, unpack_batch


def obstacle(trainer: pl.Trainer) -> str:
    """Return why another process could not continue with the next batch of a fit; "" if it can."""
    progress: Any = trainer.fit_loop.epoch_loop.batch_progress.current
    if progress.processed != progress.ready:
        return "it was saved in the middle of a batch"
    fetcher = trainer.fit_loop._data_fetcher
    if not isinstance(fetcher, _PrefetchDataFetcher):
        return "`training_step` takes batches from the loader's iterator by itself"
    for loader in train_loaders(trainer):
        name = type(loader).__name__
        if not is_stateful(loader):
            return f"its {name} is not stateful, as torchdata's StatefulDataLoader is"
        # torchdata has samplers that keep the order. A newly drawn order would repeat some batches and skip others.
        for sampler in _samplers(loader):
            drawn = isinstance(sampler, RandomSampler | SubsetRandomSampler | WeightedRandomSampler)
            if drawn and not is_stateful(sampler):
                return f"the {type(sampler).__name__} of its {name} is not stateful, as that of shuffle=True is"
        own = _dealt_out(loader)
        if own is not None and not all(type(index) is int for index in own._sampler_list):
            return f"the {type(own._sampler).__name__} of its {name} draws what is not a number"
    try:
        pack_batch(list(fetcher.batches))
    except UnsavableBatchError as error:
        return f"its loader has no length, and the batch fetched ahead holds {error}, which a file cannot"
    return ""


def position(trainer: pl.Trainer) -> dict[str, Any]:
    """Return this process's position: the states of its loaders, batches fetched ahead and random generators.

    The position is plain data and tensors. There must be no :func:`obstacle`.
    """
    fetched, tensors = pack_batch(list(trainer.fit_loop._data_fetcher.batches))  # type: ignore[union-attr]
    return {
        "loaders": [loader.state_dict() for loader in train_loaders(trainer)],
        "orders": [_order(loader) for loader in train_loaders(trainer)],
        "fetched": {"batches": fetched, "tensors": tensors},
        "rng": rng_state(),
    }


def check_position(state: Any, path: str) -> None:
    """Check that a value is a :func:`position`. The loaders' own states are left to the loaders.

    Raises:
        SchemaError: If it is none; the error names the entry.
    """
    _POSITION(state, path)
    fetched = state["fetched"]
    check_names(fetched["tensors"], tensor_names(fetched["batches"]))
    if not isinstance(unpack_batch(fetched["batches"], fetched["tensors"].__getitem__), list):
        raise SchemaError(f"Expected a list of batches at '{path}.fetched' but got something else.")
    for order in state["orders"]:
        if order is not None and order["generator"] is not None:
            try:
                torch.Generator().set_state(order["generator"])
            except RuntimeError as error:
                raise SchemaError(f"Expected a generator's state at '{path}.orders' but {error}.") from error


_POSITION = record(
    {
        "loaders": listed(anything),
        "orders": listed(
            optional(
                record(
                    {
                        "order": Entry((torch.int64,), ((None,),), 0),
                        "generator": optional(Entry((torch.uint8,), ((None,),))),
                    }
                )
            )
        ),
        "fetched": record(
            {"batches": anything, "tensors": mapping(Entry((*FLOATS, *INTEGERS, torch.bool), finite=False))}
        ),
        "rng": check_rng_state,
    }
)


def restore_position(trainer: pl.Trainer, state: Mapping[str, Any]) -> None:
    """Restore a position when training starts: after Lightning has made the loaders, before the first batch.

    Raises:
        ValueError: If the number of loaders differs, or a loader does not accept its state.
    """
    found, expected = len(train_loaders(trainer)), len(state["loaders"])
    if found != expected or found != len(state["orders"]):
        raise ValueError(
            f"Expected {expected} loaders, whose states the checkpoint {trainer.ckpt_path} holds, but the fit has "
            f"{found}. HINT: the same loaders, or another checkpoint."
        )
    loop = trainer.fit_loop
    combined, fetcher = loop._combined_loader, loop._data_fetcher
    assert combined is not None
    assert isinstance(fetcher, _PrefetchDataFetcher)
    try:
        combined._load_state_dicts(state["loaders"])
    except Exception as error:  # a loader may raise any error for a state that is not its own
        raise ValueError(
            f"Expected the loaders to take the states that the checkpoint {trainer.ckpt_path} holds of them, but they "
            f"did not: {type(error).__name__}: {error}. HINT: the same loaders, or another checkpoint."
        ) from error
    with _drawn(train_loaders(trainer), state["orders"]):
        _iterate(trainer)
    fetched = unpack_batch(state["fetched"]["batches"], state["fetched"]["tensors"].__getitem__)
    if fetched:
        fetcher.batches[:0] = [tuple(item) for item in fetched]
        fetcher.done = False
    set_rng_state(state["rng"])


def begin_epoch(trainer: pl.Trainer) -> None:
    """Begin a new epoch when a resumed training starts, if the epoch of its checkpoint had ended.

    After a checkpoint of an epoch's last batch, or with `max_steps` of its end, Lightning would continue with exhausted
    stateful loaders and miscount epochs, some of them empty. Lightning itself runs the rest of an epoch after its
    validation.
    """
    loop = trainer.fit_loop
    epoch_loop, epochs = loop.epoch_loop, loop.epoch_progress
    current: Any = epochs.current
    if not (loop.is_resuming and epoch_loop.batch_progress.is_last_batch and current.started == current.processed):
        return
    if epoch_loop.restarted_on_train_batch_end:
        epoch_loop.batch_progress.increment_completed()
        epoch_loop._batches_that_stepped += 1
    for counts in (epochs.total, epochs.current):
        counts.ready = counts.started = counts.completed = counts.processed  # type: ignore[attr-defined]
    for inner in (loop, epoch_loop, epoch_loop.val_loop):  # a new epoch is no restart
        inner._restarting = False
        inner.reset_restart_stage()
    _iterate(trainer)


def _iterate(trainer: pl.Trainer) -> None:
    """Make new iterators of the loaders, whose samplers then know the epoch."""
    loop = trainer.fit_loop
    epochs: Any = loop.epoch_progress.current
    for loader in train_loaders(trainer):
        _set_sampler_epoch(loader, epochs.processed)
    assert loop._data_fetcher is not None
    iter(loop._data_fetcher)


def loops_before(trainer: pl.Trainer) -> dict[str, Any]:
    """Return the states of Lightning's loops, schedulers and their settings before the batch that starts now.

    The state of the loaders is left out, since the batch has been taken from them. Without it they start from the
    beginning. The result also holds whether the Trainer is to stop.
    """
    with undoing() as undo:
        if (combined := trainer.fit_loop._combined_loader) is not None:
            undo.set(combined, "_state_dicts", list)  # not asked, since some loaders fail to answer
        loops = trainer.fit_loop.state_dict()
    loops["state_dict"].pop("combined_loader", None)
    progress = loops["epoch_loop.batch_progress"]
    progress["is_last_batch"] = False
    for counts in (progress["total"], progress["current"]):
        counts["ready"] = counts["completed"]
    return {
        "loops": loops,
        "stopping": bool(trainer.should_stop),
        "lr_schedulers": [c.scheduler.state_dict() for c in trainer.strategy.lr_scheduler_configs],
        "param_groups": [
            [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
            for optimizer in trainer.optimizers
        ],
    }


_COUNT = integer(0)
_PROGRESS = record({name: mapping(_COUNT) for name in ("total", "current")}, extra=True)

#: Schema of the result of :func:`loops_before`. Further entries of the loops belong to Lightning.
LOOPS_BEFORE = record(
    {
        "loops": record(
            {
                "epoch_loop.batch_progress": record(
                    {**{name: mapping(_COUNT) for name in ("total", "current")}, "is_last_batch": boolean}, extra=True
                ),
                "epoch_progress": _PROGRESS,
                "epoch_loop.state_dict": mapping(anything),
                "epoch_loop.scheduler_progress": _PROGRESS,
                "state_dict": mapping(anything),
            },
            extra=True,
        ),
        "stopping": boolean,
        "lr_schedulers": listed(mapping(anything, anything)),
        "param_groups": listed(listed(mapping(anything))),
    }
)


def go_back(checkpoint: dict[str, Any], before: Mapping[str, Any]) -> None:
    """Set a checkpoint's loops back to :func:`loops_before` an earlier batch; its weights stay the later ones.

    Args:
        checkpoint: Checkpoint that Lightning has read and is about to restore its loops from; changed in place.
        before: Result of :func:`loops_before` at an earlier time of the same fit.
    """
    checkpoint["loops"]["fit_loop"] = before["loops"]
    checkpoint["lr_schedulers"] = before["lr_schedulers"]
    # Neither zip is strict: the checkpoint may have other optimizers, which Lightning reports.
    for state, groups in zip(checkpoint.get("optimizer_states", ()), before["param_groups"], strict=False):
        for group, settings in zip(state["param_groups"], groups, strict=False):
            group.update(settings)


def _order(loader: Any) -> dict[str, Any] | None:
    """Return the order that a loader's own sampler drew before distribution, and the state of its generator."""
    own = _dealt_out(loader)
    if own is None:
        return None
    generator = getattr(own._sampler, "generator", None)
    state = generator.get_state() if isinstance(generator, torch.Generator) else None
    return {"order": torch.tensor(own._sampler_list), "generator": state}


@contextmanager
def _drawn(loaders: Sequence[Any], orders: Sequence[Mapping[str, Any] | None]) -> Iterator[None]:
    """Give iterators that are made inside this context the orders drawn in another process."""
    wrappers = [(_dealt_out(loader), order) for loader, order in zip(loaders, orders, strict=True)]
    given = [(own, order, own._sampler) for own, order in wrappers if own is not None and order is not None]
    with undoing() as undo:
        for own, order, sampler in given:
            if order["generator"] is not None:
                undo.add(sampler.generator.set_state, order["generator"])
            undo.set(own, "_sampler", order["order"].tolist())
        yield


def _dealt_out(loader: Any) -> Any:
    """Return the holder of a loader's own sampler, if Lightning distributes it over processes and it has an order."""
    for sampler in _samplers(loader):
        if isinstance(sampler, DistributedSamplerWrapper):
            own: Any = sampler.dataset
            return None if isinstance(own._sampler, SequentialSampler) else own
    return None


def _samplers(loader: Any) -> list[Any]:
    return [getattr(holder, "sampler", None) for holder in (loader, getattr(loader, "batch_sampler", None))]


def train_loaders(trainer: pl.Trainer) -> Sequence[Any]:
    """Return the training loaders of a fit; none before Lightning has made them."""
    combined = trainer.fit_loop._combined_loader
    return [] if combined is None else combined.flattened


def is_stateful(value: Any) -> bool:
    """Return whether a loader or sampler can save and restore its position.

    Having the methods is not enough: wrappers of loaders, such as accelerate's, have them whatever they wrap, and fail
    when they are called.
    """
    if not (callable(getattr(value, "state_dict", None)) and callable(getattr(value, "load_state_dict", None))):
        return False
    try:
        value.state_dict()
    except (AttributeError, NotImplementedError):
        return False
    return True
