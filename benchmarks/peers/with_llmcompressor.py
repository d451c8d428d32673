"""Quantise with llm-compressor's GPTQ.

    pip install torch==2.13.0 llmcompressor==0.14.0.1
    python with_llmcompressor.py --model MODEL --tokens TOKENS --bits 4 --output OUT

Its presets W4A16, W3A16 and W2A16 with another group: symmetric, static order by activations, damping of 0.01, one
block after another on the outputs of the quantised ones.
"""

from __future__ import annotations

from typing import Any

import torch
from common import Clock, Quantised, calibration, decoder_layers, load, packed_bytes, parser, write
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import GPTQModifier
from transformers import AutoTokenizer


def read(linear: Any, bits: int) -> Quantised:
    """Return one quantised layer, with scales of float16; symmetric ones have no zeros."""
    scale = linear.weight_scale.data[..., None]
    codes = (linear.weight.data.unflatten(-1, (scale.shape[1], -1)) / scale).round()
    half = scale.half()
    sizes = packed_bytes(linear.weight, bits, half)
    return Quantised((codes * half.float()).flatten(-2), sizes, sizes)


def main() -> None:
    """Quantise and write."""
    options = parser(__doc__).parse_args()
    tokens = calibration(options)
    rows = tokens.tolist()
    data = Dataset.from_dict({"input_ids": rows, "attention_mask": torch.ones_like(tokens).tolist()})
    weights = QuantizationArgs(
        num_bits=options.bits, type="int", symmetric=True, strategy="group", group_size=options.group
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    recipe = GPTQModifier(config_groups={"group_0": scheme}, ignore=["lm_head"])
    settings = {"actorder": str(recipe.actorder), "dampening_frac": recipe.dampening_frac}
    model = load(options.model)
    with Clock() as clock:
        oneshot(
            model=model,
            tokenizer=AutoTokenizer.from_pretrained(options.model),
            dataset=data,
            recipe=recipe,
            num_calibration_samples=len(rows),
            max_seq_length=len(rows[0]),
            shuffle_calibration_samples=False,
        )
    linears = {name: model.get_submodule(name) for name in decoder_layers(load(options.model))}
    settings["weights"] = next(iter(linears.values())).quantization_scheme.weights.model_dump(mode="json")
    layers = {name: read(linear, options.bits) for name, linear in linears.items()}
    counted = "codes at their bits, scales of float16"
    write(options, layers, "llmcompressor", settings, counted, clock)


if __name__ == "__main__":
    main()
