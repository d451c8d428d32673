"""Statistics of a comparison: one pass for all methods, kept on disk for later runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fasc_lightning._utils import (
    fingerprint,
    integer,
    library_versions,
    mapping,
    number,
    optional,
    read_json,
    record,
    text,
    tokenizer_fingerprint,
    undoing,
    write_json,
)
from fasc_lightning.data import model_fingerprint
from fasc_lightning.dependence import COLUMNS, RhoRow
from fasc_lightning.hooks import Taps
from fasc_lightning.layers import layer_shapes
from fasc_lightning.solvers import solver_needs
from fasc_lightning.statistics import (
    Accumulator,
    CalibrationMoments,
    load_moments,
    moment_dtype,
    moments_needs,
    save_moments,
)
from fasc_lightning.studies.rho import backward_windows, refine_kronecker, window_scores

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


_ROW = record(
    {
        **dict.fromkeys(
            (name for name in COLUMNS if name not in ("step", "layer", "tokens", "reason")), optional(number())
        ),
        **dict.fromkeys(("step", "tokens"), integer(0)),
        **dict.fromkeys(("layer", "reason"), text),
    }
)
_SCORES = record({"rows": mapping(_ROW), "seconds": number(0)})

#: Gathered for any methods, so that no cell depends on the others. The Fisher metric uses "coupled" if it was gathered
#: and else "plain", and a refit reads "plain".
ALWAYS = frozenset({"plain", "coupled"})


@dataclass
class GatheredStatistics:
    """The source of statistics, and the folder that keeps them.

    Attributes:
        model: A causal language model in eval mode, without gradients of its weights.
        tokenizer: Its tokenizer.
        layers: The layers to tap.
        windows: Token ids, shape (windows, window).
        folder: Folder of the statistics.
        kronecker_steps: Further steps towards gfwsvd's Kronecker factors; each is a pass over the data.
        seed: Seed of the scores' tokens and permutations.
        progress: Whether to show bars.
        seconds: Seconds by step: "pass", and the part of each need in it ("need C"). Kept statistics add the seconds of
            their own run.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    layers: dict[str, nn.Module]
    windows: Tensor
    folder: Path
    kronecker_steps: int = 0
    seed: int = 0
    progress: bool = False
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def source(self) -> str:
        """Fingerprint of model, tokenizer, tokens, layers and the package version."""
        return fingerprint(
            model_fingerprint(self.model),
            tokenizer_fingerprint(self.tokenizer),
            self.windows,
            list(self.layers),
            library_versions()["fasc-lightning"],
        )

    def moments(self, methods: Iterable[str]) -> CalibrationMoments:
        """Return moments with all statistics that the methods need, kept ones or from a new pass.

        A pass for new needs also gathers the needs of the kept file again, so that the file only grows.
        """
        needs = _needs(methods)
        path = self._kept(needs)
        if path is not None:
            self.seconds |= _read_seconds(path)
            return load_moments(path, shapes=layer_shapes(self.layers), source=self.source, device=self.model.device)
        steps = self.kronecker_steps if "kronecker" in needs else 0
        path = self.folder / f"moments-{self.source}-{steps}.safetensors"
        if path.is_file():
            needs |= moments_needs(path)
        moments, seconds = gather_moments(self.model, self.layers, self.windows, needs, self.progress)
        if steps:
            done = refine_kronecker(self.model, self.layers, self.windows, moments, steps, self.progress)
            seconds[f"{done.steps} further kronecker steps"] = done.seconds
        write_json(seconds, path.with_suffix(".json"))  # first, so that every file of moments has its seconds
        save_moments(moments, path, self.source)
        self.seconds |= seconds
        return moments

    def seconds_of(self, methods: Iterable[str]) -> dict[str, float]:
        """Return the seconds of the methods' statistics, from this run or the run that kept them."""
        path = self._kept(_needs(methods))
        return self.seconds if path is None else {**_read_seconds(path), **self.seconds}

    def _kept(self, needs: frozenset[str]) -> Path | None:
        """Return a file of this source with all needs and with Kronecker factors after the wanted number of steps."""
        steps = str(self.kronecker_steps) if "kronecker" in needs else "*"
        paths = sorted(self.folder.glob(f"moments-{self.source}-{steps}.safetensors"))
        return next((path for path in paths if needs <= moments_needs(path)), None)

    def scores(self) -> dict[str, RhoRow]:
        """Return the rho row of each layer on all windows, kept or from a pass of its own."""
        path = self.folder / f"scores-{fingerprint(self.source, self.seed)}.json"
        if path.is_file():
            found = read_json(path, _SCORES)
            self.seconds["scores"] = found["seconds"]
            return {name: _with_nan(row) for name, row in found["rows"].items()}
        start = time.perf_counter()
        scores = window_scores(self.layers, self.seed, self.model.device)
        for _ in backward_windows(self.model, Taps(self.layers, pairs=scores), self.windows, self.progress, self.seed):
            pass
        rows = {row["layer"]: row for row in scores.rows()}
        self.seconds["scores"] = time.perf_counter() - start
        write_json({"rows": rows, "seconds": self.seconds["scores"]}, path)
        return rows


def gather_moments(
    model: PreTrainedModel, layers: dict[str, nn.Module], windows: Tensor, needs: Iterable[str], progress: bool = False
) -> tuple[CalibrationMoments, dict[str, float]]:
    """Run every window forward and backward through the model once.

    Args:
        model: A causal language model; nothing of it changes.
        layers: The layers to tap.
        windows: Token ids, shape (windows, window).
        needs: Statistics to gather besides A, G and the means.
        progress: Whether to show a bar.

    Returns:
        The moments, and seconds: "pass" in all, and in it the part of each need that is summed separately ("need C").
        CUDA runs asynchronously, so there only "pass" is known.
    """
    moments = CalibrationMoments(layer_shapes(layers), moment_dtype(layers.values()), model.device, needs)
    start = time.perf_counter()
    with _timed_needs(moments) as by_need:
        for _ in backward_windows(model, Taps(layers, moments), windows, progress):
            pass
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
        by_need.clear()
    return moments, {"pass": time.perf_counter() - start, **by_need}


@contextmanager
def _timed_needs(moments: CalibrationMoments) -> Iterator[dict[str, float]]:
    """Yield the seconds so far of the updates of each optional group of accumulators."""
    seconds: dict[str, float] = {}
    sequences = "kronecker" if "kronecker" in moments.needs else "fisher_rows"
    groups: dict[str, dict[str, Any]] = {
        "coupled": moments.couplings,
        "C": moments.crosses,
        "saliency": moments.saliencies,
        sequences: moments.sequences,
    }
    streams: list[tuple[str, Accumulator]] = [(need, s) for need, group in groups.items() for s in group.values()]
    with undoing() as undo:
        for need, stream in streams:
            undo.set(stream, "update", partial(_timed, stream.update, f"need {need}", seconds))
        yield seconds


def _timed(update: Callable[..., None], label: str, seconds: dict[str, float], *args: Any) -> None:
    start = time.perf_counter()
    update(*args)
    seconds[label] = seconds.get(label, 0.0) + time.perf_counter() - start


def _needs(methods: Iterable[str]) -> frozenset[str]:
    return ALWAYS.union(*(solver_needs(method) for method in methods))


def _read_seconds(path: Path) -> dict[str, float]:
    """Return the seconds that gathering the kept moments took."""
    return read_json(path.with_suffix(".json"), mapping(number(0)))


def _with_nan(row: dict[str, Any]) -> RhoRow:
    """Return a row from JSON with NaN instead of None."""
    return {name: float("nan") if value is None else value for name, value in row.items()}  # type: ignore[return-value]
