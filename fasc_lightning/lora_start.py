"""``lora_start``: adapters that begin at what a quantised or pruned model has lost, in place of zero."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from typing_extensions import override

from fasc_lightning._run_fit import run_fit
from fasc_lightning._utils import RichWorkBar, evaluating, whole_folder
from fasc_lightning.batches import TokenRows, calibration_rows
from fasc_lightning.calibration import FrozenPass
from fasc_lightning.hooks import Taps
from fasc_lightning.layers import (
    CompressedLinear,
    ExpertLinear,
    is_conv1d,
    layer_shapes,
    linear_shape,
    linear_weight,
    select_layers,
)
from fasc_lightning.options import checks_options
from fasc_lightning.solvers import fasc
from fasc_lightning.statistics import CalibrationMoments, moment_dtype

#: Rows of the identity that pass through a layer at a time, to read its weight.
_ROWS = 1024
#: Files of an adapter.
_FILES = ("adapter_config.json", "adapter_model.safetensors", "README.md")


@dataclass(frozen=True)
class LayerStart:
    """The start of one layer's adapter.

    Attributes:
        A: peft's lora_A, shape (r, n).
        B: peft's lora_B, shape (m, r).
        loss: Predicted squared change of the loss by the layer, W' in the place of W.
        left: The same with W' + BA.
    """

    A: Tensor
    B: Tensor
    loss: float
    left: float


@dataclass(frozen=True)
class LoraStart:
    """The start of all adapters.

    Attributes:
        layers: The layers' starts by name. Layers whose weight is the dense one are left out.
        conv1d: Whether the layers are transformers ``Conv1D``, whose weight is transposed.
    """

    layers: dict[str, LayerStart]
    conv1d: bool

    @property
    def r(self) -> int:
        """Rank of the adapters."""
        return len(next(iter(self.layers.values())).A)

    @property
    def removed(self) -> float:
        """Share of the predicted loss of all layers that the adapters take away before any training."""
        before, after = (sum(getattr(layer, name) for layer in self.layers.values()) for name in ("loss", "left"))
        return 1 - after / before

    def save(self, path: str | Path, base_model: str | None = None) -> Path:
        """Write a folder that ``PeftModel.from_pretrained(model, path, is_trainable=True)`` puts on the model.

        Args:
            path: The folder.
            base_model: Hub id or folder of the quantised model.

        Returns:
            The folder.
        """
        from peft import LoraConfig
        from safetensors.torch import save_file

        config = LoraConfig(
            r=self.r,
            lora_alpha=self.r,  # a scale of 1, so that the adapter is BA
            target_modules=list(self.layers),
            task_type="CAUSAL_LM",
            base_model_name_or_path=base_model,
            fan_in_fan_out=self.conv1d,
            inference_mode=True,  # as peft writes it
        )
        tensors = {
            f"base_model.model.{name}.lora_{side}.weight": getattr(layer, side)
            for name, layer in self.layers.items()
            for side in ("A", "B")
        }
        with whole_folder(path, lambda name: name in _FILES) as folder:
            config.save_pretrained(str(folder))
            save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        return Path(path)

    def __str__(self) -> str:
        """Return a summary in one line."""
        return (
            f"Adapters of rank {self.r} on {len(self.layers)} layers take away {self.removed:.0%} of the predicted "
            "loss before any training."
        )


@checks_options
def lora_start(
    model: nn.Module,
    dense: nn.Module,
    batches: DataLoader[Any] | Iterable[Any],
    r: int = 16,
    *,
    targets: str | list[str] | None = None,
    exclude: str | list[str] | None = None,
    progress: bool = True,
) -> LoraStart:
    r"""Return LoRA adapters that make a quantised or pruned model as much like the dense one as their rank allows.

    A layer's weight W has become W'. Its adapter starts at the B A of rank r that minimises the squared first-order
    change of the loss, E[(h^T (W - W' - B A) x)^2]. x are inputs and h gradients at outputs of the dense model. With
    coupled moments A_c = E[x x^T] and G_c = E[h h^T] (:func:`~fasc_lightning.solvers.fasc`) the minimiser is

        B A = G_c^-1/2 SVD_r(G_c^1/2 (W - W') A_c^1/2) A_c^-1/2.

    B and A share the singular values evenly. Weights of any kind are read by passing the identity through the layer.
    Neither model is changed.

    Args:
        model: The quantised or pruned model. peft has to know its layers.
        dense: The dense model: a transformers causal language model, or a LightningModule with a ``training_step``.
        batches: Calibration data for the dense model, as for :func:`~fasc_lightning.compress`.
        r: Rank of the adapters.
        targets: Patterns of layers, as for :class:`~fasc_lightning.FascCallback`.
        exclude: Patterns of layers to leave out.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: If the rank is out of range, or the models do not have the same layers.
        TypeError: If a layer is one that peft does not adapt.

    Example:
        >>> start = lora_start(quantised, dense, batches, r=16)  # doctest: +SKIP
        >>> start.save("start")  # doctest: +SKIP
        >>> adapted = peft.PeftModel.from_pretrained(quantised, "start", is_trainable=True)  # doctest: +SKIP
    """
    layers = select_layers(dense, targets, exclude)
    _check(model, layers, r)
    changed = {name: layer for name, layer in layers.items() if _difference(model, name, layer).any()}
    if not changed:
        raise ValueError(f"Expected a model that differs from the dense one but all {len(layers)} weights are equal.")
    once = _MomentsPass(changed)
    run_fit(dense, batches, once, progress, bar=RichWorkBar("Calibration") if progress else None)
    found = {}
    for name, layer in changed.items():
        D = _difference(model, name, layer)  # again: all of them together are as large as the model
        solved = fasc(D, once.moments.layer(name))
        B, A = balanced(*solved.truncate(r))
        found[name] = LayerStart(A, B, float(solved.losses[0]), float(solved.losses[r]))
    return LoraStart(found, conv1d=all(map(is_conv1d, changed.values())))


class _MomentsPass(FrozenPass):
    """Gathers the coupled moments of layers in one pass over the data."""

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self._layers = dict(layers)

    @override
    def make_taps(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Taps:
        kind, device = moment_dtype(self._layers.values()), trainer.strategy.root_device
        self.moments = CalibrationMoments(layer_shapes(self._layers), kind, device, {"coupled"})
        return Taps(self._layers, self.moments)

    @override
    def make_rows(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any) -> TokenRows:
        return calibration_rows(
            trainer,
            pl_module,
            batch,
            token_mask=None,
            loss_terms=None,
            fraction=1.0,
            seed=0,
            steps=False,
            scored=False,
        )


def _check(model: nn.Module, layers: Mapping[str, nn.Module], r: int) -> None:
    """Compare the layers of two models, before any work.

    Raises:
        ValueError: If a layer is missing or has fewer inputs or outputs than adapters have ranks.
        TypeError: If peft does not adapt a layer.
    """
    modules = dict(model.named_modules())
    for name, layer in layers.items():
        if isinstance(layer, ExpertLinear):
            raise TypeError(f"Expected layers that peft adapts but {name!r} is one of fused experts: exclude it.")
        if name not in modules:
            raise ValueError(
                f"Expected the layer {name!r} of the dense model in {type(model).__name__} but it has none of this "
                "name. HINT: give both models in the same form, as from_pretrained returns them."
            )
        if isinstance(modules[name], CompressedLinear):
            raise TypeError(
                f"Expected layers that peft adapts but {name!r} is a {type(modules[name]).__name__}. HINT: "
                "recover(model, batches, ...) trains it as it is; to_dense(model) makes it plain."
            )
        if hasattr(modules[name], "lora_A"):
            raise TypeError(f"Expected a model without adapters but {name!r} carries one: merge or unload it.")
        if not 1 <= r <= min(linear_shape(layer)):
            raise ValueError(
                f"Expected `r` from 1 to the smaller side of each layer but got {r} for {name!r} of shape "
                f"{linear_shape(layer)}."
            )


@torch.no_grad()
def _difference(model: nn.Module, name: str, layer: nn.Module) -> Tensor:
    """Return W - W', shape (m, n), in float32.

    Raises:
        ValueError: If the model's layer has another shape.
    """
    W, other = linear_weight(layer).detach().float(), model.get_submodule(name)
    m, n = W.shape
    tensors = [*other.parameters(), *other.buffers()]
    kind = next((tensor.dtype for tensor in tensors if tensor.is_floating_point()), linear_weight(layer).dtype)
    eye = torch.eye(n, dtype=kind, device=tensors[0].device if tensors else W.device)
    with evaluating(other):
        try:
            zero = other(torch.zeros_like(eye[:1]))
            columns = torch.cat([other(rows) - zero for rows in eye.split(_ROWS)])
        except RuntimeError as error:
            raise ValueError(f"Expected {name!r} to take inputs of shape (tokens, {n}) but: {error}") from error
    if columns.shape != (n, m):
        raise ValueError(f"Expected {name!r} to have {m} outputs but got {columns.shape[-1]}.")
    return W - columns.T.to(W)


def balanced(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Return factors of the same product whose columns and rows have equal norms: U S^1/2 and S^1/2 V^T."""
    (Q, R), (P, L) = torch.linalg.qr(left.double()), torch.linalg.qr(right.double().T)
    U, S, V = torch.linalg.svd(R @ L.T)
    root = S.sqrt()
    return ((Q @ U) * root).float().contiguous(), (root[:, None] * (V @ P.T)).float().contiguous()
