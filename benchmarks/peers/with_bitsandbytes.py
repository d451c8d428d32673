"""Quantise with bitsandbytes' NF4, which needs no calibration and has 4 bits only.

    pip install torch==2.13.0 transformers==5.24.0 bitsandbytes==0.50.2 accelerate==1.15.0
    python with_bitsandbytes.py --model MODEL --output OUT

``--double`` quantises the scales as well, as QLoRA does.
"""

from __future__ import annotations

from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from common import Clock, Quantised, decoder_layers, load, packed_bytes, parser, tensor_bytes, write
from torch import Tensor


def quantised(weight: Tensor, group: int, double: bool) -> Quantised:
    """Return one layer."""
    codes, state = quantize_4bit(weight, blocksize=group, compress_statistics=double, quant_type="nf4")
    scales = [state.absmax, *([state.offset, state.state2.absmax] if double else [])]
    return Quantised(dequantize_4bit(codes, state), tensor_bytes(codes, *scales), packed_bytes(weight, 4, *scales))


def main() -> None:
    """Quantise and write."""
    arguments = parser(__doc__)
    arguments.add_argument("--double", action="store_true", help="scales of 8 bits instead of float32")
    options = arguments.parse_args()
    if options.bits != 4:
        raise ValueError(f"Expected 4 bits but got {options.bits}.")
    linears = decoder_layers(load(options.model))
    with Clock() as clock:
        layers = {
            name: quantised(linear.weight.data, options.group, options.double) for name, linear in linears.items()
        }
    settings = {"quant_type": "nf4", "compress_statistics": options.double, "blocksize": options.group}
    counted = "codes, absmax of float32 (double: 8 bits, and their own of float32); not the tables of all layers"
    write(options, layers, "bitsandbytes", settings, counted, clock)


if __name__ == "__main__":
    main()
