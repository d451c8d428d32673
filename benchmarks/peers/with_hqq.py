"""Quantise with HQQ, which needs no calibration.

    pip install torch==2.13.0 transformers==5.24.0 hqq==0.2.8.post1
    python with_hqq.py --model MODEL --bits 4 --output OUT

Its guide recommends ``--axis 1`` to start with, and ``--axis 0`` for quality where fast kernels do not matter.
"""

from __future__ import annotations

import torch
from common import Clock, Quantised, decoder_layers, load, packed_bytes, parser, tensor_bytes, write
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
from torch import nn


def quantised(linear: nn.Linear, bits: int, group: int, axis: int) -> Quantised:
    """Return one layer; scales and zeros are stored in float16 and used in float32."""
    config = BaseQuantizeConfig(nbits=bits, group_size=group, axis=axis)
    layer = HQQLinear(linear, config, compute_dtype=torch.float16, device="cpu", del_orig=False)
    shifts = layer.meta["scale"], layer.meta["zero"]
    sizes = tensor_bytes(layer.W_q.data, *shifts), packed_bytes(linear.weight, bits, *shifts)
    layer.meta |= {"compute_dtype": torch.float32, "scale": shifts[0].float(), "zero": shifts[1].float()}
    return Quantised(layer.dequantize(), *sizes)


def main() -> None:
    """Quantise and write."""
    arguments = parser(__doc__)
    arguments.add_argument("--axis", type=int, default=1, help="groups lie in rows (1), or across rows (0)")
    options = arguments.parse_args()
    linears = decoder_layers(load(options.model))
    with Clock() as clock:
        layers = {
            name: quantised(linear, options.bits, options.group, options.axis) for name, linear in linears.items()
        }
    config = BaseQuantizeConfig(nbits=options.bits, group_size=options.group, axis=options.axis)
    counted = "W_q as HQQ packs it (3 bits: 10 codes in 32 bits), one scale and one zero of float16 a group"
    write(options, layers, "hqq", config["weight_quant_params"], counted, clock)


if __name__ == "__main__":
    main()
