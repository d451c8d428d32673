"""Track rho while a model learns facts: loss, recall and rho against the step, beside a control with nothing to learn.

The defaults need no data and no network. A small decoder is trained from scratch on made-up biographies, and is asked
for their facts in sentences that it never read. The control follows: the same model on the same sentences, but in each
epoch the facts belong to other people. A change of rho in both runs does not come from memorising facts.

    python recipes/track_rho.py

A killed run continues from its last checkpoint with `--resume true`, with the same results. Fine-tuning on your own
text, without a control; facts, if given, are asked for during training:

    python recipes/track_rho.py --model smollm2 --text FILE --eval-facts facts.jsonl

The output folder holds `training.png` (loss, recall, rho), `heatmap.png` and `profile.png`, the tables `history.csv`
(rho) and `training.csv` (loss, recall), the control's files as `control_*`, the model, and `report.json`.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from biographies import biography_windows, make_people, recall_facts, word_tokenizer
from jsonargparse import Namespace
from run_report import Run, full_report, over_layers, write_outputs
from torch import Tensor
from window_stream import BatchStream, shuffled_windows

from fasc_lightning import CausalLMModule, FascCallback
from fasc_lightning.cli import (
    CommandParser,
    Row,
    mapping,
    plain,
    read_json,
    require,
    run_program,
    whole_file,
    write_json,
)
from fasc_lightning.data import file_windows, load_model
from fasc_lightning.evaluation import Fact, FactsResult, factual_recall, load_facts

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# The small decoder: 2.8 million parameters with the words of 300 biographies.
WIDTH, INNER_WIDTH, LAYERS, HEADS = 192, 512, 6, 4
# The facts of this many people are asked for: a second each time, some sixty times with the defaults.
RECALL_PEOPLE = 100
# The defaults: from scratch on biographies, and fine-tuning on a text (None means one pass over it).
FROM_SCRATCH = {"steps": 900, "batch_size": 16, "window": 64, "learning_rate": 2e-3}
FINE_TUNING = {"steps": None, "batch_size": 4, "window": 256, "learning_rate": 2e-5}
OBSERVATIONS = 15
CHECKPOINT_EVERY = 3  # observations


def build_parser() -> CommandParser:
    """Return the parser of this recipe's options."""
    parser = CommandParser(__doc__)
    add = parser.add_argument
    add("--config", action="config", help="YAML file with any of these options")
    add("--model", help="folder, hub id, or smollm2, to fine-tune on --text; default: a small decoder from scratch")
    add("--text", help="text or jsonl file (also .xz) to fine-tune --model on; default: made-up biographies")
    add("--eval-facts", help="jsonl file with subject, relation, template, object, kind, to ask --model for")
    add("--people", type=int, default=300, help="how many biographies")
    add("--control", choices=["true", "false"], help="run again on shuffled facts; default: true without --text")
    add("--steps", type=int, help="optimizer steps; default: 900, with --text one pass over it")
    add("--learning-rate", type=float, help="highest one; default: 2e-3, with --model 2e-5")
    add("--batch-size", type=int, help="windows a step; default: 16, with --model 4")
    add("--window", type=int, help="tokens a window; default: 64, with --model 256")
    add("--monitor-every-n-steps", type=int, help="observe rho, recall and loss so often; default: 15 times a run")
    add("--monitor-tokens", type=int, default=512, help="tokens of a batch that rho is observed on")
    add("--rho-threshold", type=float, default=0.3, help="rho above which a layer counts as high")
    add("--seed", type=int, default=0, help="of people, wording, order of batches, weights, permutations")
    add("--output", default="rho_run", help="folder for tables, figures, checkpoints and the model")
    add("--report", help="JSON file for the report; default: report.json in the output folder")
    add("--resume", default="false", choices=["true", "false"], help="go on from the output folder's last checkpoint")
    return parser


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the recipe and return the report that it writes."""
    start = time.perf_counter()
    options = check(build_parser().parse_args(list(sys.argv[1:] if arguments is None else arguments)))
    task = text_task(options) if options.text else biographies_task(options)
    complete(options, task)
    output = Path(options.output)
    prepare_folder(options, list(task.runs))
    runs = {name: train(name, task, options) for name in task.runs}
    report = full_report(options, runs, time.perf_counter() - start)
    write_outputs(runs, options.rho_threshold, output)
    write_json(report, options.report or output / "report.json")
    print("\n".join(["", *report["reading"], "", f"Tables and figures are in {output}."]))
    return report


def check(options: Namespace) -> Namespace:
    """Fill in defaults, and refuse invalid options before anything is loaded.

    Raises:
        ValueError: If options are out of range or contradict each other.
        FileNotFoundError: If a file is missing.
        ModuleNotFoundError: If matplotlib is not installed.
    """
    require("The figures need", "plot", "matplotlib")
    if (options.model is None) != (options.text is None):
        raise ValueError("Expected --model and --text together, to fine-tune the one on the other, or neither.")
    if options.eval_facts and not options.text:
        raise ValueError("Expected --eval-facts with --model and --text only: the biographies bring their own facts.")
    if options.control == "true" and options.text:
        raise ValueError("Expected --control true without --text only: the facts of a text cannot be shuffled.")
    options.control = options.control or ("false" if options.text else "true")
    for name, value in (FINE_TUNING if options.text else FROM_SCRATCH).items():
        if options[name] is None:
            options[name] = value
    for name in ("steps", "batch_size", "window"):
        least = 2 if name == "window" else 1
        if options[name] is not None and options[name] < least:
            raise ValueError(f"Expected --{name.replace('_', '-')} to be at least {least} but got {options[name]}.")
    if not 0 < options.learning_rate < math.inf:
        raise ValueError(f"Expected --learning-rate to be positive but got {options.learning_rate}.")
    monitor(options, every=options.monitor_every_n_steps if options.monitor_every_n_steps is not None else 1)
    for path in filter(None, [options.text, options.eval_facts]):
        if not Path(path).is_file():
            raise FileNotFoundError(f"Expected a file but {path} is none.")
    return options


def monitor(options: Namespace, every: int) -> FascCallback:
    """Return a callback that observes rho and changes nothing; it refuses wrong values."""
    # Under the flat names, so that errors name the recipe's options.
    names = ("monitor_tokens", "rho_threshold", "seed")
    flat: dict[str, Any] = {"monitor_every_n_steps": every, **{name: options[name] for name in names}}
    return FascCallback(**flat)


# The model, its data and the facts.


@dataclass(frozen=True)
class Task:
    """The parts that the runs share, and the data of each run.

    Attributes:
        make_model: Returns the initial model, the same for each run.
        tokenizer: Its tokenizer.
        facts: Facts to ask for during training; may be empty.
        runs: For each run by name, the main one first, a function from the index of an epoch to its windows: token ids
            of shape (windows, window). They depend on the index and the options alone.
    """

    make_model: Callable[[], PreTrainedModel]
    tokenizer: PreTrainedTokenizerBase
    facts: list[Fact]
    runs: Mapping[str, Callable[[int], Tensor]]


def biographies_task(options: Namespace) -> Task:
    """Return the training of a small decoder on biographies, and its control."""
    people = make_people(options.people, options.seed)
    tokenizer = word_tokenizer(people)
    windows = partial(biography_windows, people, tokenizer, options.window, options.seed)
    runs = {"facts": windows}
    if options.control == "true":
        runs["control"] = partial(windows, shuffled=True)
    model = partial(small_decoder, tokenizer, options.window, options.seed)
    return Task(model, tokenizer, recall_facts(people[:RECALL_PEOPLE]), runs)


def small_decoder(tokenizer: PreTrainedTokenizerBase, window: int, seed: int) -> PreTrainedModel:
    """Return a decoder of Llama's architecture with random weights, the same for the same seed."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=INNER_WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        max_position_embeddings=max(window, 64),  # room for questions if windows are very short
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def text_task(options: Namespace) -> Task:
    """Return the fine-tuning of a model on a text."""
    model, tokenizer = load_model(options.model)
    windows = file_windows(options.text, tokenizer, None, options.window)
    facts = load_facts(options.eval_facts) if options.eval_facts else []
    if options.steps is None:
        options.steps = -(-len(windows) // options.batch_size)
    return Task(lambda: model, tokenizer, facts, {"text": partial(shuffled_windows, windows, options.seed)})


def complete(options: Namespace, task: Task) -> None:
    """Fill in the steps between observations, which depend on the number of steps."""
    if options.monitor_every_n_steps is None:
        options.monitor_every_n_steps = max(1, options.steps // OBSERVATIONS)
    asked = f"asked for {len(task.facts)} facts" if task.facts else "asked for no facts"
    print(
        f"{' and '.join(task.runs)}: {options.steps} steps of {options.batch_size} windows of {options.window} tokens, "
        f"observed every {options.monitor_every_n_steps} steps, {asked}"
    )


# One run.


class Training(CausalLMModule):
    """Next-token training with a warm-up and a cosine decay of the learning rate.

    Args:
        model: A causal language model.
        steps: Optimizer steps in all.
        learning_rate: The highest one.
        weight_decay: Weight decay of matrices.
    """

    def __init__(self, model: PreTrainedModel, steps: int, learning_rate: float, weight_decay: float) -> None:
        super().__init__(model, learning_rate, weight_decay)
        self.steps = steps

    def configure_optimizers(self) -> Any:
        """Return AdamW, without decay of norms and biases, and its schedule."""
        matrices = [p for p in self.parameters() if p.ndim > 1]
        vectors = [p for p in self.parameters() if p.ndim <= 1]
        groups = [
            {"params": matrices, "weight_decay": self.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=self.learning_rate, betas=(0.9, 0.95))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(warmup_cosine, steps=self.steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def warmup_cosine(step: int, steps: int, warmup: float = 0.05, lowest: float = 0.05) -> float:
    """Return the share of the highest learning rate, which rises on a line and falls on a cosine.

    Args:
        step: Optimizer steps so far.
        steps: Optimizer steps in all.
        warmup: Share of the steps in which the rate rises.
        lowest: The share at the end.
    """
    up = max(1, round(warmup * steps))
    if step < up:
        return (step + 1) / up
    return lowest + (1 - lowest) * 0.5 * (1 + math.cos(math.pi * (step - up) / max(1, steps - up)))


class TrainingLog(pl.Callback):
    """Table of loss and recall at steps 0, n, 2n, ... and the last, and the checkpoints of a run.

    Recall and rho of one step are measured with the same weights. The loss is the mean over the steps since the
    previous row, so it is NaN at step 0.

    Args:
        name: Name of the run, for messages.
        model: The trained model.
        task: Its tokenizer and facts.
        every_n_steps: Steps from one row to the next.
        checkpoint: File that is written every few rows and at the end, whole or not at all.
        rho: The callback with the history of rho; it must stand before this one in the Trainer's list.
    """

    def __init__(
        self,
        name: str,
        model: PreTrainedModel,
        task: Task,
        every_n_steps: int,
        checkpoint: Path,
        rho: FascCallback,
    ) -> None:
        self.name = name
        self.model = model
        self.task = task
        self.every_n_steps = every_n_steps
        self.checkpoint = checkpoint
        self.rho = rho
        self.rows: list[Row] = []
        self.recall: FactsResult | None = None
        self.seconds = {"train": 0.0, "recall": 0.0}
        self._losses: list[float] = []
        self._began = 0.0

    def state_dict(self) -> dict[str, Any]:
        """Return the table as plain numbers; checkpoints come right after a row, when no loss is pending."""
        recall = self.recall and self.recall.to_dict()
        return {"rows": self.rows, "recall": recall, "seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the table of a checkpoint."""
        self.rows, self.seconds = state_dict["rows"], state_dict["seconds"]
        if recall := state_dict["recall"]:
            kinds = {kind: (value["percent"], value["count"]) for kind, value in recall["by_kind"].items()}
            self.recall = FactsResult(**{**recall, "by_kind": kinds})

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Add the row of step 0."""
        self._began = time.perf_counter()
        if trainer.global_step == 0:
            self._row(trainer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Record the loss; add a row and write a checkpoint if they are due.

        Raises:
            FloatingPointError: If the loss is not finite.
        """
        loss = outputs["loss"].item()
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"Expected a finite loss but got {loss} at step {trainer.global_step} of {self.name}. "
                "Try a smaller --learning-rate."
            )
        self._losses.append(loss)
        step, last = trainer.global_step, trainer.global_step == trainer.max_steps
        if step % self.every_n_steps == 0 or last:
            self._row(trainer)
        if step % (CHECKPOINT_EVERY * self.every_n_steps) == 0 or last:
            now = time.perf_counter()
            self.seconds["train"] += now - self._began
            self._began = now
            with whole_file(self.checkpoint) as temporary:
                trainer.save_checkpoint(temporary, weights_only=False)

    def _row(self, trainer: pl.Trainer) -> None:
        start = time.perf_counter()
        if self.task.facts:
            self.recall = factual_recall(self.model, self.task.tokenizer, self.task.facts)
        took = time.perf_counter() - start
        self.seconds["recall"] += took
        self._began += took
        loss = sum(self._losses) / len(self._losses) if self._losses else math.nan
        self._losses = []
        recall = self.recall.percent if self.recall else math.nan
        self.rows.append({"step": trainer.global_step, "loss": loss, "recall": recall})
        print(self._message(trainer.max_steps), flush=True)

    def _message(self, steps: int) -> str:
        row = self.rows[-1]
        parts = [f"{self.name}, step {row['step']} of {steps}"]
        if not math.isnan(row["loss"]):
            parts.append(f"loss {row['loss']:.3f}")
        if self.recall:
            parts.append(f"recall {row['recall']:.1f} % (chance {self.recall.chance:.1f} %)")
        if history := self.rho.rho_history:
            rho, debiased = over_layers(history, "rho")[-1], over_layers(history, "debiased")[-1]
            parts.append(f"mean rho {rho:.3f}, debiased {debiased:.3f} at step {history.steps[-1]}")
        return "; ".join(parts)


def train(name: str, task: Task, options: Namespace) -> Run:
    """Train one model, or finish its training; a finished run only reads its checkpoint."""
    checkpoint = checkpoint_path(options, name)
    weight_decay = 0.0 if options.text else 0.1
    model = task.make_model().train()
    module = Training(model, options.steps, options.learning_rate, weight_decay)
    rho = monitor(options, options.monitor_every_n_steps)
    log = TrainingLog(name, model, task, options.monitor_every_n_steps, checkpoint, rho)
    trainer = pl.Trainer(
        accelerator="auto",
        devices=1,
        max_steps=options.steps,
        gradient_clip_val=1.0,
        callbacks=[rho, log],
        logger=False,
        enable_checkpointing=False,  # the log writes them
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=options.output,
    )
    batches = BatchStream(task.runs[name], options.batch_size, options.steps)
    trainer.fit(module, batches, ckpt_path=checkpoint if checkpoint.is_file() else None)
    return Run(model.cpu().eval(), task.tokenizer, rho.rho_history, log.rows, log.recall, log.seconds)


def checkpoint_path(options: Namespace, run: str) -> Path:
    """Return where a run's checkpoint is."""
    return Path(options.output) / f"{run}.ckpt"


def prepare_folder(options: Namespace, runs: Sequence[str]) -> None:
    """Write the options to the output folder; delete checkpoints of other runs, or check that they belong to this one.

    Raises:
        ValueError: If the run to resume had other options.
    """
    path = Path(options.output) / "options.json"
    immaterial = ("config", "output", "report", "resume")
    ours = {name: value for name, value in options.as_dict().items() if name not in immaterial}
    if options.resume == "true" and path.is_file():
        theirs = read_json(path, mapping(plain))
        if changed := [name for name in ours if theirs.get(name) != ours[name]]:
            was = ", ".join(f"--{name.replace('_', '-')} {theirs.get(name)}" for name in changed)
            raise ValueError(
                f"Expected the options of the run that is resumed, but it had {was}. Give the same ones, or start "
                "again without --resume."
            )
    else:
        for name in runs:
            checkpoint_path(options, name).unlink(missing_ok=True)
        write_json(ours, path)
    if options.resume == "true" and not any(checkpoint_path(options, name).is_file() for name in runs):
        print(f"No checkpoint in {options.output}: starting from the beginning")


if __name__ == "__main__":
    run_program(main)
