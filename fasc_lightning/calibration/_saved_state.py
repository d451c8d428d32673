"""Conversion of a calibration's statistics to named tensors and plain data and back, on the first process."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from fasc_lightning._utils import Entry, NamedTensors, SchemaError, anything, integer, listed, number, record
from fasc_lightning.batches import KeptBatches, pack_batch, tensor_names, unpack_batch
from fasc_lightning.dependence import SUMS, DependenceScore, Sample
from fasc_lightning.statistics import (
    MOMENTS_HEADER,
    CalibrationMoments,
    empty_moments,
    moments_entries,
    pack_moments,
    unpack_moments,
)

_BATCH = "batch."

#: Largest count in a header.
_MAX_COUNT = 2**53

#: Names of the sums that are counts.
_COUNTS = ("tokens", "short", "infinite")

#: Sums of the scores in older checkpoints, which have no waiting samples.
OLD_SUMS = tuple(name for name in SUMS if not name.startswith("few_"))

#: Schema of the header that :func:`pack_calibration` returns.
CALIBRATION_HEADER = record(
    {
        "moments": MOMENTS_HEADER,
        "rows": listed(integer(0, _MAX_COUNT)),
        "kept": anything,  # batches/_codec.py checks it
        "batches": integer(0, _MAX_COUNT),
        "seconds": number(0),
    },
    {"waiting": listed(integer(0, _MAX_COUNT))},  # older checkpoints have no waiting samples
)


@dataclass(frozen=True)
class Statistics:
    """All statistics of a calibration of one pass, between two batches.

    Attributes:
        moments: Moments of the targeted layers.
        scores: Dependence scores by layer.
        waiting: Samples that wait to be scored, by layer.
        kept: Batches for a replay.
        batches: Number of counted batches.
        seconds: Seconds that the batches took.
    """

    moments: CalibrationMoments
    scores: dict[str, DependenceScore]
    waiting: dict[str, list[Sample]]
    kept: KeptBatches
    batches: int
    seconds: float


def pack_calibration(trainer: pl.Trainer, found: Statistics) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return statistics as tensors and plain data.

    Args:
        trainer: Trainer of the fit.
        found: On the first process, the sums over all processes.

    Returns:
        Tensors by name, on the first process only, and a header for :func:`unpack_calibration`. The tensors are no
        copies: they have to be written before the next batch.

    Raises:
        UnsavableBatchError: On the first process, if kept batches hold a type that a file cannot hold.
    """
    tensors, moments = pack_moments(found.moments)
    scores, rows = _pack_scores(found.scores)
    waiting, samples = _pack_waiting(found)
    kept, batches = pack_batch(found.kept.state_dict(), _BATCH)
    header = {
        "moments": moments,
        "rows": rows,
        "waiting": samples,
        "kept": kept,
        "batches": found.batches,
        "seconds": found.seconds,
    }
    return ({**tensors, **scores, **waiting, **batches} if trainer.is_global_zero else {}), header


def unpack_calibration(
    trainer: pl.Trainer,
    empty: Statistics,
    header: Mapping[str, Any],
    tensors: NamedTensors,
    checksums: Mapping[str, str] | None,
    *,
    needs_scores: bool,
) -> Statistics:
    """Return the statistics that :func:`pack_calibration` converted.

    Only the first process reads tensors, so that the sums over all processes count once.

    Args:
        trainer: Trainer of the fit.
        empty: Empty statistics of the fit's own layers and options. They are not changed.
        header: The header, as it was read.
        tensors: The tensors, as they were read.
        checksums: Saved checksums of the tensors; None if none were saved.
        needs_scores: Whether to refuse scores of earlier versions instead of starting them again.

    Raises:
        SchemaError: If the state is damaged, or if it belongs to another calibration.
    """
    CALIBRATION_HEADER(header, "header")
    entries = moments_entries(header["moments"])
    _check_same(empty.moments, header["moments"])
    device, batches, seconds = empty.moments.device, header["batches"], header["seconds"]
    if not trainer.is_global_zero:
        moments = empty_moments(header["moments"], device)
        return Statistics(moments, empty.scores, empty.waiting, KeptBatches(), batches, seconds)
    scores = {name: deepcopy(score) for name, score in empty.scores.items()}
    # Versions without waiting samples scored other tokens with other permutations, so their scores start again.
    scored = "waiting" in header
    if not scored and needs_scores:
        raise SchemaError("Expected scores of this version, by which the gate chooses, but an earlier one wrote them.")
    entries |= _score_entries(scores, header["rows"], scored) | _waiting_entries(scores, header.get("waiting", []))
    tensors.expect(entries, checksums, free=tensor_names(header["kept"]))
    moments = unpack_moments(header["moments"], lambda name: tensors.read(name).to(device), device)
    if scored:
        _unpack_scores(scores, header["rows"], tensors)
    kept = KeptBatches.from_state(unpack_batch(header["kept"], tensors.read), "header.kept")
    waiting = _unpack_waiting(scores, header.get("waiting", []), tensors, trainer.strategy.root_device)
    return Statistics(moments, scores, waiting, kept, batches, seconds)


def _check_same(moments: CalibrationMoments, header: Mapping[str, Any]) -> None:
    """Refuse moments with other layers, types or statistics than this calibration's, independent of the setting."""
    for what, found, wanted in (
        ("shapes", {name: tuple(shape) for name, shape in header["shapes"].items()}, moments.shapes),
        ("dtype", header["dtype"], str(moments.dtype).removeprefix("torch.")),
        ("needs", sorted(header["needs"]), sorted(moments.needs)),
    ):
        if found != wanted:
            raise SchemaError(f"Expected moments of this fit's layers and options but their {what} are others.")


def _pack_scores(scores: Mapping[str, DependenceScore]) -> tuple[dict[str, Tensor], list[int]]:
    """Return the states of all scores, stacked in the order of layer names, and the number of rows of each."""
    ordered = [scores[name] for name in sorted(scores)]
    tensors = {f"scores.{name}": torch.stack([getattr(score, name) for score in ordered]) for name in SUMS}
    rows = [torch.cat([score.biased.new_zeros(0, 3), *score.rows]) for score in ordered]
    tensors["scores.rows"] = torch.cat(rows)
    return tensors, [len(part) for part in rows]


def _pack_waiting(found: Statistics) -> tuple[dict[str, Tensor], list[int]]:
    """Return the samples that wait to be scored, and their number for each layer, in the order of layer names."""
    waiting = [found.waiting.get(name, []) for name in sorted(found.scores)]
    tensors = {  # copies, because layers share inputs and files cannot hold shared tensors
        name: values.clone()
        for i, samples in enumerate(waiting)
        for j, pair in enumerate(samples)
        for name, values in zip(_waiting_names(i, j), pair, strict=True)
    }
    return tensors, [len(samples) for samples in waiting]


def _waiting_names(layer: int, sample: int) -> tuple[str, str]:
    return f"waiting.{layer}.{sample}.inputs", f"waiting.{layer}.{sample}.gradients"


def _waiting_entries(scores: Mapping[str, DependenceScore], counts: list[int]) -> dict[str, Entry]:
    """Return the schema of the waiting samples."""
    if counts and len(counts) != len(scores):
        raise SchemaError(f"Expected samples of {len(scores)} layers at 'header.waiting' but got {len(counts)}.")
    names = [name for i, count in enumerate(counts) for j in range(count) for name in _waiting_names(i, j)]
    return {name: Entry(shapes=((None, None, None),)) for name in names}


def _unpack_waiting(
    scores: Mapping[str, DependenceScore], counts: list[int], tensors: NamedTensors, device: torch.device
) -> dict[str, list[Sample]]:
    found: dict[str, list[Sample]] = {}
    for i, (name, count) in enumerate(zip(sorted(scores), counts, strict=False)):
        for j in range(count):
            x, g = (tensors.read(part).to(device) for part in _waiting_names(i, j))
            if x.shape[:2] != g.shape[:2]:
                raise SchemaError(f"Expected inputs and gradients of the same tokens at '{_waiting_names(i, j)[0]}'.")
            found.setdefault(name, []).append((x, g))
    return found


def _score_entries(scores: Mapping[str, DependenceScore], rows: list[int], current: bool) -> dict[str, Entry]:
    """Return the schema of the states of some scores; earlier versions have fewer states, with other sizes."""
    if len(rows) != len(scores):
        raise SchemaError(f"Expected rows of {len(scores)} scores at 'header.rows' but got {len(rows)}.")
    entries = {}
    for name in SUMS if current else OLD_SUMS:
        state: Tensor = getattr(next(iter(scores.values())), name)
        low = 0 if name in _COUNTS else None
        # Sums are NaN where few tokens leave them undefined; counts never are.
        entries[f"scores.{name}"] = Entry(
            (state.dtype,),
            ((len(scores), *(state.shape if current else [None] * state.ndim)),),
            low,
            None if low is None else _MAX_COUNT,
            low is not None,
        )
    entries["scores.rows"] = Entry((torch.float64,), ((sum(rows), None),), finite=False)
    return entries


def _unpack_scores(scores: Mapping[str, DependenceScore], rows: list[int], tensors: NamedTensors) -> None:
    sums = {name: tensors.read(f"scores.{name}") for name in SUMS}
    parts = tensors.read("scores.rows").split(rows)
    for i, name in enumerate(sorted(scores)):
        score = scores[name]
        device = score.biased.device
        for key, stacked in sums.items():
            setattr(score, key, stacked[i].to(device).clone())
        score.rows = [parts[i].to(device).clone()] if rows[i] else []
        score._update_count = int(score.observed > 0)
