"""``score``: rho of a model, or of a training run's checkpoints, without training."""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from typing_extensions import override

from fasc_lightning._run_fit import run_fit
from fasc_lightning._utils import RichWorkBar, checked_model_name, undoing
from fasc_lightning.batches import (
    LossTerms,
    TokenMask,
    TokenRows,
    is_hf_dataset,
    observed_rows,
)
from fasc_lightning.calibration import FrozenPass
from fasc_lightning.dependence import MIN_TOKENS, LayerScores, RhoHistory
from fasc_lightning.hooks import Taps
from fasc_lightning.layers import Gradient, select_layers, warn_other_layers
from fasc_lightning.options import checks_options


@checks_options
def score(
    model: nn.Module | str,
    data: DataLoader[Any] | Iterable[Any],
    checkpoints: Sequence[str | Path] | None = None,
    *,
    targets: str | list[str] | None = None,
    exclude: str | list[str] | None = None,
    tokens: int = 512,
    gradient: Gradient = "input",
    token_mask: TokenMask | None = None,
    loss_terms: LossTerms | None = None,
    seed: int = 0,
    progress: bool = False,
) -> RhoHistory:
    """Return rho of every layer over some data, for a model or for several checkpoints of it.

    Nothing is trained: the model is in eval mode without weight gradients, and is restored at the end.

    Args:
        model: A transformers causal language model, any LightningModule with a ``training_step``, or a name for
            :func:`~fasc_lightning.data.load_model`: a folder, a hub id, "smollm2".
        data: A DataLoader, or batches: for a language model mappings with "input_ids" and optionally
            "attention_mask" and "labels". The same data serve every checkpoint.
        checkpoints: Lightning ``.ckpt`` files, folders or hub ids ("name" or "name@revision"). Their weights are loaded
            into the model one after the other.
        targets: Patterns of layers, as for :class:`~fasc_lightning.FascCallback`.
        exclude: Patterns of layers to leave out.
        tokens: Number of tokens of each batch to score.
        gradient: "input" or "output".
        token_mask: Tells real tokens from padding.
        loss_terms: How the loss averages.
        seed: Seed of the choice of tokens and of permutations.
        progress: Whether to show progress bars.

    Returns:
        The table of ``FascCallback.rho_history``. The step of a checkpoint is its global step (``.ckpt`` files), the
        number in its name (``checkpoint-500``), or else its index in the list; without checkpoints the step is 0.

    Raises:
        ValueError: If an option is out of range, two checkpoints have one step, or weights do not fit the model.
        TypeError: If the model is neither a LightningModule nor a causal language model of transformers.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(
        ...     vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
        ... )
        >>> history = score(LlamaForCausalLM(config), [{"input_ids": torch.randint(64, (8, 32))}])
        >>> len(history)
        7
    """
    if type(tokens) is not int or tokens < MIN_TOKENS:
        raise ValueError(f"Expected `tokens` to be an int of at least {MIN_TOKENS} but got {tokens!r}.")
    if gradient not in ("input", "output"):
        raise ValueError(f"Expected `gradient` to be 'input' or 'output' but got {gradient!r}.")
    if isinstance(model, str):
        from fasc_lightning.data import load_model

        model = load_model(model)[0]
    if not isinstance(data, DataLoader | Mapping | Tensor | str) and not is_hf_dataset(data):
        data = list(data)
        if not data:
            raise ValueError("Expected at least one batch of data but got none: has a generator been used before?")
    history = RhoHistory()

    def observe(step: int) -> None:
        once = _ScoreFit(step, targets, exclude, tokens, gradient, token_mask, loss_terms, seed)
        prefix = run_fit(model, data, once, progress, bar=RichWorkBar("Scoring") if progress else None)
        for row in once.history:
            history.append({**row, "layer": row["layer"].removeprefix(prefix)})

    if checkpoints is None:
        observe(0)
        return history
    with undoing() as undo:
        undo.add(model.load_state_dict, {name: value.clone() for name, value in model.state_dict().items()})
        for place, checkpoint in enumerate(checkpoints):
            step, state = _read(str(checkpoint), place)
            if step in history.steps:
                raise ValueError(
                    f"Expected checkpoints of different steps but {checkpoint} and another are both of step {step}."
                )
            _load(model, state, str(checkpoint))
            observe(step)
    return history


class _ScoreFit(FrozenPass):
    """Fills a table with the scores of one pass over the data."""

    def __init__(
        self,
        step: int,
        targets: str | list[str] | None,
        exclude: str | list[str] | None,
        tokens: int,
        gradient: Gradient,
        token_mask: TokenMask | None,
        loss_terms: LossTerms | None,
        seed: int,
    ) -> None:
        super().__init__()
        self.history = RhoHistory()
        self._step, self._targets, self._exclude, self._token_mask = step, targets, exclude, token_mask
        self._tokens, self._gradient, self._loss_terms, self._seed = tokens, gradient, loss_terms, seed

    @override
    def make_taps(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Taps:
        layers = select_layers(pl_module, self._targets, self._exclude)
        warn_other_layers(pl_module, self._targets, self._exclude)
        self._scores = LayerScores(layers, self._tokens, self._gradient, self._seed, trainer.strategy.root_device)
        return Taps(layers, pairs=self._scores)

    @override
    def make_rows(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any) -> TokenRows:
        return observed_rows(
            trainer,
            pl_module,
            batch,
            token_mask=self._token_mask,
            loss_terms=self._loss_terms,
            tokens=self._tokens,
            seed=self._seed,
        )

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.history.extend(self._scores.rows(self._step))


def _read(checkpoint: str, place: int) -> tuple[int, Mapping[str, Tensor]]:
    """Return the step and the weights of a checkpoint."""
    if Path(checkpoint).is_file():
        try:
            content = torch.load(checkpoint, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise ValueError(
                f"Expected {checkpoint} to hold tensors and plain values only but it holds other objects, which are "
                "not loaded for safety. HINT: if you trust it, load it and give a file of its 'state_dict' alone."
            ) from error
        return int(content.get("global_step", place)), content.get("state_dict", content)
    from transformers import AutoModelForCausalLM

    name, _, revision = checkpoint.partition("@") if not Path(checkpoint).exists() else (checkpoint, "", "")
    folder = checked_model_name(name, "a checkpoint: a file, a model folder or a hub id", revision=revision or None)
    loaded = AutoModelForCausalLM.from_pretrained(folder, revision=revision or "main")
    numbered = re.fullmatch(r"checkpoint-(\d+)", Path(checkpoint).name)
    return int(numbered[1]) if numbered else place, loaded.state_dict()


def _load(model: nn.Module, state: Mapping[str, Tensor], checkpoint: str) -> None:
    """Load weights into the model; a wrapped language model's weights also fit the bare model, and the reverse.

    Raises:
        ValueError: If keys are missing or unused.
    """
    wanted = set(model.state_dict())
    forms: tuple[dict[str, Tensor], ...] = (
        dict(state),
        {name.removeprefix("model."): value for name, value in state.items()},
        {f"model.{name}": value for name, value in state.items()},
    )
    for form in forms:
        if set(form) == wanted:
            model.load_state_dict(form)
            return
    missing, left = sorted(wanted - set(state)), sorted(set(state) - wanted)
    raise ValueError(
        f"Expected {checkpoint} to hold the weights of {type(model).__name__} but {len(missing)} are missing "
        f"(for example {missing[:1]}) and {len(left)} are left over (for example {left[:1]})."
    )
