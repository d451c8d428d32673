"""A small module that is compressed hard, so that there is something to recover, and data for it."""

from __future__ import annotations

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from tiny import Tokens, causal_module, made_once
from torch import nn
from torch.utils.data import DataLoader
from watching import assert_no_hooks

from fasc_lightning import CausalLMModule, FactorRecovery, FascCallback, LoraRecovery
from fasc_lightning.layers import compressed_layers
from fasc_lightning.recovery._adapters import carries_adapters

#: Options of a compression that is fast and loses much.
FAST = {"rank": 0.25, "allocation": "uniform", "refit": False, "update_weights": False}


def training_loader(samples: int = 32, **settings) -> DataLoader:
    return DataLoader(Tokens(samples=samples, length=16, **settings), batch_size=4)


@made_once
def trained() -> CausalLMModule:
    """A module that has learned something."""
    module = causal_module()
    module.learning_rate = 1e-2
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    pl.Trainer(accelerator="cpu", max_epochs=6, **quiet).fit(module, training_loader())
    module.trainer = None
    return module


def compressed(
    make_trainer, recovery=None, learning_rate: float = 3e-3, **options
) -> tuple[CausalLMModule, FascCallback]:
    """Return a trained module after the first fit, and its callback."""
    module = trained()
    module.learning_rate = learning_rate
    callback = FascCallback(**{**FAST, **options}, recovery=recovery)
    make_trainer(callback).fit(module, training_loader())
    return module, callback


def values(module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(first, second) -> bool:
    return list(first) == list(second) and all(torch.equal(first[name], second[name]) for name in first)


def factor_keys(module) -> set[str]:
    return {key for name in compressed_layers(module) for key in module.state_dict() if key.startswith(f"{name}.")}


def ranks(module) -> dict[str, int]:
    return {name: layer.rank for name, layer in compressed_layers(module).items()}


ARMS = {
    "lora": LoraRecovery(r=4),
    "factors": FactorRecovery(),
    "lora, distilled": LoraRecovery(r=4, teacher="dense"),
    "factors, distilled": FactorRecovery(norms=True, teacher="dense"),
}


def assert_plain(module, keys, flags):
    """Names, classes and flags are those of a compressed module, and nothing hangs on it."""
    assert list(module.state_dict()) == keys
    assert {name: p.requires_grad for name, p in module.named_parameters()} == flags
    assert carries_adapters(module) is None
    assert_no_hooks(module)
    assert not module._state_dict_hooks
    assert not module._load_state_dict_pre_hooks
    assert all(p.grad is None for p in module.parameters())
    assert module.teacher is None
    assert not hasattr(module, "peft_config")
    for layer in compressed_layers(module).values():
        assert all(type(child) is nn.Linear for child in layer.children())


class Saves(pl.Callback):
    """Saves a checkpoint at the end of every epoch."""

    def __init__(self, folder, weights_only=False):
        self.folder, self.weights_only = folder, weights_only

    def on_train_epoch_end(self, trainer, pl_module):
        trainer.save_checkpoint(self.folder / f"{trainer.current_epoch}.ckpt", self.weights_only)


def reference(dense, student, batch, temperature=1.0, weight=1.0):
    """The loss by torch's own functions, token by token."""
    with torch.no_grad():
        t = dense.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    out = student.model(**batch)
    terms = []
    for i in range(t.shape[0]):
        for j in range(t.shape[1] - 1):
            if batch["labels"][i, j + 1] != -100:
                p, q = (torch.log_softmax(x[i, j] / temperature, 0) for x in (t, out.logits))
                terms.append(F.kl_div(q, p, reduction="sum", log_target=True))
    return weight * temperature**2 * torch.stack(terms).mean() + (1 - weight) * out.loss


def batches(padded: bool = True) -> list[dict[str, torch.Tensor]]:
    data = Tokens(samples=6, length=12, padded=padded)
    return [torch.utils.data.default_collate([data[i] for i in range(j, j + 2)]) for j in (0, 2, 4)]
