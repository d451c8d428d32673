"""The loss of quality by sketched and projected moments: SmolLM2-135M-Instruct on P1's texts, without a refit.

    FASC_DATA=<folder with the texts> python benchmarks/sketch_quality.py --output benchmarks/results/sketch_quality

One pass over P1's calibration gathers exact moments and all their sketches, so that rows differ in nothing else. As in
the paper, the wide sides (1,536) are sketched or projected, and the sides of width 576 are exact. Sizes follow from the
rank k of a 1,536 x 576 layer at the budget. Each statistic and each row is saved when it ends, and not computed again;
delete the folder after a change of the code. The table, with perplexities and facts, is printed as Markdown.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from p1 import CALIBRATION, FACTS, TEXTS
from pages import write_part
from torch import Tensor

from fasc_lightning.calibration import expected_rank, projected
from fasc_lightning.cli import fingerprint
from fasc_lightning.data import calibration_windows, load_model, read_text, text_windows
from fasc_lightning.evaluation import load_facts
from fasc_lightning.hooks import Taps
from fasc_lightning.layers import layer_shapes, select_layers
from fasc_lightning.options import ReductionKind
from fasc_lightning.statistics import CalibrationMoments, LayerSketches, Sketch, load_moments, save_moments
from fasc_lightning.studies.comparison import (
    Budget,
    Cell,
    CellStore,
    Comparison,
    Evaluation,
    GatheredStatistics,
    Outcome,
    Setting,
)
from fasc_lightning.studies.rho import backward_windows

WINDOWS, WINDOW, EVAL_WINDOWS = 64, 512, 32
#: Wider sides are sketched.
ABOVE = 1024
#: Outputs and inputs of the layers whose rank gives the sizes.
WIDE = (1536, 576)
EXACT = "exact"


@dataclass(frozen=True)
class Statistic:
    """The form of the wide sides: whole (no kind), projected by the weight, or a sketch with a number of columns."""

    kind: ReductionKind | None = None
    size: int = 0

    def of(self, m: int, n: int) -> LayerSketches:
        """Return the sketches of an (m, n) layer, up to half the width, where a fit would stay exact."""
        if self.kind is None:
            return LayerSketches()
        if self.kind == "projected":
            return projected(m, n)
        kind = self.kind

        def side(d: int) -> Sketch | None:
            return Sketch(d, self.size, 0, kind) if d > ABOVE else None

        return LayerSketches(side(n), side(m))

    @property
    def name(self) -> str:
        """The name in tables and file names."""
        return EXACT if self.kind is None else f"{self.kind} {self.size}" if self.size else self.kind


class Together:
    """Moments of several kinds that get the same rows; a tap uses it like one of them.

    Args:
        moments: At least one, all with the same needs.
    """

    def __init__(self, moments: Sequence[CalibrationMoments]) -> None:
        self.moments = list(moments)
        self.needs, self.takes_pairs = self.moments[0].needs, self.moments[0].takes_pairs

    def add_inputs(self, members: Iterable[str], x: Tensor) -> None:
        """See :class:`~fasc_lightning.statistics.CalibrationMoments`."""
        for moments in self.moments:
            moments.add_inputs(members, x)

    def add_gradients(self, name: str, h: Tensor, scale: float = 1.0) -> None:
        """See :class:`~fasc_lightning.statistics.CalibrationMoments`."""
        for moments in self.moments:
            moments.add_gradients(name, h, scale)

    def add_pairs(self, name: str, x: Tensor, h: Tensor, *rest: Any) -> None:
        """See :class:`~fasc_lightning.statistics.CalibrationMoments`."""
        for moments in self.moments:
            moments.add_pairs(name, x, h, *rest)

    def projects(self, name: str) -> Literal["inputs", "outputs"] | None:
        """See :class:`~fasc_lightning.statistics.CalibrationMoments`."""
        return next((side for moments in self.moments if (side := moments.projects(name)) is not None), None)

    def settle(self) -> None:
        """See :class:`~fasc_lightning.statistics.CalibrationMoments`."""


def statistics_of(keep: float) -> list[Statistic]:
    """Return the statistics to compare at a budget: exact moments, sketches of at most 2k and 4k columns, the paper's.

    Half the width is the most: a larger sketch is larger than the exact moment, which is held as a triangle.
    """
    k = expected_rank(*WIDE, None, keep)
    most = max(WIDE) // 2
    sizes = sorted({min(2 * k, most), min(4 * k, most)})
    sketches = [Statistic("range", size) for size in sizes]
    return [Statistic(), Statistic("projected"), *sketches, Statistic("gaussian", sizes[0])]


class Bench:
    """The model, its windows and the statistics of all kinds.

    Args:
        data: Folder of the texts.
        output: Where everything is kept.
    """

    def __init__(self, data: Path, output: Path) -> None:
        self.output = output
        self.model, self.tokenizer = load_model("smollm2")
        self.model.eval().requires_grad_(False)
        self.layers = select_layers(self.model)
        self.windows = calibration_windows(
            [str(data / file) for file in CALIBRATION], self.tokenizer, windows=WINDOWS, window=WINDOW, seed=0
        )
        texts = {
            name: text_windows(read_text(data / file), self.tokenizer, EVAL_WINDOWS, WINDOW)
            for name, file in TEXTS.items()
        }
        self.evaluation = Evaluation(texts, load_facts(data / FACTS))
        self.calibration = GatheredStatistics(self.model, self.tokenizer, self.layers, self.windows, output)

    def path(self, statistic: Statistic) -> Path:
        """Return the file of a statistic."""
        return self.output / f"{statistic.name.replace(' ', '-')}-{self.calibration.source}.safetensors"

    def gather(self, wanted: Iterable[Statistic]) -> None:
        """Gather the missing statistics in one pass."""
        missing = {s: self._empty(s) for s in dict.fromkeys(wanted) if not self.path(s).is_file()}
        if not missing:
            return
        taps = Taps(self.layers, Together(list(missing.values())))  # type: ignore[arg-type]
        for tokens in backward_windows(self.model, taps, self.windows):
            print(f"{tokens} tokens", flush=True)
        for statistic, moments in missing.items():
            save_moments(moments, self.path(statistic), self.calibration.source)

    def _empty(self, statistic: Statistic) -> CalibrationMoments:
        shapes = layer_shapes(self.layers)
        wide = {name: shape for name, shape in shapes.items() if max(shape) > ABOVE}
        return CalibrationMoments(
            shapes, needs={"coupled"}, sketches={name: statistic.of(*shape) for name, shape in wide.items()}
        )

    def rows(self, keeps: Sequence[float]) -> Iterator[dict[str, Any]]:
        """Yield a row for the dense model and for each budget and statistic, statistic by statistic."""
        yield self._row(None, None, 0)
        for statistic in dict.fromkeys(s for keep in keeps for s in statistics_of(keep)):
            moments = load_moments(
                self.path(statistic), shapes=layer_shapes(self.layers), source=self.calibration.source
            )
            wide = sum(s.nbytes for s in moments.couplings.values() if max(s.shape) > ABOVE)
            comparison = Comparison(self.calibration, ["fasc"])
            vars(comparison)["moments"] = moments
            for keep in keeps:
                if statistic in statistics_of(keep):
                    yield self._row(statistic, keep, wide, comparison)

    def _row(
        self, statistic: Statistic | None, keep: float | None, wide: int, comparison: Comparison | None = None
    ) -> dict[str, Any]:
        cell = Cell("dense")
        if statistic is not None:
            cell = Cell("fasc", Budget(keep), Setting("measured", "auto"), label=statistic.name)
        store = CellStore(self.output, fingerprint(self.calibration.source, self.evaluation.fingerprint()))
        outcome = store.load(cell)
        if outcome is None:
            comparison = comparison or Comparison(self.calibration, ["fasc"])
            outcome = comparison.measure(cell, self.evaluation)
            store.save(cell, outcome)
        return _row(outcome, None if statistic is None else statistic.name, keep, wide)


def _row(outcome: Outcome, statistic: str | None, keep: float | None, wide: int) -> dict[str, Any]:
    measured = outcome.measured
    if measured is None:
        sys.exit(f"Expected every row to be measured but {statistic} at keep {keep} failed: {outcome.error}")
    return {
        "statistic": statistic,
        "keep": keep,
        "bytes": wide,
        "perplexity": {name: measured.perplexity(name) for name in TEXTS},
        "facts": 100 * sum(measured.recalled) / len(measured.recalled),
    }


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows as a Markdown table, with perplexities and memory relative to exact moments at the same budget."""
    lines = [
        "| keep | moments of width 1,536 | WikiText-2 | C4 | facts | memory of layers that have that width |",
        "|---|---|---|---|---|---|",
    ]
    exact = {row["keep"]: row for row in rows if row["statistic"] == EXACT}
    for row in sorted(rows, key=lambda row: -(row["keep"] or 2)):
        found = row["perplexity"]
        if row["statistic"] is None:
            lines.append(f"| | dense | {' | '.join(f'{found[t]:.2f}' for t in TEXTS)} | {row['facts']:.1f} % | |")
            continue
        base = exact[row["keep"]]
        texts = (f"{found[t]:.2f} ({_percent(found[t], base['perplexity'][t])})" for t in TEXTS)
        memory = f"{row['bytes'] / 1e6:.0f} MB ({row['bytes'] / base['bytes']:.2f})"
        cells = [f"{row['keep']:g}", row["statistic"], *texts, f"{row['facts']:.1f} %", memory]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _percent(value: float, base: float) -> str:
    return f"{round(100 * (value / base - 1), 1) + 0:+,.1f} %"  # + 0 makes a negative zero a positive one


def main(argv: Sequence[str] | None = None) -> None:
    """Run the missing rows and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/sketch_quality"))
    parser.add_argument("--keep", type=float, nargs="+", default=[0.8, 0.6, 0.4])
    parser.add_argument("--write", type=Path, help="page whose generated part is replaced")
    arguments = parser.parse_args(argv)
    folder = os.environ.get("FASC_DATA")
    if folder is None or not (Path(folder) / FACTS).exists():
        sys.exit(f"Expected FASC_DATA to name the folder that holds {FACTS} and the texts, but it is {folder!r}.")
    arguments.output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    bench = Bench(Path(folder), arguments.output)
    bench.gather(statistic for keep in arguments.keep for statistic in statistics_of(keep))
    rows = []
    for row in bench.rows(arguments.keep):
        rows.append(row)
        print(json.dumps(row), flush=True)
    text = table(rows)
    (arguments.output / "sketch_quality.md").write_text(text + "\n")
    print(text)
    if arguments.write is not None:
        write_part(arguments.write, "sketch_quality.py", text)


if __name__ == "__main__":
    main()
