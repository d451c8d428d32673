"""The state of the random generators that a training draws from, in plain data and tensors."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from fasc_lightning._undo import undoing


def rng_state() -> dict[str, Any]:
    """Return the state of Python's, NumPy's and torch's own generators, the current CUDA device's among them."""
    legacy: Any = np.random.get_state(legacy=True)  # noqa: NPY002 # which loaders and transforms draw from
    kind, keys, position, has_gauss, gauss = legacy
    state = {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Put the generators into a state that :func:`rng_state` returned."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


@contextmanager
def same_rng() -> Iterator[None]:
    """Give the generators back the state that they have now, whatever is drawn inside; those of all devices."""
    state = rng_state()
    with undoing() as undo:
        undo.add(set_rng_state, state)
        if "cuda" in state:
            undo.add(torch.cuda.set_rng_state_all, torch.cuda.get_rng_state_all())
        yield


def seed_rng(seed: int) -> None:
    """Seed the generators, without a word and without a variable of the environment, as Lightning would leave one."""
    seed %= 2**32  # NumPy takes no more
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    torch.manual_seed(seed)
