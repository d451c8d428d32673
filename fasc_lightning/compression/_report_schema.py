"""Schema of the report of a compression."""

from __future__ import annotations

from fasc_lightning._utils import (
    integer,
    listed,
    mapping,
    number,
    one_of,
    optional,
    plain,
    record,
    refuse,
    row,
    text,
)
from fasc_lightning.layers import form_from_plain

_COUNT = integer(0)
#: JSON has no NaN; None stands for it.
_FIGURE = optional(number(finite=False))
_SIZES = record({"dense": _COUNT, "compressed": _COUNT}, {"unquantized": _COUNT})
_SET = record(dict.fromkeys(("parameters", "bytes", "flops_per_token"), _SIZES))


def _form(value: object, path: str) -> None:
    """Refuse a value that names no quantisation."""
    try:
        form_from_plain(value)
    except ValueError as error:
        raise refuse("a quantisation", value, path) from error


_LAYER = record(
    {
        "name": text,
        "shape": row(integer(1), integer(1)),
        "rank": integer(1),
        "layout": one_of("dense", "factors", "pivot", "residual"),
        "tokens": _COUNT,
        **dict.fromkeys(("rho", "rho_null", "rho_debiased", "loss"), _FIGURE),
        "method": text,
        "flags": listed(text),
    },
    {"sketches": mapping(record({"size": integer(1), "error": _FIGURE})), "quantize": optional(_form)},
    extra=True,
)

#: Schema of :meth:`~fasc_lightning.CompressionReport.to_dict`.
REPORT = record(
    {
        "method": text,
        "options": mapping(plain),
        "seed": integer(),
        "targeted": _SET,
        "whole": _SET,
        "seconds": mapping(number(0)),
        "moments_bytes": _COUNT,
        "peak_memory_bytes": _COUNT,
        "layers": listed(_LAYER),
    },
    {
        **dict.fromkeys(("refit", "refine", "recovery", "validation"), optional(mapping(plain))),
        "versions": mapping(text),
    },
    extra=True,
)
