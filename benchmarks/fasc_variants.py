"""Variants of fasc, compared on windows that neither a fit nor P1 has used.

    FASC_DATA=<folder with the texts> python benchmarks/fasc_variants.py --output benchmarks/results/fasc_variants

Calibration is that of P1, with fisher allocation and pivot storage. The judges are the perplexity over the first
windows of calib_squad_wikipedia.txt and over the windows from 300 of calib_c4_realnews.txt. Changes are ratios of
perplexities with paired bootstrap intervals over the windows, against `plain` (fasc-plain) and against `fasc`, both
without refit. A variant helps if it is better on both texts and hurts if it is worse on one, beyond its intervals;
otherwise it ties.

Each cell (a variant at a budget) and each statistic is saved when it ends, and not computed again while model, windows
and options are the same. Delete the folder after a change of the code. All statistics of SmolLM2-135M take 11 GB. One
more variant diverged and is left out: correcting the mean outputs of all layers at once.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics as stdlib_statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from variant_statistics import WINDOW_COUNTS, Statistics, nested_windows
from variant_tables import REFERENCES, markdown, result_rows
from variants import VARIANTS, Variant

from fasc_lightning.cli import (
    fingerprint,
    library_versions,
    save_table,
    tokenizer_fingerprint,
    whole_file,
    write_json,
)
from fasc_lightning.compression import Candidate, allocate_fisher, evenly_spaced, fisher_losses, layer_budgets
from fasc_lightning.data import calibration_windows, load_model, model_fingerprint, read_text, text_windows
from fasc_lightning.evaluation import token_losses
from fasc_lightning.hooks import Taps
from fasc_lightning.layers import linear_shape, linear_weight, make_lowrank, pivot_cost, select_layers, swap_modules
from fasc_lightning.refit import RefitOptions, RefitReport, refit, refit_figures
from fasc_lightning.solvers import Factorization, shrink, two_sided
from fasc_lightning.studies.comparison import shown_perplexity
from fasc_lightning.studies.rho import HeldoutLosses, backward_windows

CALIBRATION = ("calib_wikitext2_train.txt", "calib_wikipedia_exllama.txt", "calib_c4_realnews.txt")
#: The judging texts and their first judging window. The first windows of the news file calibrate.
JUDGES = {"squad": ("calib_squad_wikipedia.txt", 0), "news": ("calib_c4_realnews.txt", 300)}
#: Further windows of the calibration files, for the exact J on tokens that nothing was fitted to.
HELDOUT_WINDOWS = 24


@dataclass
class Bench:
    """A model, its statistics, and the windows that judge.

    Attributes:
        model: The dense model.
        layers: Its layers to compress.
        statistics: Their statistics.
        heldout: Windows for exact J, shape (windows, window).
        judges: Judging windows by text.
        folder: Folder of the cells.
        source: Fingerprint of everything that cells depend on besides the variant and the budget.
        progress: Whether to show bars.
    """

    model: Any
    layers: dict[str, nn.Module]
    statistics: Statistics
    heldout: Tensor
    judges: dict[str, Tensor]
    folder: Path
    source: str
    progress: bool = False

    def dense(self) -> dict[str, Any]:
        """Return the cell of the dense model."""
        path = self.folder / "dense.json"
        return self._kept(path, {}) or self._save(path, {}, {"variant": "dense", "keep": 1.0, "kept": 1.0}, {})

    def run(self, name: str, variant: Variant, budgets: Sequence[float]) -> Iterator[dict[str, Any]]:
        """Yield the cell of a variant at every budget, from its file if it is kept."""
        settings = _settings(variant)
        paths = {keep: self._path(name, keep) for keep in budgets}
        if self.is_pending(name, variant, budgets):
            self.prepare([variant])
            start = time.perf_counter()
            factorizations = self.factorize(variant)
            factorize_seconds = time.perf_counter() - start
        for keep, path in paths.items():
            if kept := self._kept(path, settings):
                yield kept
                continue
            chosen, losses = self.losses(variant, factorizations, keep)
            ranks = self.ranks(losses, keep)
            with self.compressed(chosen, ranks) as replaced:
                facts: dict[str, Any] = {"variant": name, "keep": keep, "kept": self.share(ranks)}
                seconds = {"factorize": factorize_seconds, "refit": 0.0}
                if variant.refit is not None:
                    report = self.refit(replaced, variant.refit)
                    facts["refit"], seconds["refit"] = refit_figures(report), report.seconds
                yield self._save(path, settings, facts, seconds)

    def is_pending(self, name: str, variant: Variant, budgets: Sequence[float]) -> bool:
        """Return whether a cell of the variant is missing."""
        return any(self._kept(self._path(name, keep), _settings(variant)) is None for keep in budgets)

    def prepare(self, variants: Sequence[Variant]) -> None:
        """Gather the missing statistics of all variants."""
        names = [name for variant in variants for name in needed_statistics(variant)]
        staged = [name for name in dict.fromkeys(names) if name.startswith("staged-")]
        self.statistics.gather(name for name in names if name not in staged)
        for name in staged:
            if self.statistics.path(name).is_file():
                continue
            factorizations = self.factorize(VARIANTS["fasc"])
            ranks = self.ranks(_losses_of(factorizations), float(name.removeprefix("staged-")))
            with self.compressed(factorizations, ranks):
                del factorizations
                now = {layer: self.model.get_submodule(layer) for layer in self.layers}
                self.statistics.gather_staged(name, now)

    def metric(self, variant: Variant, layer: str) -> tuple[Tensor, Tensor]:
        """Return A (n, n) and G (m, m) of one layer for the variant, shrunk, in float64."""
        read = {name: self.statistics.pair(name, layer) for name in {*variant.A, *variant.G}}
        A = mean_matrix([read[name][0] for name in variant.A], variant.matched)
        G = mean_matrix([read[name][1] for name in variant.G], variant.matched)
        return shrink(A, variant.shrink_inputs), shrink(G, variant.shrink_gradients)

    def factorize(self, variant: Variant) -> dict[str, Factorization]:
        """Return the factors of every layer."""
        found = {}
        for name, module in self.layers.items():
            result = two_sided(linear_weight(module).detach(), *self.metric(variant, name))
            # Single precision halves the memory of the factors; losses keep float64.
            found[name] = Factorization(result.left.float(), result.right.float(), result.losses)
        return found

    def losses(
        self, variant: Variant, factorizations: dict[str, Factorization], keep: float
    ) -> tuple[dict[str, Factorization], dict[str, Tensor]]:
        """Return each layer's factors, and its losses by rank for the allocation."""
        chosen = dict(factorizations)
        heldout = self.exact_losses(keep, "heldout", self.heldout) if variant.heldout or variant.choose else {}
        if variant.choose:
            plain = self.factorize(VARIANTS["plain"])
            for name, J in heldout.items():
                if J["plain"] < J["fasc"]:
                    W = linear_weight(self.layers[name]).detach()
                    in_one_unit = fisher_losses(W, *self.metric(VARIANTS["fasc"], name), plain[name])
                    chosen[name] = replace(plain[name], losses=in_one_unit)
        losses = {name: loss**variant.power for name, loss in _losses_of(chosen).items()}
        if variant.heldout:
            losses = _corrected(losses, heldout, variant.heldout)
        if variant.measured:
            windows = torch.stack(evenly_spaced(list(self.statistics.windows)))
            losses = _corrected(losses, self.exact_losses(keep, "measured", windows), variant.measured)
        return chosen, losses

    def exact_losses(self, keep: float, label: str, windows: Tensor) -> dict[str, dict[str, float]]:
        """Return exact J of `fasc` and of `plain` at the ranks of `fasc`, and the prediction of `fasc`, by layer.

        Args:
            keep: The budget.
            label: Label of the windows, for the file with the result.
            windows: Token ids, shape (windows, window).
        """
        path, settings = self.folder / f"{label}-{keep}.json", {"windows": len(windows)}
        if kept := self._kept(path, settings):
            return kept["layers"]
        fasc, plain = (self.factorize(VARIANTS[name]) for name in ("fasc", "plain"))
        ranks = {name: k for name, k in self.ranks(_losses_of(fasc), keep).items() if k is not None}
        judge = HeldoutLosses(
            {name: linear_weight(self.layers[name]).detach() for name in ranks},
            {
                name: {label: _weight(found[name], k) for label, found in (("fasc", fasc), ("plain", plain))}
                for name, k in ranks.items()
            },
        )
        for _ in backward_windows(self.model, Taps(self.layers, pairs=judge), windows, self.progress):
            pass
        found = {name: {**judge.losses(name), "predicted": float(fasc[name].losses[k])} for name, k in ranks.items()}
        write_json({"layers": found, "source": self.source, "settings": settings}, path)
        return found

    def ranks(self, losses: Mapping[str, Tensor], keep: float) -> dict[str, int | None]:
        """Return the rank of each layer in a budget, None for dense."""
        candidates = [Candidate(k, *linear_shape(self.layers[k]), v.double().numpy()) for k, v in losses.items()]
        ranks = allocate_fisher(candidates, sum(layer_budgets(self.layers, None, keep).values()), pivot_cost)
        return {candidate.name: k for candidate, k in zip(candidates, ranks, strict=True)}

    def share(self, ranks: Mapping[str, int | None]) -> float:
        """Return the share of the layers' weights that is kept."""
        shapes = {name: linear_shape(self.layers[name]) for name in ranks}
        spent = sum(m * n if (k := ranks[name]) is None else pivot_cost(m, n, k) for name, (m, n) in shapes.items())
        return spent / sum(m * n for m, n in shapes.values())

    @contextmanager
    def compressed(
        self, factorizations: Mapping[str, Factorization], ranks: Mapping[str, int | None]
    ) -> Iterator[dict[str, nn.Module]]:
        """Compress the model within a ``with`` block, and yield the replaced dense layers."""
        built: dict[str, nn.Module] = {}
        for name, k in ranks.items():
            if k is not None:
                bias: Tensor | None = getattr(self.layers[name], "bias", None)
                left, right = factorizations[name].truncate(k)
                bias = None if bias is None else bias.detach()
                built[name] = make_lowrank(left, right, bias, "pivot").requires_grad_(False)
        replaced = swap_modules(self.model, built)
        try:
            yield replaced
        finally:
            swap_modules(self.model, replaced)

    def refit(self, replaced: dict[str, nn.Module], options: RefitOptions) -> RefitReport:
        """Refit the compressed model on the calibration windows."""
        gradients = {name: self.statistics.pair("coupled", name)[1] for name in replaced}
        batches = [{"input_ids": ids} for ids in self.statistics.windows.split(1)]
        inputs = {name: self.statistics.pair("coupled", name)[0] for name in replaced}
        return refit(self.model, replaced, gradients, batches, inputs=inputs, options=options)

    def _path(self, name: str, keep: float) -> Path:
        return self.folder / f"{name}-{keep}.json"

    def _kept(self, path: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
        """Return a file's content if it comes from the same source and settings."""
        if not path.is_file():
            return None
        content = json.loads(path.read_text())
        return content if (content["source"], content["settings"]) == (self.source, settings) else None

    def _save(
        self, path: Path, settings: dict[str, Any], facts: dict[str, Any], seconds: dict[str, float]
    ) -> dict[str, Any]:
        """Measure the model, and keep the cell."""
        start = time.perf_counter()
        losses = {text: token_losses(self.model, windows, batch_size=2) for text, windows in self.judges.items()}
        cell = {
            **facts,
            "perplexity": {text: float(values.mean().exp()) for text, values in losses.items()},
            "losses": {text: values.tolist() for text, values in losses.items()},
            "seconds": {**seconds, "evaluate": time.perf_counter() - start},
            "source": self.source,
            "settings": settings,
        }
        write_json(cell, path)
        return cell


def needed_statistics(variant: Variant) -> list[str]:
    """Return the names of all statistics behind a variant."""
    names = [*variant.A, *variant.G]
    if variant.refit is not None or any(name.startswith("staged-") for name in names):
        names.append("coupled")
    if variant.heldout or variant.choose:
        names += ["plain", "coupled"]
    return list(dict.fromkeys(names))


def mean_matrix(matrices: Sequence[Tensor], matched: bool) -> Tensor:
    """Return the mean of symmetric matrices in float64, all scaled to the trace of the first if ``matched``."""
    first, *others = (matrix.double() for matrix in matrices)
    scaled = [matrix * (first.trace() / matrix.trace()) if matched else matrix for matrix in others]
    return sum(scaled, first) / len(matrices)


def _settings(variant: Variant) -> dict[str, Any]:
    """Return a variant's options as read from JSON."""
    return json.loads(json.dumps(asdict(variant)))


def _corrected(
    losses: Mapping[str, Tensor], exact: Mapping[str, Mapping[str, float]], power: float
) -> dict[str, Tensor]:
    """Return losses times a power of exact over predicted J."""
    ratios = {name: J["fasc"] / J["predicted"] for name, J in exact.items()}
    usual = stdlib_statistics.median(ratios.values())  # for layers that stay dense at these ranks
    return {name: loss * ratios.get(name, usual) ** power for name, loss in losses.items()}


def _losses_of(factorizations: Mapping[str, Factorization]) -> dict[str, Tensor]:
    return {name: factorization.losses.double() for name, factorization in factorizations.items()}


def _weight(factorization: Factorization, rank: int) -> Tensor:
    left, right = factorization.truncate(rank)
    return left @ right


def make_bench(arguments: argparse.Namespace, data: Path) -> Bench:
    """Load the model and all windows."""
    model, tokenizer = load_model(arguments.model)
    model.eval().requires_grad_(False)
    files = [str(data / file) for file in CALIBRATION]

    def calibration(count: int) -> Tensor:
        return calibration_windows(files, tokenizer, windows=count, window=arguments.window, seed=arguments.seed)

    windows = calibration(arguments.windows)
    nested = nested_windows(calibration, WINDOW_COUNTS)
    heldout = nested_windows(calibration, [arguments.windows, arguments.windows + HELDOUT_WINDOWS])[arguments.windows :]
    judges = {
        text: text_windows(read_text(str(data / file)), tokenizer, first + arguments.judge_windows, arguments.window)
        for text, (file, first) in JUDGES.items()
    }
    judges = {text: found[JUDGES[text][1] :] for text, found in judges.items()}
    layers = select_layers(model)
    folder = arguments.output
    gathered = fingerprint(
        *(model_fingerprint(model), tokenizer_fingerprint(tokenizer), windows, nested, list(layers)),
        *(arguments.seed, arguments.precision, library_versions()["fasc-lightning"]),
    )
    judged = fingerprint(gathered, heldout, *judges.values())
    show = sys.stderr.isatty()
    kept = Statistics(model, layers, windows, nested, folder / "statistics", gathered, arguments.seed, show)
    return Bench(model, layers, kept, heldout, judges, folder / "cells", judged, show)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="a folder, a hub id, or smollm2")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--keep", nargs="+", type=float, default=[0.8, 0.6])
    parser.add_argument("--windows", type=int, default=64, help="calibration windows of all but windows-N")
    parser.add_argument("--window", type=int, default=512, help="tokens a window")
    parser.add_argument("--judge-windows", type=int, default=16, help="of each text")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--precision", choices=["highest", "medium"], default="highest", help="of float32 products")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/fasc_variants"))
    arguments = parser.parse_args(argv)
    first = min(first for file, first in JUDGES.values() if file in CALIBRATION)
    most = len(CALIBRATION) * first - HELDOUT_WINDOWS
    if arguments.windows > most:
        parser.error(f"--windows {arguments.windows} would calibrate on windows that judge: at most {most}")
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    """Run the named variants, print the tables, and save them."""
    arguments = parse(argv)
    folder = os.environ.get("FASC_DATA")
    missing = [f for f in (*CALIBRATION, *(f for f, _ in JUDGES.values())) if not (Path(folder or "") / f).exists()]
    if folder is None or missing:
        sys.exit(f"Expected FASC_DATA to name the folder with the texts, but it is {folder!r}, without {missing[0]}.")
    torch.set_float32_matmul_precision(arguments.precision)
    bench = make_bench(arguments, Path(folder))
    dense = bench.dense()
    names = list(dict.fromkeys([REFERENCES[0], *arguments.variants]))
    # All at once, so that one pass serves many variants.
    bench.prepare([VARIANTS[name] for name in names if bench.is_pending(name, VARIANTS[name], arguments.keep)])
    cells = []
    for name in names:
        for cell in bench.run(name, VARIANTS[name], arguments.keep):
            cells.append(cell)
            shown = ", ".join(f"{text} {shown_perplexity(value)}" for text, value in cell["perplexity"].items())
            print(f"{name} at {cell['keep']}: {shown}", flush=True)
    cells.sort(key=lambda cell: -cell["keep"])
    rows = result_rows(cells, arguments.seed)
    save_table(rows, arguments.output / "results.csv")
    text = markdown(rows, dense)
    with whole_file(arguments.output / "results.md") as temporary:
        temporary.write_text(text + "\n")
    print(f"\n{text}")


if __name__ == "__main__":
    main()
