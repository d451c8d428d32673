"""What the scripts of this folder share: options, the decoder's layers, and the folder that each of them writes.

It needs torch, transformers and safetensors alone, which every peer brings along.
"""

from __future__ import annotations

import json
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer


@dataclass(frozen=True)
class Quantised:
    """One layer after quantisation.

    Attributes:
        weight: The dequantised weight, (outputs, inputs).
        stored: Bytes of the layer's tensors as the peer stores them.
        packed: Bytes with every code at exactly its bits, and scales and zeros in the peer's own types.
    """

    weight: Tensor
    stored: int
    packed: int


def parser(doc: str | None, bits: int = 4, group: int = 64) -> ArgumentParser:
    """Return the parser of the options that all scripts have."""
    options = ArgumentParser(description=(doc or "").split("\n")[0])
    options.add_argument("--model", required=True, help="folder of a transformers model in float32")
    options.add_argument("--tokens", help="safetensors file with input_ids, (windows, tokens); for calibration")
    options.add_argument("--bits", type=int, default=bits)
    options.add_argument("--group", type=int, default=group, help="weights that share a scale")
    options.add_argument("--output", required=True, help="folder to write")
    return options


def load(folder: str, dtype: torch.dtype = torch.float32) -> Any:
    """Return the model, ready for evaluation."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def decoder_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """Return the linear layers of the decoder blocks by name: no head, no embeddings."""
    modules = model.named_modules()
    return {name: module for name, module in modules if isinstance(module, nn.Linear) and ".layers." in name}


def calibration(options: Namespace) -> Tensor:
    """Return the calibration tokens, (windows, tokens)."""
    if not options.tokens:
        raise ValueError("Expected --tokens, because this peer calibrates.")
    return load_file(options.tokens)["input_ids"]


def packed_bytes(weight: Tensor, bits: int, *others: Tensor) -> int:
    """Return the bytes of codes at exactly their bits and of the other tensors as they are."""
    return (weight.numel() * bits + 7) // 8 + tensor_bytes(*others)


def tensor_bytes(*tensors: Tensor) -> int:
    """Return the bytes of tensors as they are."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def write(
    options: Namespace,
    layers: Mapping[str, Quantised],
    package: str,
    settings: Mapping[str, Any],
    counted: str,
    clock: Clock,
) -> None:
    """Write the original model with the dequantised layers, its tokenizer and peer.json.

    Args:
        options: The script's options.
        layers: Every layer of the decoder by name.
        package: The peer's name among packages.
        settings: The peer's settings, as its own names have them.
        counted: What the bytes as stored consist of.
        clock: Times of the quantisation.

    Raises:
        ValueError: If a layer is missing or not finite.
    """
    model = load(options.model)
    targets = decoder_layers(model)
    if missing := targets.keys() ^ layers.keys():
        raise ValueError(f"Expected exactly the layers of the decoder, but these differ: {sorted(missing)[:5]}.")
    errors = []
    with torch.no_grad():
        for name, target in targets.items():
            weight = layers[name].weight.detach().float().cpu()
            if not torch.isfinite(weight).all():
                raise ValueError(f"Expected finite weights in {name}.")
            errors.append(float((weight - target.weight).norm() / target.weight.norm()))
            target.weight.copy_(weight)
    output = Path(options.output)
    model.save_pretrained(output)
    AutoTokenizer.from_pretrained(options.model).save_pretrained(output)
    report = {
        "name": package,
        "version": version(package),
        "settings": dict(settings),
        "bits": options.bits,
        "group": options.group,
        "layer_bytes": sum(layer.packed for layer in layers.values()),
        "stored_bytes": sum(layer.stored for layer in layers.values()),
        "counted": counted,
        "layers": len(layers),
        "mean_relative_error": sum(errors) / len(errors),
        "seconds": round(clock.seconds, 1),
        "processor_seconds": round(clock.processor_seconds, 1),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
    }
    (output / "peer.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


class Clock:
    """Wall time of a with block, and the time of all its threads on a processor, which a busy machine changes less."""

    seconds: float
    processor_seconds: float

    def __enter__(self) -> Clock:
        self._start = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *exception: object) -> None:
        self.seconds = time.perf_counter() - self._start[0]
        self.processor_seconds = time.process_time() - self._start[1]
