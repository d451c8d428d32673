"""Claims of the FASC paper that are no row of a comparison, each measured once on SmolLM2-135M-Instruct.

    FASC_DATA=<folder with the texts> python benchmarks/paper_claims.py --output benchmarks/results/paper_claims

The parts:

* syntax: minimal pairs, facts in six languages and numbers under svd, grad-svd and fasc (Table 3, Table 6);
* layers: the fifths of the layers with the highest and the lowest rho, each together (Table 7);
* sensitivity: single layers, a fifth of them, each kind in all depths (Figure 2);
* stability: the inputs that fasc and svd keep, by calibration text (Section 2.2);
* hessian: the inputs that they keep, beside eigenvectors of the Hessian (Section 2.2).

The first three are runs of recipes/compare_methods.py, which keeps its cells; the others keep a file for each text and
layer. A run that was stopped goes on from there. Delete the folder after a change of the code.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from p1 import CALIBRATION, FACTS, text_options
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fasc_lightning.cli import Row, markdown_table, whole_file, write_json
from fasc_lightning.data import calibration_windows, load_model, open_text, read_text, text_windows
from fasc_lightning.hooks import Taps
from fasc_lightning.layers import layer_shapes, linear_weight, resolve_rank, select_layers
from fasc_lightning.solvers import get_solver, solver_needs
from fasc_lightning.statistics import CalibrationMoments, LayerMoments
from fasc_lightning.studies.comparison import GatheredStatistics
from fasc_lightning.studies.rho import backward_windows, divisions, input_subspace, principal_angles

RECIPE = Path(__file__).parents[1] / "recipes" / "compare_methods.py"
PARTS = ("syntax", "layers", "sensitivity", "stability", "hessian")
METHODS = ("fasc", "svd")
#: The rank of the paper's tables, half of full rank.
RANK = 0.5
LANGUAGES = ("de", "es", "fr", "it", "pt")
#: Layers on which Hessians are computed, of the highest and of the lowest rho each.
HESSIANS = 3


# The questions of Table 3.


def write_questions(data: Path, output: Path, relations: int, facts: int, pairs: int, numbers: int) -> None:
    """Write facts.jsonl and pairs.jsonl.

    A language's facts are of the same relations as the others', and are ranked among the objects of their own language.
    Numbers are the sentences of NumerSense, ranked among its number words.

    Args:
        data: Folder of the source files.
        output: Folder to write to.
        relations: Number of relations.
        facts: Facts of each relation and language, at most.
        pairs: Minimal pairs of each paradigm of BLiMP, at most.
        numbers: Sentences with a number.
    """
    draw = random.Random(0)
    english, foreign = jsonl(data / "lama_trex.jsonl.xz"), jsonl(data / "mlama.jsonl.xz")
    pools: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in english:
        pools.setdefault(("en", row["relation"]), []).append(row)
    for row in foreign:
        pools.setdefault((row["lang"], row["relation"]), []).append(row)
    everywhere = sorted(r for r in {r for _, r in pools} if all((lang, r) in pools for lang in ("en", *LANGUAGES)))
    kept = []
    for relation in draw.sample(everywhere, min(relations, len(everywhere))):
        for language in ("en", *LANGUAGES):
            pool = pools[language, relation]
            for row in draw.sample(pool, min(facts, len(pool))):
                same = {name: row[name] for name in ("subject", "template", "object")}
                kept.append({**same, "relation": f"{language} {relation}", "kind": language})
    sentences = jsonl(data / "numersense.jsonl")
    for row in draw.sample(sentences, min(numbers, len(sentences))):
        fact = {"subject": row["prompt"], "relation": "number", "template": "[X] [Y] .", "object": row["object"]}
        kept.append({**fact, "kind": "numbers"})
    write_jsonl(output / "facts.jsonl", kept)
    paradigms: dict[str, list[dict[str, Any]]] = {}
    for row in jsonl(data / "blimp_a.jsonl"):
        paradigms.setdefault(row["uid"], []).append(row)
    write_jsonl(output / "pairs.jsonl", [row for group in paradigms.values() for row in group[:pairs]])


def jsonl(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a jsonl file, or of one as ``.xz``."""
    return [json.loads(line) for line in open_text(path) if line.strip()]


def write_jsonl(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows, one a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


# Runs of the recipe.


def compare(options: argparse.Namespace, data: Path, name: str, arguments: Sequence[str]) -> None:
    """Run recipes/compare_methods.py in a process of its own, with the statistics that all parts share."""
    command = [sys.executable, str(RECIPE), "--model", options.model, *arguments, *text_options(data)]
    command += ["--windows", str(options.windows), "--window", str(options.window)]
    command += ["--eval-windows", str(options.eval_windows), "--eval-precision", "medium"]
    command += ["--output", str(options.output / name), "--statistics", str(options.output / "statistics")]
    subprocess.run(command, check=True)


def syntax(options: argparse.Namespace, data: Path) -> None:
    """Table 3, in the paper's setting and at one budget over all layers."""
    questions = options.output / "questions"
    write_questions(data, questions, options.relations, options.facts, options.pairs, numbers=10 * options.facts)
    same = ["--methods", "svd", "grad-svd", "fasc", "--studies", "grid", "kinds"]
    same += ["--eval-facts", str(questions / "facts.jsonl"), "--minimal-pairs", str(questions / "pairs.jsonl")]
    compare(options, data, "syntax-uniform", [*same, "--rank", str(RANK), "--settings", "uniform-factors"])
    compare(options, data, "syntax-fisher", [*same, "--keep", "0.6", "--settings", "fisher-pivot"])


def layers(options: argparse.Namespace, data: Path) -> None:
    """Table 7, whose rank is 40 % of full rank, on the facts of P1."""
    study = ["--studies", "layers", "--study-rank", "0.4", "--eval-facts", str(data / FACTS)]
    compare(options, data, "layers", study)


def sensitivity(options: argparse.Namespace, data: Path) -> None:
    """Figure 2, on some of the layers."""
    study = ["--studies", "sensitivity", "--study-rank", str(RANK), "--study-layers", str(options.layers)]
    compare(options, data, "sensitivity", [*study, "--eval-facts", str(data / FACTS)])


# The stability of the inputs that are kept.


def texts_of(data: Path, windows: int, tokenizer: Any, window: int) -> dict[str, Tensor]:
    """Return calibration windows by text.

    "WikiText, other half" is more of the first text: the agreement of two samples of one text is what can be reached.
    "facts" and "facts, negated" differ by one word in each sentence.
    """
    wikitext = text_windows(read_text(data / CALIBRATION[0]), tokenizer, 2 * windows, window)
    sentences = [
        row["template"].replace("[X]", row["subject"]).replace("[Y]", row["object"]).replace(" .", ".")
        for row in jsonl(data / "lama_trex.jsonl.xz")
        if " is " in row["template"] or " was " in row["template"]
    ]
    random.Random(0).shuffle(sentences)
    denied = [text.replace(" is ", " is not ", 1).replace(" was ", " was not ", 1) for text in sentences]
    texts = {
        "C4": read_text(data / CALIBRATION[2]),
        "instructions": read_text(data / "alpaca.jsonl"),
        "facts": " ".join(sentences),
        "facts, negated": " ".join(denied),
    }
    others = {name: text_windows(text, tokenizer, windows, window) for name, text in texts.items()}
    return {"WikiText": wikitext[:windows], "WikiText, other half": wikitext[windows:], **others}


def kept_inputs(targets: dict[str, nn.Module], moments: CalibrationMoments) -> dict[str, Tensor]:
    """Return a basis of the inputs that each method keeps of each layer, in float32, by "method layer"."""
    return {
        f"{method} {name}": kept_subspace(method, linear_weight(layer), moments.layer(name)).float().contiguous()
        for name, layer in targets.items()
        for method in METHODS
    }


def kept_subspace(method: str, W: Tensor, moments: LayerMoments) -> Tensor:
    """Return an orthonormal basis of the inputs that a method keeps at half of full rank, shape (n, k)."""
    return input_subspace(get_solver(method)(W, moments), resolve_rank(W.shape[0], W.shape[1], RANK))


def overlap(Q1: Tensor, Q2: Tensor) -> float:
    """Return the mean squared cosine of the principal angles between two subspaces: 1 for the same, k / n by chance."""
    return torch.deg2rad(principal_angles(Q1, Q2)).cos().square().mean().item()


def stability(options: argparse.Namespace, data: Path) -> None:
    """The overlap of the inputs kept after a calibration on one text and on another."""
    folder = options.output / "stability"
    folder.mkdir(parents=True, exist_ok=True)
    model, tokenizer, targets = loaded(options.model)
    needs = frozenset({"plain"}).union(*(solver_needs(method) for method in METHODS))
    texts = texts_of(data, options.stability_windows, tokenizer, options.window)
    for name, windows in texts.items():
        path = folder / f"{name}.safetensors"
        if not path.exists():
            moments = CalibrationMoments(layer_shapes(targets), needs=needs)
            for _ in backward_windows(model, Taps(targets, moments), windows):
                pass
            with whole_file(path) as temporary:
                save_file(kept_inputs(targets, moments), temporary)
            print(f"{name}: {windows.numel():,} tokens", flush=True)
    bases = {name: load_file(folder / f"{name}.safetensors") for name in texts}
    rows: list[Row] = []
    for one, other in combinations(texts, 2):
        row: Row = {"calibration": f"{one}; {other}"}
        for method in METHODS:
            found = [overlap(bases[one][key], bases[other][key]) for key in (f"{method} {name}" for name in targets)]
            row |= {f"{method}, mean": fmean(found), f"{method}, least layer": min(found)}
        rows.append(row)
        print(rows[-1], flush=True)
    shapes = [linear_weight(layer).shape for layer in targets.values()]
    chance = fmean(resolve_rank(m, n, RANK) / n for m, n in shapes)
    rows.append({"calibration": "by chance", **dict.fromkeys(list(rows[0])[1:], chance)})
    write_json(rows, folder / "stability.json")
    (folder / "stability.md").write_text(markdown_table(percent(rows)) + "\n")


# The Hessian.


def sampled_hessian(
    loss: Callable[[Tensor], Tensor], shape: tuple[int, int], draw: torch.Generator
) -> Callable[[Tensor], Tensor]:
    """Return v -> sum_t s_t sum_u H_tu v s_u of a loss, with random signs s: on average v -> sum_t H_tt v.

    H_tu is the second derivative by the output at token t and at token u, and H_tt the paper's Hessian at one token.
    The signs are drawn once, so that one symmetric matrix is applied to all vectors.

    Args:
        loss: The loss, a sum over tokens, of the numbers added to a layer's outputs, shape (tokens, m).
        shape: (tokens, m).
        draw: Draws the signs.
    """
    added = torch.zeros(shape, requires_grad=True)
    signs = 2.0 * torch.randint(2, (shape[0], 1), generator=draw) - 1
    (gradient,) = torch.autograd.grad(loss(added), added, create_graph=True)
    signed = (signs * gradient).sum(0)

    def product(vectors: Tensor) -> Tensor:
        columns = [torch.autograd.grad(signed, added, grad_outputs=v, retain_graph=True)[0] for v in vectors.T]
        return torch.stack([(signs * column).sum(0) for column in columns], dim=1)

    return product


def leading_eigenvectors(
    product: Callable[[Tensor], Tensor], size: int, count: int, extra: int = 8, steps: int = 2
) -> tuple[Tensor, Tensor]:
    """Return the eigenvalues of largest magnitude of a symmetric matrix, and their eigenvectors, by subspace iteration.

    Args:
        product: Multiplies the matrix by the columns of a matrix, (size, columns).
        size: Its size.
        count: Number of eigenvectors.
        extra: Further columns of the iteration.
        steps: Multiplications; the last one is the Rayleigh-Ritz step.
    """
    Q = torch.linalg.qr(torch.randn(size, min(size, count + extra), generator=torch.Generator().manual_seed(0)))[0]
    for _ in range(steps - 1):
        Q = torch.linalg.qr(product(Q))[0]
    T = Q.T @ product(Q)
    values, vectors = torch.linalg.eigh((T + T.T) / 2)
    order = values.abs().argsort(descending=True)[:count]
    return values[order], Q @ vectors[:, order]


@contextmanager
def added_to_output(layer: nn.Module) -> Iterator[Callable[[Tensor], None]]:
    """Yield a function that says what to add to a layer's outputs, (tokens, m)."""
    addend: list[Tensor] = []
    handle = layer.register_forward_hook(lambda module, inputs, output: output + addend[0].view_as(output))

    def add(values: Tensor) -> None:
        addend[:] = [values]

    try:
        yield add
    finally:
        handle.remove()


def layer_hessian(
    model: Any, layer: nn.Module, windows: Tensor, seed: int = 0
) -> tuple[Callable[[Tensor], Tensor], int]:
    """Return the product with the Hessian by a layer's output, summed over windows, and the Hessian's size m.

    A graph is kept for each window, so windows are short and few.
    """
    draw, m = torch.Generator().manual_seed(seed), linear_weight(layer).shape[0]

    def window_loss(ids: Tensor) -> Callable[[Tensor], Tensor]:
        def loss(added: Tensor) -> Tensor:
            with added_to_output(layer) as add:
                add(added)
                return model(input_ids=ids, labels=ids, use_cache=False).loss * (ids.numel() - 1)

        return loss

    products = [sampled_hessian(window_loss(ids), (ids.numel(), m), draw) for ids in windows.split(1)]
    return lambda vectors: sum((product(vectors) for product in products), torch.zeros_like(vectors)), m


def captured(basis: Tensor, vectors: Tensor) -> float:
    """Return the mean share of unit vectors that lies in a subspace, by squared length."""
    return (basis.T @ vectors.to(basis.dtype)).square().sum(0).mean().item()


def hessian(options: argparse.Namespace, data: Path) -> None:
    """The share of the Hessian's leading eigenvectors that the kept inputs hold, in layers of high and of low rho."""
    folder = options.output / "hessian"
    folder.mkdir(parents=True, exist_ok=True)
    model, tokenizer, targets = loaded(options.model)
    model.set_attn_implementation("eager")  # the others have no second derivative
    files = [str(data / file) for file in CALIBRATION]
    windows = calibration_windows(files, tokenizer, windows=options.windows, window=options.window, seed=0)
    statistics = GatheredStatistics(model, tokenizer, targets, windows, options.output / "statistics")
    scores = {name: row["debiased"] for name, row in statistics.scores().items()}
    moments = statistics.moments(["svd", "grad-svd", "fasc"])
    short = windows[:, : options.hessian_window][: options.hessian_windows]
    high, low = divisions(scores, float("inf"))["fifths"]
    by_rho = sorted(high, key=lambda name: -scores[name]), sorted(low, key=lambda name: scores[name])
    rows: list[Row] = []
    for group, names in zip(("high", "low"), by_rho, strict=True):
        for name in names[:HESSIANS]:
            path = folder / f"{name}.json"
            if not path.exists():
                write_json(hessian_row(model, targets[name], moments.layer(name), short, options.eigenvectors), path)
            rows.append({"layer": name, "rho": f"{group}, {scores[name]:.2f}", **json.loads(path.read_text())})
            print(rows[-1], flush=True)
    (folder / "hessian.md").write_text(markdown_table(percent(rows)) + "\n")


def hessian_row(model: Any, layer: nn.Module, moments: LayerMoments, windows: Tensor, count: int) -> Row:
    """Return the overlaps of one layer. The Hessian by the inputs is W^T H W, since only the layer reads them so."""
    W = linear_weight(layer)
    product, m = layer_hessian(model, layer, windows)
    values, vectors = leading_eigenvectors(product, m, count)
    left = (W.T @ vectors).double()  # W^T H W = left diag(values) left^T
    Q, R = torch.linalg.qr(left)
    inner, rotation = torch.linalg.eigh(R @ torch.diag(values.double()) @ R.T)
    inputs = Q @ rotation[:, inner.abs().argsort(descending=True)]
    fisher = torch.linalg.eigh(moments.G.double())[1][:, -count:]
    row: Row = {
        "positive eigenvalues": (values > 0).double().mean().item(),
        "output: Fisher's leading ones": captured(fisher, vectors),
        "output: by chance": count / m,
    }
    for method in METHODS:
        row[f"input: kept by {method}"] = captured(kept_subspace(method, W, moments), inputs)
    return {**row, "input: by chance": resolve_rank(W.shape[0], W.shape[1], RANK) / W.shape[1]}


# All parts.


def loaded(name: str) -> tuple[Any, Any, dict[str, nn.Module]]:
    """Return the model in eval mode without gradients of its weights, its tokenizer, and its layers."""
    model, tokenizer = load_model(name)
    model.eval().requires_grad_(False)
    return model, tokenizer, select_layers(model)


def percent(rows: Sequence[Row]) -> list[Row]:
    """Return rows with shares as percentages."""
    return [{key: f"{value:.1%}" if isinstance(value, float) else value for key, value in row.items()} for row in rows]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the parts, or the named ones."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--output", type=Path, default=Path("benchmarks/results/paper_claims"))
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    add("--model", default="smollm2")
    add("--windows", type=int, default=64, help="of the calibration")
    add("--window", type=int, default=512)
    add("--eval-windows", type=int, default=16, help="of each text")
    add("--relations", type=int, default=12, help="of facts in each language")
    add("--facts", type=int, default=20, help="of each relation and language; ten times as many numbers")
    add("--pairs", type=int, default=20, help="of each paradigm of BLiMP")
    add("--layers", type=int, default=42, help="of the sensitivity")
    add("--stability-windows", type=int, default=16, help="of each text")
    add("--hessian-windows", type=int, default=8)
    add("--hessian-window", type=int, default=64)
    add("--eigenvectors", type=int, default=16)
    options = parser.parse_args(arguments)
    folder = os.environ.get("FASC_DATA")
    if folder is None:
        sys.exit("Expected FASC_DATA to name the folder that holds the texts.")
    options.output.mkdir(parents=True, exist_ok=True)
    runs = {
        "syntax": syntax,
        "layers": layers,
        "sensitivity": sensitivity,
        "stability": stability,
        "hessian": hessian,
    }
    for part in options.parts:
        print(f"{part}:", flush=True)
        runs[part](options, Path(folder))


if __name__ == "__main__":
    main()
