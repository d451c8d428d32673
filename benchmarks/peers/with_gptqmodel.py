"""Quantise with GPTQModel's GPTQ.

    pip install torch==2.13.0 transformers==5.24.0 gptqmodel==7.6.0
    python with_gptqmodel.py --model MODEL --tokens TOKENS --bits 4 --output OUT

All settings but bits and group are its defaults: symmetric, group aware reordering, damping of 0.05, one block after
another on the outputs of the quantised ones. ``--desc-act`` orders all columns by their activations instead.
"""

from __future__ import annotations

import os
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from common import Clock, Quantised, calibration, decoder_layers, load, packed_bytes, parser, tensor_bytes, write
from gptqmodel import GPTQModel, QuantizeConfig
from gptqmodel.utils.model_dequant import dequantize_model
from safetensors.torch import load_file
from torch import Tensor


def tensors_in(folder: Path) -> dict[str, Tensor]:
    """Return all tensors of a checkpoint."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def main() -> None:
    """Quantise and write."""
    arguments = parser(__doc__)
    arguments.add_argument("--desc-act", action="store_true", help="order columns by activations, across groups")
    arguments.add_argument("--batch", type=int, default=8, help="windows that pass together")
    options = arguments.parse_args()
    tokens = calibration(options)
    examples = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in tokens]
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # it refuses fewer, which is its default with two cores
    config = QuantizeConfig(
        bits=options.bits, group_size=options.group, desc_act=options.desc_act or None, offload_to_disk=False
    )
    model = GPTQModel.load(options.model, config, device="cpu", dtype=torch.float32)
    with Clock() as clock:
        model.quantize(examples, batch_size=options.batch)
    with TemporaryDirectory() as folder:
        packed, plain = Path(folder, "packed"), Path(folder, "plain")
        model.save(str(packed))
        dequantize_model(packed, plain, target_dtype=torch.float32)
        stored, weights = tensors_in(packed), tensors_in(plain)
    layers = {}
    for name in decoder_layers(load(options.model)):
        parts = {part: stored[f"{name}.{part}"] for part in ("qweight", "qzeros", "scales", "g_idx")}
        weight = weights[f"{name}.weight"]
        layers[name] = Quantised(
            weight, tensor_bytes(*parts.values()), packed_bytes(weight, options.bits, parts["scales"])
        )
    scales = parts["scales"].dtype
    counted = f"codes at their bits and scales of {scales}; stored are also the equal zeros and the groups of columns"
    write(options, layers, "gptqmodel", config.to_dict(), counted, clock)


if __name__ == "__main__":
    main()
