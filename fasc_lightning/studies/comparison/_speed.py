"""Speed of a whole model: tokens per second of prefill and of decoding one sequence, in bfloat16."""

from __future__ import annotations

import copy
import statistics
import time
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fasc_lightning.layers import packed_matrices

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: Tokens that each round decodes, and tokens of the prompt before them.
DECODED, BEFORE = 64, 16

#: Rounds after one that warms up; the median counts.
ROUNDS = 3


@torch.inference_mode()
def speed(model: PreTrainedModel, prompt: Tensor) -> dict[str, float]:
    """Return tokens per second of a copy of the model in bfloat16, the median of three rounds, batch 1.

    Args:
        model: Causal language model; only read.
        prompt: Token ids, (1, tokens): prefill reads all of them, and decoding continues the first ones.

    Returns:
        "prefill" and "decode".
    """
    twin: Any = copy.deepcopy(model).eval().to(torch.bfloat16)
    for matrix in packed_matrices(twin):
        matrix.prepare()  # to the form of a fast kernel where there is one
    prompt = prompt.to(model.device)
    prefills, decodes = [], []
    for _ in range(1 + ROUNDS):
        start = _now(model.device)
        twin(prompt, use_cache=True, logits_to_keep=1)
        prefills.append(_now(model.device) - start)
        out = twin(prompt[:, :BEFORE], use_cache=True, logits_to_keep=1)
        start = _now(model.device)
        for _ in range(DECODED):
            token = out.logits[:, -1:].argmax(-1)
            out = twin(token, past_key_values=out.past_key_values, use_cache=True, logits_to_keep=1)
        decodes.append(_now(model.device) - start)
    return {
        "prefill": prompt.shape[1] / statistics.median(prefills[1:]),
        "decode": DECODED / statistics.median(decodes[1:]),
    }


def _now(device: torch.device) -> float:
    """Return the time once the device has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
