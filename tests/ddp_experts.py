"""A frozen calibration of a mixture, in which each process sees some experts only, and two steps of training after it.

Run as a script, by each process of a group.
"""

from __future__ import annotations

import copy
import sys
import warnings
from pathlib import Path

import lightning.pytorch as pl
import torch
from inside import moments_of
from torch.utils.data import DataLoader
from transformers import MixtralConfig, MixtralForCausalLM

from fasc_lightning import CausalLMModule, FascCallback
from fasc_lightning.layers import split_name

#: Of four experts. Samples of even number, the first process's, go to 0 and 1, the others to 1 and 2, and none to 3.
LOW, HIGH = (0, 1), (1, 2)
VOCABULARY = 32


class Saving(FascCallback):
    """Keeps the moments of every process."""

    def on_fit_end(self, trainer, pl_module):
        self.moments = copy.deepcopy(moments_of(self))
        super().on_fit_end(trainer, pl_module)


def mixture() -> MixtralForCausalLM:
    """A mixture whose router goes by the numbers of the tokens."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = MixtralConfig(vocab_size=VOCABULARY, num_hidden_layers=1, num_local_experts=4, **sizes)
    model = MixtralForCausalLM(config)
    seen: list[torch.Tensor] = []

    def remember(module, args, kwargs):
        seen[:] = [kwargs["input_ids"] if "input_ids" in kwargs else args[0]]

    def route(module, args, output):
        high = seen[0].flatten()[:, None] >= VOCABULARY // 2
        index = torch.where(high, torch.tensor(HIGH), torch.tensor(LOW))
        weights = output[0].softmax(-1).gather(1, index)
        return output[0], weights / weights.sum(-1, keepdim=True), index

    model.register_forward_pre_hook(remember, with_kwargs=True)
    model.model.layers[0].mlp.gate.register_forward_hook(route)
    return model


def samples() -> list[dict[str, torch.Tensor]]:
    """Sixteen sequences, by turns of low and of high tokens."""
    generator = torch.Generator().manual_seed(1)
    half = VOCABULARY // 2
    return [{"input_ids": torch.randint(half, (12,), generator=generator) + half * (i % 2)} for i in range(16)]


def main() -> None:
    devices, name, folder = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    module = CausalLMModule(mixture())
    callback = Saving(keep=0.7, update_weights=False, refit=False, allocation="fisher")

    def trainer(*callbacks: pl.Callback, **options) -> pl.Trainer:
        quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
        strategy = "ddp" if devices > 1 else "auto"
        return pl.Trainer(
            accelerator="cpu", devices=devices, strategy=strategy, callbacks=[*callbacks], **quiet, **options
        )

    loader = DataLoader(samples(), batch_size=2)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        fit = trainer(callback, max_epochs=1)
        fit.fit(module, loader)
    moments = callback.moments
    reached = [layer for layer in moments.shapes if moments.tokens(layer)]
    content = {
        "moments": {layer: vars(moments.layer(layer)) for layer in reached},
        "tokens": {row.name: row.tokens for row in callback.report.layers if split_name(row.name)},
        "layouts": {row.name: row.layout for row in callback.report.layers},
        "rho": {row.name: row.rho for row in callback.report.layers},
        "state": copy.deepcopy(module.state_dict()),
        "said": [str(warning.message) for warning in said],
    }
    # Of the experts that a process does not see, DDP would wait for gradients.
    trainer(max_steps=2).fit(module, loader)
    content["trained"] = module.state_dict()
    torch.save(content, folder / f"{name}-{fit.global_rank}.pt")


if __name__ == "__main__":
    main()
