"""States of the random generators that a training uses, as plain data and tensors."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from fasc_lightning._utils._schema import Entry, SchemaError, integer, listed, number, one_of, optional, record, row
from fasc_lightning._utils._undo import undoing


def rng_state() -> dict[str, Any]:
    """Return the state of the global generators of Python, NumPy and torch, and of the current CUDA device."""
    legacy: Any = np.random.get_state(legacy=True)  # noqa: NPY002 # loaders and transforms draw from it
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


def check_rng_state(state: Any, path: str) -> None:
    """Refuse a state that :func:`set_rng_state` could not take, before any generator has changed.

    Raises:
        SchemaError: If it is not a state of these generators.
    """
    _STATE(state, path)
    version, internal, gauss = state["python"]
    kind, keys, *rest = state["numpy"]
    try:
        random.Random().setstate((version, tuple(internal), gauss))
        np.random.RandomState().set_state((kind, keys.numpy().astype(np.uint32), *rest))
        torch.Generator().set_state(state["torch"])
    except (RuntimeError, TypeError, ValueError, OverflowError) as error:
        raise SchemaError(f"Expected states of random generators at {path.lstrip('.')!r} but {error}.") from error


_WORD = 2**32 - 1
_STATE = record(
    {
        "python": row(one_of(3), listed(integer(0, _WORD), 625), optional(number())),
        "numpy": row(
            one_of("MT19937"),
            Entry((torch.int64,), ((624,),), 0, _WORD),
            integer(0, 624),
            integer(0, 1),
            number(),
        ),
        "torch": Entry((torch.uint8,), ((None,),)),
    },
    {"cuda": Entry((torch.uint8,), ((None,),))},
)


@contextmanager
def same_rng() -> Iterator[None]:
    """Restore the present state of the generators of all devices after the block.

    Written by hand, because Lightning's ``isolate_rng`` does not restore them after an exception.
    """
    state = rng_state()
    with undoing() as undo:
        undo.add(set_rng_state, state)
        if "cuda" in state:
            undo.add(torch.cuda.set_rng_state_all, torch.cuda.get_rng_state_all())
        yield


def seed_rng(seed: int) -> None:
    """Seed the generators; unlike Lightning's ``seed_everything``, print nothing and set no environment variable."""
    seed %= 2**32  # NumPy takes no more
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    torch.manual_seed(seed)
