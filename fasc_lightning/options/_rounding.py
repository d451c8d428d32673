"""Options of rounding to few bits, and what they mean as grids."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from fasc_lightning._utils import text_in_bytes
from fasc_lightning.layers import INT8_ROWS, Grid
from fasc_lightning.options._types import check_fields, check_word

if TYPE_CHECKING:
    from fasc_lightning.options._compression import CompressionOptions

#: Ways to choose the numbers of a grid: by the calibration's moments, or the nearest ones.
Rounding = Literal["calibrated", "nearest"]

#: Short forms of :class:`Quantize`; "int8-dynamic" also rounds inputs.
QuantizeWord = Literal["int8", "int8-dynamic", "int4", "int3", "int2"]
QUANTIZE_WORDS: tuple[QuantizeWord, ...] = get_args(QuantizeWord)

#: The grids that a size is spent over.
SIZE_GRIDS = (Grid(2), Grid(3), Grid(4), INT8_ROWS)


@dataclass(frozen=True)
class Quantize:
    """How the matrices of the targeted layers are rounded. "int4" stands for ``Quantize(4)``, "int3" for 3 bits.

    Args:
        bits: Bits of a weight: 8, 4, 3 or 2.
        group: Inputs that share a scale, a multiple of 8; None for all inputs of an output. Smaller groups lose less
            and take more bytes: 16 bits of scale, and a zero point, for each group.
        symmetric: Whether grids are symmetric around zero. They store no zero points, and lose a little more.
        rounding: "calibrated" rounds so that the calibration's predicted loss is small. "nearest" takes the nearest
            numbers, for comparison.

    Raises:
        ValueError: If an option is out of range.
        TypeError: If an option is of a wrong type.
    """

    bits: int = 4
    group: int | None = 64
    symmetric: bool = False
    rounding: Rounding = "calibrated"

    def __post_init__(self) -> None:
        check_fields(self)
        check_word("rounding", self.rounding, get_args(Rounding))
        Grid(self.bits, self.group, self.symmetric)  # refuses wrong values

    @property
    def grid(self) -> Grid:
        """The grid."""
        return Grid(self.bits, self.group, self.symmetric)


def check_quantize(value: Any) -> None:
    """Refuse an unknown value of the option ``quantize``.

    Raises:
        ValueError: If it is unknown.
    """
    if not isinstance(value, Quantize) and value not in QUANTIZE_WORDS:
        raise ValueError(
            f"Expected `quantize` to be one of {', '.join(map(repr, QUANTIZE_WORDS))} or a Quantize but got "
            f"{value!r:.200}."
        )


def as_size(value: Any) -> float | int | None:
    """Return a size as a fraction (float) or as bytes (int).

    Raises:
        ValueError: If it is neither.
    """
    if value is None:
        return None
    if isinstance(value, str):
        amount = text_in_bytes(value, {"B": 1})
        if not math.isnan(amount):
            return int(amount)
    elif isinstance(value, float | int) and not isinstance(value, bool) and 0 < value <= 1:
        return float(value)
    raise ValueError(
        "Expected `size` to be a fraction of the targeted layers' bytes in 16 bits, in (0, 1], or the bytes of the "
        f"whole model as in '90MB' or '4GiB', but got {value!r:.200}."
    )


def rounds(options: CompressionOptions) -> bool:
    """Return whether options round layers of full rank by the calibration, in place of factorising them."""
    return options.size is not None or (options.quantize is not None and options.rank is None and options.keep is None)


def grids_of(options: CompressionOptions) -> tuple[Grid, ...]:
    """Return the grids that layers of full rank may get; none if layers are factorised."""
    if not rounds(options):
        return ()
    if options.size is not None:
        return SIZE_GRIDS
    if isinstance(options.quantize, Quantize):
        return (options.quantize.grid,)
    return ({"int8": INT8_ROWS, "int4": Grid(4), "int3": Grid(3), "int2": Grid(2)}[str(options.quantize)],)


def is_calibrated(options: CompressionOptions) -> bool:
    """Return whether rounding follows the calibration's moments."""
    return not isinstance(options.quantize, Quantize) or options.quantize.rounding == "calibrated"


def check_rounding(options: CompressionOptions) -> None:
    """Check ``size`` and ``quantize`` against the options that they rule out.

    Raises:
        ValueError: If options exclude each other; the message names the remedy.
    """
    as_size(options.size)  # refuses what cannot be read
    quantize, has_rank = options.quantize, not (options.rank is None and options.keep is None)
    if options.size is not None and quantize is not None:
        raise ValueError(
            f"Expected `size` or `quantize` but got both (size={options.size!r}, {quantize=}): a size chooses the bits "
            "of every layer. Give one."
        )
    if options.size is not None and has_rank:
        raise ValueError(
            f"Expected `size` or a rank but got both (size={options.size!r}, rank={options.rank!r}, "
            f"keep={options.keep!r}). Give one."
        )
    if has_rank and quantize not in (None, "int8", "int8-dynamic"):
        raise ValueError(
            f"Expected quantize='int8' together with a rank but got {quantize!r}: two factors of few bits lose more "
            "than a dense layer of the same bytes (docs/bytes.md). HINT: leave out `rank` and `keep`."
        )
    if not rounds(options):
        return
    if quantize == "int8-dynamic":
        raise ValueError(
            "Expected quantize='int8-dynamic' together with `rank` or `keep` but got it alone. HINT: "
            "quantize(model, 'int8-dynamic') rounds a dense model, without a calibration."
        )
    if getattr(options.recovery, "arm", None) == "lora":
        raise ValueError(
            "Expected recovery='factors', which trains scales, but got adapters: they cannot be merged into rounded "
            "matrices, and bring nothing beside scales (docs/recovery.md)."
        )
    if options.recovery is not None and options.quantize == "int8":
        raise ValueError(
            "Expected recovery=None with quantize='int8' alone, which leaves nothing to recover, but got "
            f"{options.recovery!r}. HINT: leave the recovery out, or take fewer bits, which have something to train."
        )
    if options.refit is True and not is_calibrated(options):
        raise ValueError(
            "Expected refit=False or 'auto' with rounding='nearest' but got True: a refit would round by the moments."
        )
    if options.method not in ("fasc", "fasc-plain"):
        raise ValueError(
            f"Expected method='fasc' or 'fasc-plain', whose moments measure the loss of rounding, but got "
            f"{options.method!r}."
        )
    if options.layout != "auto" or options.align != 1:
        raise ValueError(
            f"Expected layout='auto' and align=1 without ranks, which they are about, but got {options.layout!r} and "
            f"{options.align!r}."
        )
    if options.gate_threshold is not None:
        raise ValueError("Expected gate=None without ranks but got a gate, which chooses solvers of ranks.")
    if options.sketch is not None:
        raise ValueError(
            f"Expected sketch=None, since rounding reads whole moments, but got {options.sketch!r}. HINT: "
            "Memory(passes=2) or more holds a share of them at a time."
        )
