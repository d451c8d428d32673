"""Plans for published models, from their configs alone: no weights, no device, no batch.

    python benchmarks/scale.py --output benchmarks/results
    python benchmarks/scale.py --write docs/scale.md       # between the page's markers

For every model and budget the tables show the size after compression, the memory of exact and sketched moments, and the
plan for a device with ``--memory`` and a host with ``--host-memory``. The shapes come from the configs on the hub.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from pages import write_part
from torch import nn
from transformers import Gemma2Config, LlamaConfig, MistralConfig, MixtralConfig, PreTrainedConfig, Qwen2Config

from fasc_lightning.cli import markdown_table
from fasc_lightning.options import ReductionKind
from fasc_lightning.planning import CompressionForecast, bytes_of, model_on_meta, plan

#: Budgets, as options of :func:`~fasc_lightning.planning.plan`.
BUDGETS: list[dict[str, Any]] = [{"rank": 0.5}, {"keep": 0.8}, {"keep": 0.6}]

#: The paper's Table 5, Mistral-7B at half rank on an A100: GB of the original and of both compressed models.
TABLE_5 = {"original": 14.2, "compressed": 8.1}


def configs() -> dict[str, PreTrainedConfig]:
    """Return the models' configs by name."""

    def shape(hidden: int, inner: int, blocks: int, heads: int, kv: int, words: int, **more: Any) -> dict[str, Any]:
        return {
            "hidden_size": hidden,
            "intermediate_size": inner,
            "num_hidden_layers": blocks,
            "num_attention_heads": heads,
            "num_key_value_heads": kv,
            "vocab_size": words,
            **more,
        }

    return {
        "Llama-3.2-3B": LlamaConfig(**shape(3072, 8192, 28, 24, 8, 128256, head_dim=128, tie_word_embeddings=True)),
        "Mistral-7B": MistralConfig(**shape(4096, 14336, 32, 32, 8, 32000)),
        "Llama-3-8B": LlamaConfig(**shape(4096, 14336, 32, 32, 8, 128256)),
        "Gemma-2-9B": Gemma2Config(**shape(3584, 14336, 42, 16, 8, 256000, head_dim=256)),
        "Qwen2.5-7B": Qwen2Config(**shape(3584, 18944, 28, 28, 4, 152064)),
        "Mixtral-8x7B": MixtralConfig(
            **shape(4096, 14336, 32, 32, 8, 32000, num_local_experts=8, num_experts_per_tok=2)
        ),
        "Llama-3-70B": LlamaConfig(**shape(8192, 28672, 80, 64, 8, 128256)),
    }


def gigabytes(size: float) -> str:
    """Return bytes in units of 10^9."""
    return f"{size / 1e9:.1f}"


#: Number of devices for models that do not fit on one.
EIGHT = 8

#: Ways to hold moments.
KINDS: tuple[ReductionKind | None, ...] = (None, "projected", "range")

#: Enough memory for any plan, on a device that need not exist.
ENDLESS: dict[str, Any] = {"device": "cuda", "memory": "10000TB", "probed": False}


def storage(found: CompressionForecast) -> str:
    """Return the storage of moments in words."""
    words = [found.options.get("sketch", "whole")]
    words += ["moments and factors on the CPU"] if "moments_device" in found.options else []
    words += [f"{found.passes} passes"] if found.passes > 1 else []
    return ", ".join(words)


def planned(model: nn.Module, budget: dict[str, Any], memory: int, host_memory: str | None) -> tuple[str, str, str]:
    """Return the storage of moments in words, and the peaks on the device and on the host in GB."""
    try:
        found = plan(
            model,
            **budget,
            device="cuda",
            memory=memory,
            host_memory=host_memory,
            batch_tokens=2048,
            probed=False,
        )
    except MemoryError:
        return "does not fit", "", ""
    return storage(found), gigabytes(found.peak.device), gigabytes(found.peak.host) if found.peak.host else ""


def rows(memory: str, host_memory: str) -> tuple[list[dict[str, object]], list[dict[str, object]]]:
    """Return both tables: sizes by budget, and plans for a device."""
    sizes, places, one = [], [], bytes_of(memory, "memory") or 0
    for name, config in configs().items():
        model = model_on_meta(config, torch.bfloat16)
        for budget in BUDGETS:
            ((option, value),) = budget.items()
            by_kind = {kind: plan(model, **budget, **ENDLESS, passes=1, sketch=kind) for kind in KINDS}
            easy = by_kind[None]
            before, after = easy.whole["dense"], easy.whole["compressed"]
            row: dict[str, object] = {"model": name, "budget": f"{option} {value:g}"}
            sizes.append(
                {
                    **row,
                    "parameters": f"{before.parameters / 1e9:.2f} G",
                    "left": f"{after.parameters / 1e9:.2f} G",
                    "GB bf16": gigabytes(before.bytes),
                    "GB left": gigabytes(after.bytes),
                    "rank of down_proj": next(x.rank for x in easy.layers if x.name.endswith(("down_proj", "w_down"))),
                }
            )
            # A model larger than one device is planned for eight devices, as if they were one.
            count = 1 if before.bytes < one else EIGHT
            beside, alone = (planned(model, budget, count * one, host) for host in (host_memory, None))
            places.append(
                {
                    **row,
                    "moments whole": gigabytes(by_kind[None].moments_bytes),
                    "projected": gigabytes(by_kind["projected"].moments_bytes),
                    "range": gigabytes(by_kind["range"].moments_bytes),
                    "all factors": gigabytes(easy.parts["factors"]),
                    "device": memory if count == 1 else f"{count} x {memory}",
                    f"with {host_memory} beside it": beside[0],
                    "peak": beside[1],
                    "on the CPU": beside[2],
                    "alone": alone[0],
                    "peak there": alone[1],
                }
            )
            print(name, budget, beside[0], alone[0], flush=True)
    return sizes, places


def table_5() -> list[dict[str, object]]:
    """Return the sizes of Mistral-7B at half rank by storage, beside the memory that the paper reports."""
    model = model_on_meta(configs()["Mistral-7B"], torch.bfloat16)
    found: list[dict[str, object]] = []

    def row(what: str, size: int) -> None:
        found.append(
            {
                "Mistral-7B in bfloat16": what,
                "GB": f"{size / 1e9:.2f}",
                "GiB": f"{size / 2**30:.2f}",
                "the paper's": next((f"{gb}" for name, gb in TABLE_5.items() if what.startswith(name)), ""),
            }
        )

    half = plan(model, rank=0.5, **ENDLESS, passes=1)
    row("original", half.whole["dense"].bytes)
    row("compressed to rank 0.5, pivots", half.whole["compressed"].bytes)
    # Two factors of rank k hold k (m + n) numbers, more than the budget of `rank`, which counts k (m + n - k).
    shapes = [layer.shape for layer in half.layers]
    rest = half.whole["dense"].parameters - half.targeted["dense"].parameters
    row("compressed to rank 0.5, two factors", 2 * (rest + sum(min(m, n) // 2 * (m + n) for m, n in shapes)))
    for keep in (0.8, 0.6, 0.5):
        row(f"keep={keep:g}", plan(model, keep=keep, **ENDLESS, passes=1).whole["compressed"].bytes)
    return found


def main() -> None:
    """Write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="folder for scale.md")
    parser.add_argument("--write", type=Path, help="page whose generated part is replaced")
    parser.add_argument("--memory", default="80GB", help="of the device that is planned for")
    parser.add_argument("--host-memory", default="512GB", help="of the CPU beside it")
    options = parser.parse_args()
    sizes, places = rows(options.memory, options.host_memory)
    text = "\n\n".join(
        [
            "### What is left",
            markdown_table(sizes),
            f"### How an {options.memory} device with {options.host_memory} beside it would do it",
            markdown_table(places),
            "### Beside the paper's Table 5",
            markdown_table(table_5()),
        ]
    )
    if options.output is not None:
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / "scale.md").write_text(text + "\n", encoding="utf-8")
    if options.write is not None:
        write_part(options.write, "scale.py", text)


if __name__ == "__main__":
    main()
