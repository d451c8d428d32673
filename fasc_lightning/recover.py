"""``recover``: the recovery of a compressed model in one call."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader

from fasc_lightning._run_fit import as_lightning_module, as_lightning_prefix, as_loader, attached, run_fit
from fasc_lightning._utils import undoing
from fasc_lightning.batches import TrainingStep, as_trained_on
from fasc_lightning.layers import compressed_layers
from fasc_lightning.options import Recovery, as_recovery, checks_options, refine_options
from fasc_lightning.recovery import RecoveryCallback, check_recoverable, frozen_copy, split_loader
from fasc_lightning.refit import RefinePhase, layer_state, refine_figures, refine_module


@checks_options
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
    """Train the factors of a compressed model, or adapters on them, in place, and keep the best state.

    It serves models that were saved and loaded, and comparisons of several recoveries of one compression.
    :func:`~fasc_lightning.compress` compresses and recovers in one call. The model keeps its device, its training mode
    and its ``requires_grad`` flags. If anything fails, it is unchanged.

    Args:
        model: A compressed transformers causal language model, or any LightningModule with compressed layers.
        batches: A DataLoader or batches, as for :func:`~fasc_lightning.compress`.
        recovery: The parameters to train, the number of steps and the learning rate.
        dense: The dense model, or its layers by name, for a teacher or ``refine_steps``. It is not changed.
        held_out: Data that chooses the best state; None holds back an eighth of ``batches``, 64 samples at most.
        seed: Seed of the order of batches and of the adapters' initial values.
        progress: Whether to show progress bars.

    Returns:
        The figures of the recovery in plain types, as ``report.recovery``; with ``refine_steps`` also "refine".

    Raises:
        MisconfigurationException: If the model cannot be recovered, or ``dense`` is not its dense form.
        ValueError: If ``dense`` is given but not used.
        TypeError: If the model is neither a LightningModule nor a causal language model of transformers.
    """
    options = as_recovery(recovery)
    if options is None:
        raise ValueError("Expected `recovery` to say what is trained but got None. HINT: recovery='lora'.")
    if dense is not None and options.distillation is None and not options.refine_steps:
        raise ValueError(
            "Expected `dense` for a recovery with a teacher or a refinement but there is none. HINT: "
            "recovery=LoraRecovery(teacher='dense'), or leave `dense` out."
        )
    if isinstance(batches, Iterator):  # a refinement reads them too
        batches = list(batches)
    prefix = as_lightning_prefix(model)
    layers: dict[str, nn.Module] = {}
    if isinstance(dense, nn.Module):
        modules = dict(dense.named_modules(remove_duplicate=False))
        layers = {prefix + name: modules[name] for name in compressed_layers(model) if name in modules}
    elif dense is not None:
        layers = {prefix + name: layer for name, layer in dense.items()}
    callback = RecoveryCallback(options, layers, seed=seed)
    # A fit that fails undoes only its own part.
    with undoing() as undo:
        for layer in compressed_layers(model).values() if options.refine_steps else ():
            undo.add(layer.load_state_dict, layer_state(layer))
        refined = _refine_first(model, layers, batches, held_out is None, options, seed)
        run_fit(model, batches, callback, progress, held_out=held_out, recovery=options, seed=seed)
        assert callback.figures is not None
        figures = {**callback.figures, **refined}
        undo.forget()
    return figures


def _refine_first(
    model: nn.Module,
    dense: Mapping[str, nn.Module],
    batches: DataLoader[Any] | Iterable[Any],
    split: bool,
    recovery: Recovery,
    seed: int,
) -> dict[str, Any]:
    """Refine the blocks, if asked for, on batches that the recovery does not hold out.

    Raises:
        MisconfigurationException: If dense layers are missing.
    """
    options = refine_options(recovery, seed)
    if options is None:
        return {}
    module, _ = as_lightning_module(model, recovery)
    check_recoverable(module, recovery)
    RefinePhase.check(module, compressed_layers(module))
    if missing := sorted(set(compressed_layers(module)) - set(dense)):
        raise MisconfigurationException(
            f"Expected the dense layers, towards which a refinement trains, but {missing[0]!r} and {len(missing) - 1} "
            "others are not at hand. HINT: recover(..., dense=...), or refine_steps=0."
        )
    device = next(module.parameters()).device
    loader = as_loader(batches, model=module)
    train = split_loader(loader)[0] if split else loader
    with attached(module, device) as trainer:
        report = refine_module(
            module,
            {name: frozen_copy(layer, device) for name, layer in dense.items()},
            (as_trained_on(trainer, batch) for batch in train),
            options,
            TrainingStep(trainer),
        )
    return {"refine": refine_figures(report)}
