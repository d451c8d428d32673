"""Range checks of options, and checks of their combinations, before any work."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, get_args

from lightning.fabric.utilities.rank_zero import rank_zero_warn

from fasc_lightning.layers import Layout
from fasc_lightning.options._allocations import get_allocation
from fasc_lightning.options._rounding import check_quantize, check_rounding
from fasc_lightning.options._types import check_word
from fasc_lightning.solvers import get_solver

if TYPE_CHECKING:
    from fasc_lightning.options._compression import CompressionOptions

#: Solver of the layers below the gate; it needs the activation covariance alone.
CHEAP_METHOD = "svd"


def check_budget(rank: float | None, keep: float | None) -> None:
    """Check the two ways to state a budget.

    Raises:
        ValueError: If both or neither are given, or if the given one is out of range.
    """
    if rank is None and keep is None:
        raise ValueError(
            "Expected a budget but got neither `rank` nor `keep`. HINT: rank=0.5 (half of full rank) or keep=0.8 "
            "(80 % of the targeted parameters); size=0.27 (of the bytes) or quantize='int4' for few bits; monitor=50 "
            "to only track rho."
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


def check_values(options: CompressionOptions) -> None:
    """Check each option outside of the groups by itself.

    Raises:
        ValueError: If an option is out of range.
    """
    get_solver(options.method)
    get_allocation(options.allocation)
    check_word("layout", options.layout, get_args(Layout))
    if type(options.align) is not int or options.align < 1:
        raise ValueError(
            f"Expected `align` to be a positive int, as ranks are its multiples, but got {options.align!r}."
        )
    if not (isinstance(options.refit, bool) or options.refit == "auto"):
        raise ValueError(f"Expected `refit` to be True, False or 'auto' but got {options.refit!r}.")
    if options.quantize is not None:
        check_quantize(options.quantize)


def check_monitor_only(options: CompressionOptions) -> None:
    """Refuse options of a compression if there is no budget.

    Raises:
        ValueError: If such an option is given.
    """
    given = {
        "calibration_steps": options.calibration_steps is not None,
        "update_weights=False": not options.update_weights,
        "gate": options.gate_threshold is not None,
        "recovery": options.recovery is not None,
    }
    for name, is_given in given.items():
        if is_given:
            raise ValueError(
                f"Expected a budget (`rank`, `keep`, `size` or `quantize`) together with `{name}` but got none: "
                "without one rho is monitored and nothing is compressed."
            )


def check_combinations(options: CompressionOptions) -> None:
    """Check a gate, several passes and projected moments against the options that they rule out.

    Raises:
        ValueError: If options exclude each other; the message names the remedy.
    """
    if options.gate_threshold is not None and options.method == CHEAP_METHOD:
        raise ValueError(
            f"Expected a `method` that costs more than {CHEAP_METHOD!r} but got {options.method!r}, which serves the "
            "layers below the gate, too: there is nothing to decide. HINT: method='fasc', or gate=None."
        )
    check_rounding(options)
    if options.passes > 1:
        _check_passes(options)
    if options.sketch == "projected":
        _check_projected(options)
    if options.stages > 1:
        _check_stages(options)


def _check_passes(options: CompressionOptions) -> None:
    passes = options.passes
    if options.update_weights:
        raise ValueError(
            f"Expected update_weights=False with {passes=}: every pass has to see the same weights. HINT: "
            "FascCallback(..., calibration=Calibration(update_weights=False)) freezes them, as compress() does."
        )
    if options.refit is True:
        raise ValueError(
            f"Expected refit=False or 'auto' with {passes=} but got True: a refit reads the moments of all layers at "
            "the end, but several passes never hold them all at once."
        )
    if options.calibration_steps is not None:
        raise ValueError(
            f"Expected either `passes` or `calibration_steps` but got {passes=} and "
            f"calibration_steps={options.calibration_steps}: a pass is an epoch."
        )


def _check_stages(options: CompressionOptions) -> None:
    """Refuse a second stage where the first one has no ranks, or where the sums of both could not be added."""
    wanted: dict[str, tuple[bool, Any, str]] = {
        "stages": (options.rounds, 1, "bits have no budget halfway"),
        "passes": (options.passes > 1, 1, "both stages add to the moments of all layers"),
        "sketch": (options.sketch is not None, None, "both stages add to whole moments"),
        "token_fraction": (options.token_fraction < 1, 1.0, "the second stage reads every token"),
    }
    for name, (wrong, value, reason) in wanted.items():
        if wrong:
            raise ValueError(f"Expected {name}={value!r} with stages={options.stages}, since {reason}.")


def _check_projected(options: CompressionOptions) -> None:
    wanted: dict[str, tuple[bool, Any, str]] = {
        "update_weights": (
            options.update_weights,
            False,
            "it sums moments as the weights see them, so the weights have to stay the same",
        ),
        "method": (options.method != "fasc", "fasc", "the other solvers read whole moments"),
        "gate": (options.gate_threshold is not None, None, "the cheap solver reads whole moments"),
        "refit": (options.refit is True, "auto", "a refit reads whole moments"),
    }
    for name, (wrong, value, reason) in wanted.items():
        if wrong:
            raise ValueError(
                f"Expected {name}={value!r} with sketch='projected', since {reason}. HINT: that, or sketch='range'."
            )
