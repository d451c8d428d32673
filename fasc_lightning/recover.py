"""recover(): the fit after a compression, in one call, of a model that is compressed already."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

from torch import nn
from torch.utils.data import DataLoader

from fasc_lightning._fit import as_lightning_prefix, run_fit
from fasc_lightning.recovery import Recovery, as_recovery
from fasc_lightning.recovery_phase import RecoveryCallback
from fasc_lightning.swap import compressed_layers


def recover(
    model: nn.Module,
    batches: DataLoader[Any] | Iterable[Any],
    recovery: Literal["lora", "factors"] | Recovery = "lora",
    *,
    dense: nn.Module | Mapping[str, nn.Module] | None = None,
    held_out: DataLoader[Any] | Iterable[Any] | None = None,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, Any]:
    """Train the factors of a compressed model, or adapters on them, in place, and keep what helps.

    For a model that was saved and loaded since, or to compare recoveries of one compression;
    :func:`~fasc_lightning.compress` does both. The model keeps its device, its training mode and its ``requires_grad``
    flags; if anything fails, it is what it was.

    Args:
        model: A compressed transformers causal language model, or any LightningModule with compressed layers.
        batches: A DataLoader, or batches, as :func:`~fasc_lightning.compress` takes them.
        recovery: What to train, how long and how fast.
        dense: For a teacher: the dense model, or its layers by name. They move to the model's device.
        held_out: What the best state is chosen by; None holds back an eighth of the data.
        seed: Of the order of batches and of the adapters' start.
        progress: Whether to show progress bars.

    Returns:
        What was done, in plain types: see ``report.recovery``.

    Raises:
        MisconfigurationException: If the model cannot be recovered, or ``dense`` is no dense form of it.
        ValueError: If ``dense`` is given and nobody is taught by it.
        TypeError: If the model is neither a LightningModule nor a causal language model of transformers.
    """
    options = as_recovery(recovery)
    if options is None:
        raise ValueError("Expected `recovery` to say what is trained but got None. HINT: recovery='lora'.")
    if dense is not None and options.distillation is None:
        raise ValueError(
            "Expected `dense` for a recovery with a teacher but there is none. HINT: recovery=LoraRecovery("
            "teacher='dense'), or leave `dense` out."
        )
    prefix = as_lightning_prefix(model)
    layers: dict[str, nn.Module] = {}
    if isinstance(dense, nn.Module):
        modules = dict(dense.named_modules(remove_duplicate=False))
        layers = {prefix + name: modules[name] for name in compressed_layers(model) if name in modules}
    elif dense is not None:
        layers = {prefix + name: layer for name, layer in dense.items()}
    callback = RecoveryCallback(options, layers, seed=seed)
    run_fit(model, batches, callback, progress, held_out=held_out, recovery=options, seed=seed)
    assert callback.figures is not None
    return callback.figures
