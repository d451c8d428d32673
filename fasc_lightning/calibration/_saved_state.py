"""The statistics of a calibration as named tensors and plain data, and back; of all processes, on the first."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from fasc_lightning._utils import Entry, NamedTensors, SchemaError, anything, integer, listed, number, record
from fasc_lightning.batches import KeptBatches, pack_batch, tensor_names, unpack_batch
from fasc_lightning.calibration._calibration import Calibration
from fasc_lightning.dependence import SUMS, DependenceScore, LayerScores, Sample
from fasc_lightning.statistics import MOMENTS_HEADER, empty_moments, moments_entries, pack_moments, unpack_moments

_BATCH = "batch."

#: Largest count that a header may hold.
_MAX_COUNT = 2**53

#: Sums that are counts.
_COUNTS = ("tokens", "short", "infinite")

#: Sums of the scores in checkpoints without samples that wait.
OLD_SUMS = tuple(name for name in SUMS if not name.startswith("few_"))

#: Of what :func:`pack_calibration` returns beside the tensors.
CALIBRATION_HEADER = record(
    {
        "moments": MOMENTS_HEADER,
        "rows": listed(integer(0, _MAX_COUNT)),
        "kept": anything,  # read by the module that wrote it
        "batches": integer(0, _MAX_COUNT),
        "seconds": number(0),
    },
    {"waiting": listed(integer(0, _MAX_COUNT))},  # none in checkpoints of before samples could wait
)


def pack_calibration(trainer: pl.Trainer, calibration: Calibration) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the statistics so far, summed over all processes; with these the first process goes on.

    Args:
        trainer: Of the fit.
        calibration: Between two batches.

    Returns:
        Tensors by name, on the first process only, and a header for :func:`unpack_calibration`. The tensors are the
        running ones: they have to be written before the next batch.

    Raises:
        UnsavableBatchError: On the first process, after the work that all share, if batches to replay are of a type
            that a file cannot hold.
    """
    calibration.merge(trainer)
    tensors, moments = pack_moments(calibration.moments)
    scores, rows = _pack_scores(calibration.scores.scores)
    waiting, samples = _pack_waiting(calibration.scores)
    kept, batches = pack_batch(calibration.replay.state_dict(), _BATCH)
    header = {
        "moments": moments,
        "rows": rows,
        "waiting": samples,
        "kept": kept,
        "batches": calibration.batches,
        "seconds": calibration.seconds,
    }
    return ({**tensors, **scores, **waiting, **batches} if trainer.is_global_zero else {}), header


def unpack_calibration(
    trainer: pl.Trainer,
    calibration: Calibration,
    header: Mapping[str, Any],
    tensors: NamedTensors,
    checksums: Mapping[str, str] | None,
) -> None:
    """Let a calibration that has not begun go on from what :func:`pack_calibration` returned.

    Only the first process reads tensors: the sums over all processes are to be counted once.

    Args:
        trainer: Of the fit.
        calibration: Of the same layers and options. It changes only once all of the state has been checked.
        header: In plain data, as it was read.
        tensors: As they were read.
        checksums: That were saved of the tensors; None if none were.

    Raises:
        SchemaError: If the state is damaged, or of another calibration.
    """
    CALIBRATION_HEADER(header, "header")
    entries = moments_entries(header["moments"])
    _check_same(calibration, header["moments"])
    device = calibration.moments.device
    if not trainer.is_global_zero:
        moments = empty_moments(header["moments"], device)
        calibration.restore(moments, None, KeptBatches(), header["batches"], header["seconds"])
        return
    scores = {name: deepcopy(score) for name, score in calibration.scores.scores.items()}
    # Scores of versions without samples that wait are of other tokens and permutations: they begin anew.
    scored = "waiting" in header
    if not scored and calibration.options.gate_threshold is not None:
        raise SchemaError("Expected scores of this version, by which the gate chooses, but an earlier one wrote them.")
    entries |= _score_entries(scores, header["rows"], scored) | _waiting_entries(scores, header.get("waiting", []))
    tensors.expect(entries, checksums, free=tensor_names(header["kept"]))
    moments = unpack_moments(header["moments"], lambda name: tensors.read(name).to(device), device)
    if scored:
        _unpack_scores(scores, header["rows"], tensors)
    kept = KeptBatches.from_state(unpack_batch(header["kept"], tensors.read), "header.kept")
    waiting = _unpack_waiting(scores, header.get("waiting", []), tensors, calibration.scores.device)
    calibration.restore(moments, scores, kept, header["batches"], header["seconds"])
    calibration.scores.waiting = waiting


def _check_same(calibration: Calibration, header: Mapping[str, Any]) -> None:
    """Refuse moments of other layers, types or statistics than this calibration's, whatever the setting says."""
    moments = calibration.moments
    for what, found, wanted in (
        ("shapes", {name: tuple(shape) for name, shape in header["shapes"].items()}, moments.shapes),
        ("dtype", header["dtype"], str(moments.dtype).removeprefix("torch.")),
        ("needs", sorted(header["needs"]), sorted(moments.needs)),
    ):
        if found != wanted:
            raise SchemaError(f"Expected moments of this fit's layers and options but their {what} are others.")


def _pack_scores(scores: Mapping[str, DependenceScore]) -> tuple[dict[str, Tensor], list[int]]:
    """Return the states of all scores, stacked in the order of their names, and how many rows each has."""
    ordered = [scores[name] for name in sorted(scores)]
    tensors = {f"scores.{name}": torch.stack([getattr(score, name) for score in ordered]) for name in SUMS}
    rows = [torch.cat([score.biased.new_zeros(0, 3), *score.rows]) for score in ordered]
    tensors["scores.rows"] = torch.cat(rows)
    return tensors, [len(part) for part in rows]


def _pack_waiting(scores: LayerScores) -> tuple[dict[str, Tensor], list[int]]:
    """Return the samples that wait to be scored, and how many each layer has, in the order of their names."""
    waiting = [scores.waiting.get(name, []) for name in sorted(scores.scores)]
    tensors = {  # copies: layers share inputs, which files of tensors do not
        name: values.clone()
        for i, samples in enumerate(waiting)
        for j, pair in enumerate(samples)
        for name, values in zip(_waiting_names(i, j), pair, strict=True)
    }
    return tensors, [len(samples) for samples in waiting]


def _waiting_names(layer: int, sample: int) -> tuple[str, str]:
    return f"waiting.{layer}.{sample}.inputs", f"waiting.{layer}.{sample}.gradients"


def _waiting_entries(scores: Mapping[str, DependenceScore], counts: list[int]) -> dict[str, Entry]:
    """Return the schema of the samples that wait."""
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
    """Return the schema of the states of some scores; those of earlier versions are fewer and of other sizes."""
    if len(rows) != len(scores):
        raise SchemaError(f"Expected rows of {len(scores)} scores at 'header.rows' but got {len(rows)}.")
    entries = {}
    for name in SUMS if current else OLD_SUMS:
        state: Tensor = getattr(next(iter(scores.values())), name)
        low = 0 if name in _COUNTS else None
        # What few tokens leave undefined may be NaN; counts never are.
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
