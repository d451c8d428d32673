"""Trainings by transformers' Trainer on tiny models."""

from __future__ import annotations

import transformers
from tiny import Tokens, causal_model


class StandIn(transformers.Trainer):
    """A subclass that does what trl's SFTTrainer adds: it collects metrics of each loss, and logs their means."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._metrics = {"train": [], "eval": []}

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        self._metrics["train" if model.training else "eval"].append(float(loss.detach()))
        return (loss, outputs) if return_outputs else loss

    def log(self, logs, start_time=None):
        metrics = self._metrics["train" if self.model.training else "eval"]
        super().log({**logs, **({"mean_of_losses": sum(metrics) / len(metrics)} if metrics else {})}, start_time)
        metrics.clear()


def trainer_of(folder, *callbacks, model=None, data=None, kind=transformers.Trainer, **options):
    """A Trainer of sixteen steps that writes nowhere but into the folder."""
    made = {key: options.pop(key) for key in ("compute_loss_func", "eval_dataset") if key in options}
    defaults = {
        "per_device_train_batch_size": 2,
        "num_train_epochs": 1,
        "learning_rate": 1e-3,
        "train_sampling_strategy": "sequential",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "save_strategy": "no",
        "logging_strategy": "no",
    }
    args = transformers.TrainingArguments(str(folder), **{**defaults, **options})
    return kind(
        model=causal_model().train() if model is None else model,
        args=args,
        train_dataset=Tokens(samples=32) if data is None else data,
        callbacks=list(callbacks),
        **made,
    )
