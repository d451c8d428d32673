"""Quantise weights with torchao, which needs no calibration.

    pip install torch==2.13.0 transformers==5.24.0 torchao==0.18.0
    python with_torchao.py --model MODEL --bits 4 --output OUT

8 bits are Int8WeightOnlyConfig, with one scale a row. Fewer are IntxWeightOnlyConfig: symmetric with the scales of HQQ,
or asymmetric with scales by the extremes. Int4WeightOnlyConfig needs a GPU.
"""

from __future__ import annotations

from typing import Any

import torch
from common import Clock, Quantised, decoder_layers, load, packed_bytes, parser, tensor_bytes, write
from torch import nn
from torchao.core.config import AOBaseConfig
from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, MappingType, PerGroup, quantize_
from torchao.quantization.quantize_.workflows.intx.intx_choose_qparams_algorithm import IntxChooseQParamsAlgorithm


def config_of(bits: int, group: int, asymmetric: bool) -> AOBaseConfig:
    """Return torchao's configuration; scales of groups are float16."""
    if bits == 8:
        return Int8WeightOnlyConfig()
    return IntxWeightOnlyConfig(
        weight_dtype=getattr(torch, f"int{bits}"),
        granularity=PerGroup(group),
        mapping_type=MappingType.ASYMMETRIC if asymmetric else MappingType.SYMMETRIC,
        scale_dtype=torch.float16,
        intx_choose_qparams_algorithm=(
            IntxChooseQParamsAlgorithm.AFFINE if asymmetric else IntxChooseQParamsAlgorithm.HQQ_SCALE_ONLY
        ),
    )


def read(linear: nn.Linear, bits: int) -> Quantised:
    """Return one quantised layer; zeros that are all 0, as in a symmetric one, take no bytes."""
    weight: Any = linear.weight
    zero = getattr(weight, "zero_point", None)
    shifts = [weight.scale] if zero is None or not zero.any() else [weight.scale, zero]
    stored = tensor_bytes(*(getattr(weight, name) for name in weight.tensor_data_names))
    return Quantised(weight.dequantize(), stored, packed_bytes(weight.qdata, bits, *shifts))


def main() -> None:
    """Quantise and write."""
    arguments = parser(__doc__)
    arguments.add_argument("--asymmetric", action="store_true", help="with zeros of int8, by the groups' extremes")
    options = arguments.parse_args()
    config = config_of(options.bits, options.group, options.asymmetric)
    model = load(options.model)
    with Clock() as clock:
        quantize_(model.model.layers, config)
    layers = {name: read(linear, options.bits) for name, linear in decoder_layers(model).items()}
    counted = "codes at their bits (torchao stores them in int8), scales of float16 (8 bits: float32), zeros of int8"
    write(options, layers, "torchao", {"config": str(config)}, counted, clock)


if __name__ == "__main__":
    main()
