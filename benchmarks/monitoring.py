"""The cost of tracking rho: the time of a training step with and without it, in one run.

    python benchmarks/monitoring.py --output benchmarks/results

A Trainer trains for a few steps with `FascCallback(monitor=2)`. Every other step is observed and the
steps between are plain, so the difference of their medians is the cost of an observation. The overhead is this cost
spread over the steps from one observation to the next. The models are the small decoder of `recipes/track_rho.py` on
its batches (16 x 64 tokens) and SmolLM2-135M-Instruct (1 x 512 and 8 x 128 tokens), with full training steps by AdamW.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from interleaved import wait_for
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from fasc_lightning import CausalLMModule, FascCallback
from fasc_lightning.cli import write_json
from fasc_lightning.data import load_model

#: Steps from one observation to the next, in the README's example and in the recipe.
EVERY = (50, 60)

#: Sequences in a batch of SmolLM2 and their length.
SIZES = ((1, 512), (8, 128))


class StepTimer(pl.Callback):
    """Times whole batches; it stands first in the list of callbacks, so that a batch begins before the others act.

    An accelerator's work is waited for.
    """

    def __init__(self) -> None:
        self.starts: list[float] = []

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        """Record the time; the end of a batch is the start of the next."""
        wait_for(trainer.strategy.root_device)
        self.starts.append(time.perf_counter())

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Record the end of the last batch."""
        wait_for(trainer.strategy.root_device)
        self.starts.append(time.perf_counter())

    @property
    def seconds(self) -> list[float]:
        """Return the time of each batch."""
        return [end - start for start, end in zip(self.starts[:-1], self.starts[1:], strict=True)]


def small_decoder() -> LlamaForCausalLM:
    """Return a decoder of the shape that `recipes/track_rho.py` trains."""
    config = LlamaConfig(
        vocab_size=1200, hidden_size=192, intermediate_size=512, num_hidden_layers=6, num_attention_heads=4
    )
    return LlamaForCausalLM(config)


def measure(model: Any, batch_size: int, length: int, steps: int, accelerator: str = "cpu") -> dict[str, float]:
    """Train for some steps, every other one observed, and return seconds and overheads."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (steps + 2, batch_size, length), generator=generator)
    timer, callback = StepTimer(), FascCallback(monitor=2)
    trainer = pl.Trainer(
        accelerator=accelerator,
        devices=1,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[timer, callback],
    )
    module = CausalLMModule(model.train())
    trainer.fit(module, DataLoader([{"input_ids": x} for x in ids], batch_size=None))  # type: ignore[arg-type]
    seconds = timer.seconds[2:]  # the first two allocate
    observed, plain = statistics.median(seconds[::2]), statistics.median(seconds[1::2])
    result = {"tokens": batch_size * length, "plain_step": plain, "observed_step": observed}
    result["observation_in_steps"] = (observed - plain) / plain
    return {**result, **{f"overhead_every_{n}": (observed - plain) / plain / n for n in EVERY}}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run all, print, and save as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--steps", type=int, default=8, help="steps on SmolLM2; ten times as many on the small model")
    options = parser.parse_args(arguments)
    results = {"small decoder 16 x 64": measure(small_decoder(), 16, 64, 10 * options.steps)}
    for batch_size, length in SIZES:
        model, _ = load_model("smollm2")
        results[f"SmolLM2-135M {batch_size} x {length}"] = measure(model, batch_size, length, options.steps)
    for name, result in results.items():
        print(
            f"{name:24s} step {result['plain_step']:.2f} s, with an observation {result['observed_step']:.2f} s: "
            + ", ".join(f"{result[f'overhead_every_{n}']:.1%} every {n} steps" for n in EVERY)
            + " (at most 1 % wanted)"
        )
    write_json({"threads": torch.get_num_threads(), "results": results}, options.output / "monitoring.json")


if __name__ == "__main__":
    main()
