"""Quantise with optimum-quanto, which needs no calibration of weights and has 2, 4 and 8 bits.

    pip install torch==2.13.0 transformers==5.24.0 optimum-quanto==0.2.7
    python with_quanto.py --model MODEL --bits 4 --output OUT

Its default takes scales from the extremes; ``--hqq`` is its version of HQQ.
"""

from __future__ import annotations

from typing import Any

from common import Clock, Quantised, decoder_layers, load, packed_bytes, parser, tensor_bytes, write
from optimum.quanto import HqqOptimizer, MaxOptimizer, freeze, qint2, qint4, quantize
from torch import nn


def read(linear: nn.Module, bits: int) -> Quantised:
    """Return one quantised layer, with scales and shifts rounded to float16."""
    weight: Any = linear.weight
    halves = weight._scale.half(), weight._shift.half()
    weight._scale, weight._shift = halves[0].float(), halves[1].float()
    stored = tensor_bytes(weight._data._data, *halves)
    return Quantised(weight.dequantize(), stored, packed_bytes(weight, bits, *halves))


def main() -> None:
    """Quantise and write."""
    arguments = parser(__doc__)
    arguments.add_argument("--hqq", action="store_true", help="HqqOptimizer instead of MaxOptimizer")
    options = arguments.parse_args()
    kinds = {2: qint2, 4: qint4}
    if options.bits not in kinds:
        raise ValueError(f"Expected 2 or 4 bits but got {options.bits}.")
    optimizer = HqqOptimizer() if options.hqq else MaxOptimizer()
    model = load(options.model)
    with Clock() as clock:
        quantize(model, weights=kinds[options.bits], optimizer=optimizer, exclude="lm_head")
        for module in model.model.layers.modules():
            if hasattr(module, "weight_group_size"):
                module.weight_group_size = options.group  # of itself it takes up to 128
        freeze(model)
    layers = {name: read(linear, options.bits) for name, linear in decoder_layers(model).items()}
    settings = {"weights": f"qint{options.bits}", "optimizer": type(optimizer).__name__, "group_size": options.group}
    write(options, layers, "optimum-quanto", settings, "packed codes, scales and shifts of float16", clock)


if __name__ == "__main__":
    main()
