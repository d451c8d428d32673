"""The gain of recovery: SmolLM2-135M-Instruct on P1's texts and facts, by arm, teacher, budget and tokens.

    FASC_DATA=<folder with the texts> python benchmarks/recovery.py --output benchmarks/results/recovery

recipes/compress.py compresses once per budget, on its defaults, and every arm recovers that model in a process of its
own. The first budget of either kind, shares of the parameters and sizes in bytes, is recovered by every arm on few
tokens. The arm with the least held-out loss of labels recovers all budgets of its kind on many tokens. Reports are
saved when they end, and existing rows are not run again (delete their files after a change of the code). No evaluation
text is trained on. The tables are printed as Markdown.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import lightning.pytorch as pl
import torch
from p1 import CALIBRATION, FACTS, TEXTS, run_row

from fasc_lightning import CausalLMModule, FactorRecovery, LoraRecovery, load_compressed, recover
from fasc_lightning.cli import KERNEL_CACHE, write_json
from fasc_lightning.data import calibration_windows, load_model, window_loader
from fasc_lightning.evaluation import Questions
from fasc_lightning.layers import dequantized, select_layers
from fasc_lightning.options import Precision

WINDOW = 512
BATCH = 1
#: Windows of the recovery's texts that choose the best state; they count as tokens of the recovery.
HELD = 16
#: Seed of the order of the texts' windows; it differs from the calibration's.
SEED = 1
EVAL_WINDOWS = 32

ARMS: dict[str, LoraRecovery | FactorRecovery] = {
    "lora, labels": LoraRecovery(),
    "lora, dense teacher": LoraRecovery(teacher="dense"),
    "factors, labels": FactorRecovery(),
    "factors, dense teacher": FactorRecovery(teacher="dense"),
}
#: The arm with steps block by block first.
REFINED = "factors, labels, blocks refined first"
RECOVERIES = {**ARMS, REFINED: FactorRecovery(refine_steps=64)}
#: The arms of sizes in bytes: adapters cannot be merged into few bits.
SIZE_ARMS = ("factors, labels", "factors, dense teacher")
#: The arm without training.
NONE = "none"
#: The reference: the dense model, trained in the same way on the labels of the same tokens.
DENSE = "dense, fine-tuned by lora"
YARDSTICK = LoraRecovery()


def compression_options(budget: str) -> list[str]:
    """Return the recipe's options for a budget such as "keep0.8" or "size0.21"."""
    option = budget.rstrip("0123456789.")
    return [f"--{option}", budget.removeprefix(option)]


def row_name(arm: str, budget: str, tokens: int) -> str:
    """Return the stem of a row's report."""
    return f"{arm.replace(', ', '-').replace(' ', '-')}-{budget}-{tokens // 1000}k"


def run(arm: str, budget: str, tokens: int, data: Path, output: Path, precision: Precision | None) -> dict[str, Any]:
    """Recover the compressed model of a budget, measure it, and return the row."""
    dense, tokenizer = load_model("smollm2")
    dense.eval()
    windows = calibration_windows(
        [str(data / file) for file in CALIBRATION], tokenizer, windows=tokens // WINDOW, window=WINDOW, seed=SEED
    )
    train, held = window_loader(windows[HELD:], BATCH), window_loader(windows[:HELD], BATCH)
    start, figures = time.perf_counter(), None
    if arm == DENSE:
        model = dense
        fine_tune(model, train, replace(YARDSTICK, precision=precision))
    else:
        model = load_compressed(output / budget)
        recovery = replace(RECOVERIES[arm], precision=precision)
        teacher = dense if recovery.teacher is not None or recovery.refine_steps else None
        figures = recover(model, train, recovery, dense=teacher, held_out=held)
    seconds = time.perf_counter() - start
    questions = Questions.load(
        {name: str(data / file) for name, file in TEXTS.items()},
        str(data / FACTS),
        tokenizer,
        windows=EVAL_WINDOWS,
        window=WINDOW,
    )
    questions = replace(questions, heldout=held)
    with dequantized(model):
        found = questions.measure(model, tokenizer)
    assert found.facts is not None
    return {
        "arm": arm,
        "budget": budget,
        "tokens": tokens,
        "batch": BATCH * WINDOW,
        "precision": precision,
        "perplexity": found.perplexity,
        "facts": found.facts.percent,
        "held_out": found.heldout,
        "seconds": seconds,
        "recovery": figures,
    }


def fine_tune(model: Any, train: Any, recovery: LoraRecovery) -> None:
    """Train adapters on the layers that other rows compress, with a recovery's steps and rate, and merge them."""
    from peft import get_peft_model

    config = recovery.lora_config()
    config.target_modules = list(select_layers(model))
    torch.manual_seed(0)
    adapted = get_peft_model(model, config)
    train_adapters(adapted, train, recovery)
    adapted.merge_and_unload()


def train_adapters(adapted: Any, train: Any, recovery: LoraRecovery) -> None:
    """Train the adapters of a peft model with a recovery's epochs, rate and precision."""
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=recovery.epochs,
        precision=recovery.precision,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    trainer.fit(CausalLMModule(adapted, recovery.rate, schedule="cosine"), train)


def unrecovered(report: dict[str, Any], budget: str, state: str) -> dict[str, Any]:
    """Return the row of a model without recovery, from the report of its compression."""
    perplexity = {name: report["perplexity"][name][state] for name in TEXTS}
    return {"arm": NONE, "budget": budget, "perplexity": perplexity, "facts": report["facts"][state]}


def table(rows: Sequence[dict[str, Any]], dense: dict[str, Any]) -> str:
    """Return rows as a Markdown table, each figure with its ratio to, or share of, the dense model's."""
    first = " | ".join(f"{dense['perplexity'][name]:.2f}" for name in TEXTS)
    lines = [
        "| budget | recovery | tokens | WikiText-2 | C4, other domain | facts | minutes |",
        "|---|---|---|---|---|---|---|",
        f"| | dense | | {first} | {dense['facts']:.1f} % | |",
    ]
    for row in rows:
        budget = "" if row["arm"] == DENSE else " ".join(compression_options(row["budget"])).strip("-")
        tokens, minutes = (f"{row['tokens'] // 1000}k", f"{row['seconds'] / 60:.0f}") if "tokens" in row else ("", "")
        texts = (f"{row['perplexity'][name]:.2f} ({_times(row, dense, name)}x)" for name in TEXTS)
        facts = f"{row['facts']:.1f} % ({100 * row['facts'] / dense['facts']:.1f} % of dense)"
        lines.append("| " + " | ".join([budget, row["arm"], tokens, *texts, facts, minutes]) + " |")
    return "\n".join(lines)


def _times(row: dict[str, Any], dense: dict[str, Any], text: str) -> str:
    return f"{row['perplexity'][text] / dense['perplexity'][text]:.3f}"


def main() -> None:
    """Run all missing rows, or one of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/recovery"))
    parser.add_argument("--keep", type=float, nargs="*", default=[0.8, 0.6, 0.4], help="budgets of the best arm")
    parser.add_argument("--size", type=float, nargs="*", default=[0.27, 0.21], help="sizes in bytes")
    parser.add_argument("--table-tokens", type=int, default=60_000, help="of every arm, at the first budget")
    parser.add_argument("--tokens", type=int, default=400_000, help="of the best arm, at all budgets")
    parser.add_argument(
        "--best", choices=list(ARMS), help="arm of the long runs where it can be; default: the best of few"
    )
    parser.add_argument(
        "--precision",
        default="bf16-mixed",
        choices=get_args(Precision),
        help="of the training; measuring is in float32",
    )
    parser.add_argument("--row", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    folder = os.environ.get("FASC_DATA")
    if folder is None or not (Path(folder) / FACTS).exists():
        sys.exit(f"Expected FASC_DATA to name the folder that holds {FACTS} and the texts, but it is {folder!r}.")
    data, output = Path(folder), arguments.output
    output.mkdir(parents=True, exist_ok=True)
    if arguments.row is not None:
        arm, budget, tokens = json.loads(arguments.row)
        found = run(arm, budget, tokens, data, output, arguments.precision)
        write_json(found, output / f"{row_name(arm, budget, tokens)}.json")
        return

    def row(arm: str, budget: str, tokens: int) -> dict[str, Any]:
        path = output / f"{row_name(arm, budget, tokens)}.json"
        if not path.exists():
            command = [sys.executable, __file__, "--output", str(output), "--precision", arguments.precision]
            subprocess.run(
                [*command, "--row", json.dumps([arm, budget, tokens])], check=True, env={**KERNEL_CACHE, **os.environ}
            )
        return json.loads(path.read_text())

    def compressed(budget: str) -> dict[str, Any]:
        options = [*compression_options(budget), "--output", str(output / budget)]
        return run_row(budget, options, data, output)

    def recovered(budgets: Sequence[str], arms: Sequence[str], others: Sequence[str]) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = []
        for number, budget in enumerate(budgets):
            rows.append(unrecovered(compressed(budget), budget, "compressed"))
            if number == 0:
                trained = [row(arm, budget, arguments.table_tokens) for arm in arms]
                rows += [*trained, *(row(arm, budget, arguments.table_tokens) for arm in others)]
                # By the loss of labels on the recovery's own text, because a teacher's loss is another quantity.
                best = min(trained, key=lambda found: found["held_out"])["arm"]
                best = arguments.best if arguments.best in arms else best
            rows.append(row(best, budget, arguments.tokens))
        return rows

    ranks, sizes = [f"keep{keep:g}" for keep in arguments.keep], [f"size{size:g}" for size in arguments.size]
    if not (ranks or sizes):
        sys.exit("Expected a budget, --keep or --size, but got none.")
    first = (ranks or sizes)[0]
    dense = unrecovered(compressed(first), first, "dense")
    rows = recovered(ranks, list(ARMS), (REFINED, DENSE)) + recovered(sizes, SIZE_ARMS, () if ranks else (DENSE,))
    text = table(rows, dense)
    (output / "recovery.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
