"""Options of a wrong type are refused where they are given, by their names: one table for all functions and classes.

What a value has to be beside that (a range, one of several words) is for those that take it to say. NumPy's and
torch's scalars count as the numbers that they hold.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import fields
from functools import wraps
from os import PathLike
from typing import Any, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")

#: Takes an option's name and value, raises TypeError or ValueError, and returns the value to go on with.
Check = Callable[[str, Any], Any]

#: The largest seed of torch's generators.
LARGEST_SEED = 2**63 - 1


def plain(value: Any) -> Any:
    """Return the Python number or bool in a scalar of NumPy or torch; anything else as it is."""
    return value.item() if getattr(value, "ndim", None) == 0 and hasattr(value, "item") else value


def _fail(name: str, expected: str, value: Any) -> TypeError:
    return TypeError(f"Expected `{name}` to be {expected} but got {value!r:.200}.")


def number(name: str, value: Any, expected: str = "a number") -> Any:
    """Let numbers pass."""
    value = plain(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _fail(name, expected, value)
    return value


def share(name: str, value: Any) -> Any:
    """Let numbers pass that are to be from 0 to 1."""
    return number(name, value, "a number in [0, 1]")


def whole(name: str, value: Any) -> Any:
    """Let everything pass: those who take a count refuse what is not an int with the least that it may be."""
    del name
    return plain(value)


def width(name: str, value: Any) -> Any:
    """Let ints of at least 0 pass."""
    value = plain(value)
    if type(value) is not int or value < 0:
        raise ValueError(f"Expected `{name}` to be a width of at least 0 but got {value!r:.200}.")
    return value


def seed(name: str, value: Any) -> Any:
    """Let seeds of torch's generators pass."""
    value = plain(value)
    if type(value) is not int:
        raise _fail(name, "an int", value)
    if not 0 <= value <= LARGEST_SEED:
        raise ValueError(f"Expected `{name}` to be an int of at least 0 and below 2^63 but got {value}.")
    return value


def flag(name: str, value: Any) -> Any:
    """Let True and False pass."""
    value = plain(value)
    if not isinstance(value, bool):
        raise _fail(name, "True or False", value)
    return value


def text(name: str, value: Any) -> Any:
    """Let strings pass."""
    if not isinstance(value, str):
        raise _fail(name, "a string", value)
    return value


def path(name: str, value: Any) -> Any:
    """Let paths pass."""
    if not isinstance(value, str | PathLike):
        raise _fail(name, "a path", value)
    return value


def patterns(name: str, value: Any) -> Any:
    """Let a regular expression or several names pass."""
    listed = isinstance(value, list | tuple | set | frozenset) and all(isinstance(part, str) for part in value)
    if not (isinstance(value, str) or listed):
        raise TypeError(f"Expected `{name}` to be a regular expression or a list of names; got {value!r:.200}.")
    if isinstance(value, str):
        try:
            re.compile(value)
        except re.error as error:
            raise ValueError(
                f"Expected `{name}` to be a regular expression or a list of names but {value!r:.200} is none: {error}. "
                "HINT: a list, as ['q_proj'], holds names or their last parts."
            ) from error
    return value


def averaging(name: str, value: Any) -> Any:
    """Let what says how a loss averages pass."""
    if not (callable(value) or (isinstance(value, str) and value in ("mean", "sum"))):
        raise ValueError(f"Expected `{name}` to be 'mean', 'sum' or a callable but got {value!r:.200}.")
    return value


def function(name: str, value: Any) -> Any:
    """Let callables pass."""
    if not callable(value):
        raise _fail(name, "a callable on the batch", value)
    return value


def switch(name: str, value: Any) -> Any:
    """Let True, False and words pass."""
    value = plain(value)
    if not isinstance(value, bool | str):
        raise ValueError(f"Expected `{name}` to be True, False or 'auto' but got {value!r:.200}.")
    return value


def device(name: str, value: Any) -> Any:
    """Let devices of torch pass, and their names."""
    try:
        torch.device(value)
    except (TypeError, RuntimeError) as error:
        raise ValueError(f"Expected `{name}` to be a device of torch but got {value!r:.200}. ({error})") from error
    return value


def size(name: str, value: Any) -> Any:
    """Let numbers of bytes and their short forms pass."""
    value = plain(value)
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise _fail(name, "bytes, as a number or as '24GB',", value)
    return value


def own(name: str, value: Any) -> Any:
    """Let everything pass: those who take it check it by themselves."""
    del name
    return value


#: Of every option: what it has to be. None passes as well where it is the default.
CHECKS: dict[str, Check] = {
    # The budget and how it is spent.
    "rank": number,
    "keep": number,
    "method": text,
    "allocation": text,
    "layout": text,
    "align": whole,
    "refit": switch,
    "targets": patterns,
    "exclude": patterns,
    # The calibration and the memory of moments.
    "steps": whole,
    "update_weights": flag,
    "token_fraction": number,
    "seed": seed,
    "loss_terms": averaging,
    "token_mask": function,
    "passes": whole,
    "sketch": text,
    "sketch_size": whole,
    "sketch_above": width,
    # rho and the gate.
    "every_n_steps": whole,
    "tokens": whole,
    "threshold": share,
    "observations": whole,
    "gradient": text,
    "by": text,
    # int8.
    "quantize": own,
    "quantization": own,
    # Recovery, the teacher, refinement.
    "recovery": own,
    "r": whole,
    "alpha": number,
    "dropout": number,
    "config": own,
    "norms": flag,
    "teacher": own,
    "refine_steps": whole,
    "learning_rate": number,
    "epochs": whole,
    "precision": own,
    "validate_every": whole,
    "patience": whole,
    "temperature": number,
    "weight": number,
    "blocks": number,
    "cache": path,
    "top_k": whole,
    "lr": number,
    "target": text,
    "holdout": whole,
    # What a call does beside.
    "progress": flag,
    "dry_run": flag,
    "device": device,
    "dtype": own,
    "memory": size,
    "host_memory": size,
    "keeps_moments": flag,
    "batch_tokens": whole,
    "probed": own,
    "key": text,
}

#: Options that None turns off, whatever their default is.
_OPTIONAL = {"sketch"}


def checked(name: str, value: Any, default: Any) -> Any:
    """Return an option's value to go on with.

    Raises:
        TypeError: If it is of a wrong type.
        ValueError: If it is not valid.
    """
    if value is default or (value is None and name in _OPTIONAL):
        return value
    return CHECKS[name](name, value)


def checks_options(function: Callable[P, R]) -> Callable[P, R]:
    """Check those arguments of a function that are options, before it is called."""
    signature = inspect.signature(function)

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError:
            return function(*args, **kwargs)  # which raises the same with its own name
        for name, value in bound.arguments.items():
            if name in CHECKS:
                bound.arguments[name] = checked(name, value, signature.parameters[name].default)
        return function(*bound.args, **bound.kwargs)

    return call


def check_fields(options: Any, **checks: Check) -> None:
    """Check the fields of a dataclass, in its ``__post_init__``.

    Args:
        options: The dataclass.
        **checks: Checks of fields whose names mean something else in the table.
    """
    for field in fields(options):
        name, value = field.name, getattr(options, field.name)
        value = checks[name](name, value) if name in checks else checked(name, value, field.default)
        object.__setattr__(options, name, value)


def check_word(name: str, value: object, known: tuple[str, ...], beside: str = "") -> None:
    """Refuse what is none of several words.

    Args:
        name: Of the option.
        value: Its value.
        known: The words.
        beside: What else it may be, as text.

    Raises:
        ValueError: With the words.
    """
    if value not in known:
        raise ValueError(f"Expected `{name}` to be one of {', '.join(known)}{beside} but got {value!r}.")
