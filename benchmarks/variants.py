"""Variants of fasc for `fasc_variants.py`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from variant_statistics import WINDOW_COUNTS

from fasc_lightning.refit import RefitOptions
from fasc_lightning.solvers import SHRINK_A, SHRINK_COUPLED_G, SHRINK_G


@dataclass(frozen=True)
class Variant:
    """The options of a variant; the defaults are ``fasc`` without refit.

    Attributes:
        A: Statistics whose A is averaged.
        G: Statistics whose G is averaged.
        matched: Whether they are first scaled to the trace of the first one, if units differ.
        shrink_inputs: Relative shrinkage of A.
        shrink_gradients: Relative shrinkage of G.
        power: The allocation gets losses to this power.
        heldout: Losses are multiplied by (exact J on held-out windows / predicted J) to this power, both at the
            budget's ranks.
        measured: As ``heldout``, on some of the calibration windows, as allocation="measured" does with 0.5.
        choose: Whether a layer is factorised from plain statistics if exact J on held-out windows is lower.
        refit: Options of a refit after allocation; None for no refit.
    """

    A: tuple[str, ...] = ("coupled",)
    G: tuple[str, ...] = ("coupled",)
    matched: bool = False
    shrink_inputs: float = SHRINK_A
    shrink_gradients: float = SHRINK_COUPLED_G
    power: float = 1.0
    heldout: float = 0.0
    measured: float = 0.0
    choose: bool = False
    refit: RefitOptions | None = None

    @classmethod
    def of(cls, *names: str, **options: Any) -> Variant:
        """Return the variant with A and G from the statistics of these names."""
        return cls(A=names, G=names, **options)


#: All variants by name, in the order of the tables.
VARIANTS = {
    "plain": Variant.of("plain", shrink_gradients=SHRINK_G),
    "fasc": Variant(),
    # Token weights |h|^a and |x|^a; fasc is a = 1. Shrinkage stays that of fasc.
    "weight-0": Variant.of("plain"),
    "weight-0.5": Variant.of("weight-0.5"),
    "weight-1-only-A": Variant(G=("plain",)),
    "weight-1-only-G": Variant(A=("plain",)),
    "weight-1.5": Variant.of("weight-1.5"),
    "weight-2": Variant.of("weight-2"),
    "weight-2-clipped": Variant.of("weight-2-clipped"),
    "mahalanobis": Variant.of("mahalanobis"),
    "shrink-G-0.02": Variant(shrink_gradients=0.02),
    "shrink-G-0.1": Variant(shrink_gradients=0.1),
    "shrink-G-0.2": Variant(shrink_gradients=0.2),
    "shrink-A-1e-3": Variant(shrink_inputs=1e-3),
    "shrink-A-1e-2": Variant(shrink_inputs=1e-2),
    "shrink-A-3e-2": Variant(shrink_inputs=3e-2),
    # Variants with one change from plain.
    "sequence": Variant.of("sequence", shrink_gradients=SHRINK_G),
    "sequence-half": Variant.of("plain", "sequence", matched=True, shrink_gradients=SHRINK_G),
    "sample": Variant.of("sample", shrink_gradients=SHRINK_G),
    "sample-half": Variant.of("plain", "sample", matched=True, shrink_gradients=SHRINK_G),
    "root": Variant.of("root", shrink_gradients=SHRINK_G),
    "root-half": Variant.of("plain", "root", matched=True, shrink_gradients=SHRINK_G),
    # Variants with one change from fasc.
    "staged-0.8": Variant.of("staged-0.8"),
    "staged-0.8-only-G": Variant(G=("staged-0.8",)),
    "staged-0.8-half": Variant.of("coupled", "staged-0.8"),
    "staged-0.6": Variant.of("staged-0.6"),
    "staged-0.6-only-G": Variant(G=("staged-0.6",)),
    "staged-0.6-half": Variant.of("coupled", "staged-0.6"),
    "staged-thirds": Variant.of("coupled", "staged-0.8", "staged-0.6", matched=True),
    "losses-power-0.8": Variant(power=0.8),
    "losses-power-1.2": Variant(power=1.2),
    "losses-heldout": Variant(heldout=1.0),
    "losses-heldout-root": Variant(heldout=0.5),
    "losses-measured": Variant(measured=1.0),
    "losses-measured-root": Variant(measured=0.5),
    "choose-by-heldout": Variant(choose=True),
    **{f"windows-{count}": Variant.of(f"windows-{count}") for count in WINDOW_COUNTS},
    "refit": Variant(refit=RefitOptions()),
    "refit-to-factors": Variant(refit=RefitOptions(towards="factors")),
    "refit-layer": Variant(refit=RefitOptions(target="layer")),
    "refit-equal": Variant(refit=RefitOptions(weights="equal")),
    "refit-all": Variant(refit=RefitOptions(factors="all")),
    "refit-all-equal": Variant(refit=RefitOptions(factors="all", weights="equal")),
    "refit-lambda-1": Variant(refit=RefitOptions(anchors=(1.0,))),
    "refit-lambda-3": Variant(refit=RefitOptions(anchors=(3.0,))),
    "refit-lambda-0.3-1-3": Variant(refit=RefitOptions(anchors=(0.3, 1.0, 3.0))),
    "refit-lambda-3-10": Variant(refit=RefitOptions(anchors=(3.0, 10.0))),
}
