"""Early, named refusals: of options, strategies, schedules and models that cannot work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.rank_zero import rank_zero_warn
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from fasc_lightning._memory import available_memory
from fasc_lightning.allocation import ALLOCATIONS
from fasc_lightning.batches import LossTerms, TokenMask
from fasc_lightning.expert_moments import tokens_behind
from fasc_lightning.expert_views import split_name
from fasc_lightning.hsic import MIN_TOKENS
from fasc_lightning.placement import PlacedStrategy
from fasc_lightning.quantize import check_quantization
from fasc_lightning.replay import takes_iterator
from fasc_lightning.sharding import check_mesh
from fasc_lightning.solvers import get_solver
from fasc_lightning.swap import is_compressed
from fasc_lightning.taps import Taps

LAYOUTS = ("auto", "pivot", "factors")


def check_budget(rank: float | None, keep: float | None) -> None:
    """Check the two ways to state a budget.

    Raises:
        ValueError: If both or neither are given, or the one given is out of range.
    """
    if rank is None and keep is None:
        raise ValueError(
            "Expected a budget but got neither `rank` nor `keep`. HINT: rank=0.5 (half of full rank) or keep=0.8 "
            "(80 % of the targeted parameters); monitor_every_n_steps=50 to only track rho."
        )
    if rank is not None and keep is not None:
        raise ValueError(f"Expected `rank` or `keep` but got both ({rank=}, {keep=}). Give one.")
    if keep is not None:
        if not 0 < keep <= 1:
            raise ValueError(f"Expected `keep` to be a fraction in (0, 1] but got {keep}.")
    elif isinstance(rank, int):
        if rank < 1:
            raise ValueError(f"Expected an absolute `rank` of at least 1 but got {rank}.")
        if rank == 1:
            rank_zero_warn("rank=1 is the absolute rank 1. If you meant full rank, write rank=1.0.")
    elif rank is not None and not 0 < rank <= 1:
        raise ValueError(
            f"Expected a float `rank` to be a fraction of full rank in (0, 1] but got {rank}. An absolute rank is "
            "an int."
        )


def check_monitor(every_n_steps: int | None, tokens: int, threshold: float, observations: int, gradient: str) -> None:
    """Check the options of monitoring.

    Raises:
        ValueError: If one is out of range.
    """
    counts = {"monitor_tokens": tokens, "emergence_observations": observations}
    if every_n_steps is not None:
        counts["monitor_every_n_steps"] = every_n_steps
    least = {"monitor_tokens": MIN_TOKENS}
    for name, value in counts.items():
        if type(value) is not int or value < least.get(name, 1):
            raise ValueError(f"Expected `{name}` to be an int of at least {least.get(name, 1)} but got {value!r}.")
    if not 0 <= threshold <= 1:
        raise ValueError(f"Expected `rho_threshold` to be in [0, 1], as rho is, but got {threshold}.")
    if gradient not in ("input", "output"):
        raise ValueError(
            f"Expected `rho_gradient` to be 'input' (g = W^T h, the paper's) or 'output' (h) but got {gradient!r}."
        )


def check_monitor_only(
    calibration_steps: int | None, update_weights: bool, gate: float | None, quantize: object, recovery: object = None
) -> None:
    """Refuse options of a compression where there is none.

    Raises:
        ValueError: If one is given.
    """
    given = {
        "calibration_steps": calibration_steps is not None,
        "update_weights=False": not update_weights,
        "gate": gate is not None,
        "quantize": quantize is not None,
        "recovery": recovery is not None,
    }
    for name, is_given in given.items():
        if is_given:
            raise ValueError(
                f"Expected a budget (`rank` or `keep`) together with `{name}` but got neither: without one rho is "
                "monitored and nothing is compressed."
            )


def check_options(
    method: str,
    allocation: str,
    layout: str,
    align: int,
    refit: object,
    token_fraction: float,
    calibration_steps: int | None,
    quantize: object,
) -> None:
    """Check the options that are not the budget.

    Raises:
        ValueError: If one is out of range.
    """
    get_solver(method)
    for name, value, known in (("allocation", allocation, ALLOCATIONS), ("layout", layout, LAYOUTS)):
        if value not in known:
            raise ValueError(f"Expected `{name}` to be one of {', '.join(known)} but got {value!r}.")
    if type(align) is not int or align < 1:
        raise ValueError(f"Expected `align` to be a positive int, what ranks are multiples of, but got {align!r}.")
    if not (isinstance(refit, bool) or refit == "auto"):
        raise ValueError(f"Expected `refit` to be True, False or 'auto' but got {refit!r}.")
    if quantize is not None:
        check_quantization(quantize)
    if not 0 < token_fraction <= 1:
        raise ValueError(f"Expected `token_fraction` to be in (0, 1] but got {token_fraction}.")
    if calibration_steps is not None and (type(calibration_steps) is not int or calibration_steps < 1):
        raise ValueError(f"Expected `calibration_steps` to be a positive int but got {calibration_steps!r}.")


def check_moments_device(device: object) -> None:
    """Refuse places where moments cannot be held.

    Raises:
        ValueError: If it is neither None nor "cpu".
    """
    if device not in (None, "cpu"):
        raise ValueError(
            f"Expected `moments_device` to be None (the device of the fit) or 'cpu' but got {device!r}. HINT: which "
            "device a fit is on is the Trainer's to say (accelerator=, devices=)."
        )


def check_strategy(trainer: pl.Trainer, recovers: bool = False) -> None:
    """Refuse strategies under which layers cannot be read or replaced.

    Args:
        trainer: Of a fit.
        recovers: Whether the fit trains a compressed module.

    Raises:
        MisconfigurationException: With the strategy and the remedy.
    """
    strategy, name = trainer.strategy, type(trainer.strategy).__name__
    launcher = strategy.launcher
    if isinstance(launcher, _MultiProcessingLauncher):
        raise MisconfigurationException(
            f"Expected a fit in this process or in processes of the same script but {name} (ddp_"
            f"{launcher._start_method}) is launched by {type(launcher).__name__}: the layers would be swapped in the "
            "workers and lost with them. HINT: use strategy='ddp' from a script (not a notebook), or one device."
        )
    # By exact type: DeepSpeedStrategy is a DDPStrategy.
    if type(strategy) not in (SingleDeviceStrategy, PlacedStrategy, DDPStrategy, ModelParallelStrategy):
        raise MisconfigurationException(
            f"Expected a single device, strategy='ddp' or ModelParallelStrategy with FSDP2 but got {name}, which "
            "shards or wraps the layers in a way of its own. HINT: compress on one device or under 'ddp' (a "
            "calibration epoch needs no optimizer state with update_weights=False), then train the compressed model "
            "under the strategy of your choice."
        )
    if isinstance(strategy, ModelParallelStrategy):
        if recovers:
            raise MisconfigurationException(
                f"Expected a single device or strategy='ddp' for a recovery but got {name}, which shards the "
                "low-rank layers. HINT: they are a fraction of the dense ones; recover under 'ddp', or without "
                "`recovery` train them under the strategy of your choice."
            )
        check_mesh(strategy)


def check_single(callbacks: Sequence[pl.Callback]) -> None:
    """Refuse several callbacks that each have a budget.

    Raises:
        MisconfigurationException: If there is more than one.
    """
    if len(callbacks) > 1:
        raise MisconfigurationException(
            "Expected one FascCallback with a budget in a fit but got several: each would freeze and restore what "
            "the other holds. HINT: one callback spends one budget over all its `targets`."
        )


def check_module(pl_module: pl.LightningModule, compresses: bool = True) -> None:
    """Refuse compiled modules, and to compress modules that carry adapters or are compressed already.

    Args:
        pl_module: The module of the fit.
        compresses: Whether it is to be compressed, or only watched.

    Raises:
        MisconfigurationException: With the remedy.
    """
    compiled = [
        name
        for name, m in pl_module.named_modules()
        if isinstance(m, torch._dynamo.OptimizedModule) or m._compiled_call_impl is not None
    ]
    if compiled or pl_module._compiler_ctx is not None:
        raise MisconfigurationException(
            f"Expected a module that is not compiled but {compiled[0] if compiled else 'the LightningModule'!r} is: "
            "hooks added after compilation are ignored silently. HINT: fit the original module and compile the "
            "compressed one."
        )
    if not compresses:
        return
    adapters = [name for name, m in pl_module.named_modules() if hasattr(m, "lora_A") or hasattr(m, "base_layer")]
    if adapters:
        raise MisconfigurationException(
            f"Expected a module without adapters but {adapters[0]!r} carries some: its base layer and the adapter "
            "would be compressed apart. HINT: merge them first (`merge_and_unload()` of peft)."
        )
    if is_compressed(pl_module):
        raise MisconfigurationException(
            f"{type(pl_module).__name__} holds low-rank layers already, and compressing twice loses quality for "
            "nothing. HINT: start from the dense model. To train the factors, use `recover`, or leave FascCallback out."
        )


def check_batches_given(
    pl_module: pl.LightningModule, loss_terms: LossTerms | None, token_mask: TokenMask | None
) -> None:
    """Refuse steps that take batches by themselves where a batch has to be looked at before.

    Raises:
        MisconfigurationException: With the remedy.
    """
    terms = loss_terms or getattr(pl_module, "loss_terms", "mean")
    masked = token_mask is not None or getattr(pl_module, "token_mask", None) is not None
    if takes_iterator(pl_module) and (terms != "sum" or masked):
        raise MisconfigurationException(
            "Expected a training step that is given its batch, of which tokens and terms are counted before, but it "
            "has an argument `dataloader_iter`, from which it takes batches by itself. HINT: "
            "training_step(self, batch, batch_idx); or loss_terms='sum' without a token mask."
        )


def check_rank_fits(shapes: Mapping[str, tuple[int, int]], rank: float | None) -> None:
    """Refuse an absolute rank that some layer cannot have.

    Raises:
        ValueError: With the layers.
    """
    if isinstance(rank, int):
        small = [f"{name} {shape}" for name, shape in shapes.items() if min(shape) < rank]
        if small:
            raise ValueError(
                f"Expected `rank` to be at most min(m, n) of every layer but rank={rank} is larger than "
                f"{len(small)} of {len(shapes)} (for example {small[0]}). Lower it, give a fraction, or exclude them."
            )


def check_loss(loss: Tensor, layers: int, label: str) -> None:
    """Refuse a calibration batch whose loss says nothing, before it reaches the statistics.

    Args:
        loss: Of the batch.
        layers: How many layers are tapped.
        label: Names the batch.

    Raises:
        RuntimeError: If the loss is detached.
        FloatingPointError: If it is not finite.
    """
    if not loss.requires_grad:
        raise RuntimeError(
            f"No gradient reached any of the {layers} tapped layers: the loss of {label} is detached. Was it computed "
            "under no_grad or inference mode?"
        )
    if not torch.isfinite(loss).all():
        raise FloatingPointError(
            f"Expected a finite loss but got {loss.item()} in {label}. The batch was refused before it reached the "
            "statistics. Check the batch, or the learning rate of the training before it."
        )


def check_memory(needed: int, device: torch.device, passes: int = 1, sketch: str | None = None) -> None:
    """Refuse moments that do not fit.

    Args:
        needed: Bytes.
        device: That is to hold them.
        passes: Of the calibration, as they are.
        sketch: How moments are held, as it is.

    Raises:
        MemoryError: With the estimate.
    """
    free = available_memory(device)
    if needed > free:
        beside = "" if device.type == "cpu" else ", moments_device='cpu' holds them there"
        kinds = {None: ", sketch='projected' or 'range' holds less of each", "range": ", sketch='projected' holds less"}
        raise MemoryError(
            f"Expected the moments of the tapped layers to fit but they need up to {needed / 1e9:.2f} GB and "
            f"{free / 1e9:.2f} GB is free on {device}. HINT: passes={passes + 1} or more gathers a share of them at a "
            f"time{kinds.get(sketch, '')}{beside}; or target fewer layers (`targets`, `exclude`) "
            "in several runs. plan() says what fits."
        )


def warn_unannounced() -> None:
    """Warn of a training step whose backward passes, and so whose loss, nobody is told of."""
    rank_zero_warn(
        "FascCallback: the training step calls `loss.backward()` by itself, so that its loss is not known. All "
        "gradients that arrive are counted, those of `torch.autograd.grad` among them, and the scale of the loss is a "
        "guess. HINT: call `self.manual_backward(loss)`."
    )


def warn_unreached(taps: Taps, batches: int) -> None:
    """Warn of layers that no gradient has reached by now; of experts a router may still send tokens to some.

    Args:
        taps: On the layers.
        batches: How many have run.
    """
    missing = [name for name in taps.layers if name not in taps.reached and split_name(name) is None]
    if not missing:
        return
    idle = sum(name not in taps.called for name in missing)
    end = "The fit will end with an error" if len(missing) == len(taps.layers) else "They will stay dense"
    rank_zero_warn(
        f"No gradient has reached {len(missing)} of {len(taps.layers)} targeted layers in the first {batches} batches "
        f"of the calibration, for example {missing[0]!r}: {idle} of them did not run, {len(missing) - idle} ran and "
        f"the loss does not depend on them. {end} unless a later batch reaches them. HINT: `exclude` them, or look "
        "for a `detach` or `no_grad` on the way to the loss."
    )


def warn_few_tokens(tokens: Mapping[str, int], shapes: Mapping[str, tuple[int, int]]) -> None:
    """Warn when layers saw fewer tokens than they have features; experts, with those that they borrow."""
    short = {name: t for name, t in tokens_behind(tokens, shapes).items() if 0 < t < max(shapes[name])}
    if short:
        name, t = min(short.items(), key=lambda item: item[1] / max(shapes[item[0]]))
        together = " together with all experts of its block" if t != tokens[name] else ""
        rank_zero_warn(
            f"{len(short)} of {len(shapes)} layers saw fewer tokens than they have features: {name!r} "
            f"{shapes[name]} saw {t}{together}, which supports ranks up to {min(t, *shapes[name])}. Directions that "
            "were not seen are judged by the shrinkage alone; calibrate on more tokens."
        )
