"""The statistics of a calibration as named tensors and plain data, and back; of all processes, on the first."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from fasc_lightning._batch_state import pack_batch, unpack_batch
from fasc_lightning._distributed import is_distributed
from fasc_lightning.calibration import Calibration
from fasc_lightning.dependence import SUMS, DependenceScore, all_reduce_scores_
from fasc_lightning.layer_scores import LayerScores
from fasc_lightning.moments_file import empty_moments, pack_moments, unpack_moments


def pack_calibration(trainer: pl.Trainer, calibration: Calibration) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the statistics so far, summed over all processes; the running ones stay what they are.

    Args:
        trainer: Of the fit.
        calibration: Between two batches.

    Returns:
        Tensors by name, on the first process only, and a header for :func:`unpack_calibration`. On one process the
        tensors are the running ones: they have to be written before the next batch.

    Raises:
        UnsavableBatchError: On the first process, after the work that all share, if batches to replay are of a type
            that a file cannot hold.
    """
    distributed = is_distributed(trainer) and not calibration.finished  # else they are summed already
    tensors, moments = pack_moments(calibration.moments, distributed)
    scores, rows, waiting = _pack_scores(calibration.scores, distributed)
    kept, batches = pack_batch(calibration.replay.batches, "batch.")
    header = {
        "moments": moments,
        "rows": rows,
        "waiting": waiting,
        "kept": kept,
        "batches": calibration.batches,
        "seconds": calibration.seconds,
    }
    return ({**tensors, **scores, **batches} if trainer.is_global_zero else {}), header


def unpack_calibration(
    trainer: pl.Trainer, calibration: Calibration, header: Mapping[str, Any], tensor: Callable[[str], Tensor]
) -> None:
    """Let a calibration that has not begun go on from what :func:`pack_calibration` returned.

    Only the first process reads tensors: the sums over all processes are to be counted once.

    Args:
        trainer: Of the fit.
        calibration: Of the same layers and options.
        header: In plain data.
        tensor: Returns a tensor by its name.
    """
    device = calibration.moments.device
    if not trainer.is_global_zero:
        moments = empty_moments(header["moments"], device)
        calibration.restore(moments, None, [], header["batches"], header["seconds"])
        return
    moments = unpack_moments(header["moments"], lambda name: tensor(name).to(device), device)
    scores = {name: deepcopy(score) for name, score in calibration.scores.scores.items()}
    _unpack_scores(scores, header["rows"], tensor)
    kept = unpack_batch(header["kept"], tensor)
    calibration.restore(moments, scores, kept, header["batches"], header["seconds"])
    calibration.scores.waiting = {
        name: [(tensor(f"{place}.x").to(device), tensor(f"{place}.g").to(device)) for place in places]
        for name, places in _places_of_waiting(header["waiting"])
    }


def _pack_scores(
    layer_scores: LayerScores, distributed: bool
) -> tuple[dict[str, Tensor], list[int], list[tuple[str, int]]]:
    """Return the states of all scores as tensors; how many rows each has; and how many samples of a layer wait.

    The states are stacked in the order of the layers' names. Samples that wait on several processes are scored.
    """
    scores = layer_scores.complete() if distributed else layer_scores.scores
    ordered = [scores[name] for name in sorted(scores)]
    if distributed:
        ordered = deepcopy(ordered)
        all_reduce_scores_(ordered)
    tensors = {f"scores.{name}": torch.stack([getattr(score, name) for score in ordered]) for name in SUMS}
    rows = [torch.cat([score.biased.new_zeros(0, 3), *score.rows]) for score in ordered]
    tensors["scores.rows"] = torch.cat(rows)
    waiting = {} if distributed else layer_scores.waiting
    counts = [(name, len(samples)) for name, samples in waiting.items()]
    for name, places in _places_of_waiting(counts):
        for place, (x, g) in zip(places, waiting[name], strict=True):
            # Layers of one input share x, and a file of tensors has none of that.
            tensors |= {f"{place}.x": x.clone(), f"{place}.g": g}
    return tensors, [len(part) for part in rows], counts


def _places_of_waiting(counts: Iterable[tuple[str, int]]) -> list[tuple[str, list[str]]]:
    """Return under which names the samples of each layer are kept."""
    return [
        (name, [f"scores.waiting.{layer}.{number}" for number in range(count)])
        for layer, (name, count) in enumerate(counts)
    ]


def _unpack_scores(scores: Mapping[str, DependenceScore], rows: list[int], tensor: Callable[[str], Tensor]) -> None:
    sums = {name: tensor(f"scores.{name}") for name in SUMS}
    parts = tensor("scores.rows").split(rows)
    for i, name in enumerate(sorted(scores)):
        score = scores[name]
        device = score.biased.device
        for key, stacked in sums.items():
            setattr(score, key, stacked[i].to(device).clone())
        score.rows = [parts[i].to(device).clone()] if rows[i] else []
        score._update_count = int(score.observed > 0)
