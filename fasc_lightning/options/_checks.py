"""Early, named refusals: of options, strategies, schedules and models that cannot work."""

from __future__ import annotations

from collections.abc import Sequence

from lightning.fabric.utilities.rank_zero import rank_zero_warn

from fasc_lightning.dependence import MIN_TOKENS
from fasc_lightning.layers import check_quantization
from fasc_lightning.options._types import checks_options
from fasc_lightning.solvers import get_solver

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


#: "fisher" spends one budget by predicted losses, "measured" by losses corrected on tokens, "uniform" layer by layer.
ALLOCATIONS = ("measured", "fisher", "uniform")


#: Serves the layers below the gate: the activation covariance alone.
CHEAP_METHOD = "svd"
#: The scores that can decide: signed and around 0 for unrelated x and g; rho of all tokens, the paper's Eq. 2; rho of
#: minibatches, which is above it by chance.
GATE_BY = ("debiased", "pooled", "rho")
#: ``gate_exclude="paper"``: early attention and the last projections.
PAPER = "paper"


@checks_options
def check_gate(
    gate: float | None, gate_by: str = "debiased", gate_exclude: str | Sequence[str] | None = None, method: str = "fasc"
) -> None:
    """Check the options of the gate.

    Raises:
        ValueError: If an option is out of range, or there is nothing for it to decide.
    """
    if gate_by not in GATE_BY:
        raise ValueError(f"Expected `gate_by` to be one of {', '.join(GATE_BY)} but got {gate_by!r}.")
    if gate is None:
        if gate_exclude is not None:
            raise ValueError(
                f"Expected `gate_exclude` together with a `gate` but got {gate_exclude=} alone: without a gate every "
                "layer gets the same solver. HINT: gate=0.3, or `exclude` to leave layers alone altogether."
            )
        return
    if not 0 <= gate <= 1:
        raise ValueError(f"Expected `gate` to be in [0, 1], as rho is, but got {gate}.")
    if method == CHEAP_METHOD:
        raise ValueError(
            f"Expected a `method` that costs more than {CHEAP_METHOD!r} but got {method!r}, which serves the layers "
            f"below the gate, too: there is nothing to decide. HINT: method='fasc', or gate=None."
        )
    get_solver(method)
