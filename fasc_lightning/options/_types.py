"""Type checks of options by name: one table for all functions and classes, applied to their arguments.

The functions and classes themselves check ranges and words. Scalars of NumPy and torch count as the numbers that they
hold.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable
from dataclasses import fields
from functools import wraps
from os import PathLike
from typing import Any, ParamSpec, TypeVar

import torch

from fasc_lightning._utils import did_you_mean

P = ParamSpec("P")
R = TypeVar("R")

#: Takes an option's name and value, and returns the value to use, or raises TypeError or ValueError.
Check = Callable[[str, Any], Any]

#: The largest seed of torch's generators.
LARGEST_SEED = 2**63 - 1


def plain(value: Any) -> Any:
    """Return the Python number or bool in a scalar of NumPy or torch; return anything else unchanged."""
    return value.item() if getattr(value, "ndim", None) == 0 and hasattr(value, "item") else value


def _fail(name: str, expected: str, value: Any) -> TypeError:
    return TypeError(f"Expected `{name}` to be {expected} but got {value!r:.200}.")


def number(name: str, value: Any, expected: str = "a number") -> Any:
    """Accept numbers."""
    value = plain(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _fail(name, expected, value)
    return value


def share(name: str, value: Any) -> Any:
    """Accept numbers; the error states the range [0, 1], which the caller checks."""
    return number(name, value, "a number in [0, 1]")


def whole(name: str, value: Any) -> Any:
    """Accept everything: the owner of the count checks that it is an int, and its minimum, in one error."""
    del name
    return plain(value)


def width(name: str, value: Any) -> Any:
    """Accept ints of at least 0."""
    value = plain(value)
    if type(value) is not int or value < 0:
        raise ValueError(f"Expected `{name}` to be a width of at least 0 but got {value!r:.200}.")
    return value


def seed(name: str, value: Any) -> Any:
    """Accept seeds of torch's generators."""
    value = plain(value)
    if type(value) is not int:
        raise _fail(name, "an int", value)
    if not 0 <= value <= LARGEST_SEED:
        raise ValueError(f"Expected `{name}` to be an int of at least 0 and below 2^63 but got {value}.")
    return value


def flag(name: str, value: Any) -> Any:
    """Accept True and False."""
    value = plain(value)
    if not isinstance(value, bool):
        raise _fail(name, "True or False", value)
    return value


def text(name: str, value: Any) -> Any:
    """Accept strings."""
    if not isinstance(value, str):
        raise _fail(name, "a string", value)
    return value


def path(name: str, value: Any) -> Any:
    """Accept paths."""
    if not isinstance(value, str | PathLike):
        raise _fail(name, "a path", value)
    return value


def patterns(name: str, value: Any) -> Any:
    """Accept a regular expression or several names."""
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
    """Accept "mean", "sum" and callables, which state how a loss averages."""
    if not (callable(value) or (isinstance(value, str) and value in ("mean", "sum"))):
        raise ValueError(f"Expected `{name}` to be 'mean', 'sum' or a callable but got {value!r:.200}.")
    return value


def function(name: str, value: Any) -> Any:
    """Accept callables."""
    if not callable(value):
        raise _fail(name, "a callable on the batch", value)
    return value


def switch(name: str, value: Any) -> Any:
    """Accept True, False and words."""
    value = plain(value)
    if not isinstance(value, bool | str):
        raise ValueError(f"Expected `{name}` to be True, False or 'auto' but got {value!r:.200}.")
    return value


def device(name: str, value: Any) -> Any:
    """Accept devices of torch and their names."""
    try:
        torch.device(value)
    except (TypeError, RuntimeError) as error:
        raise ValueError(f"Expected `{name}` to be a device of torch but got {value!r:.200}. ({error})") from error
    return value


def size(name: str, value: Any) -> Any:
    """Accept numbers of bytes and their short forms."""
    value = plain(value)
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise _fail(name, "bytes, as a number or as '24GB',", value)
    return value


def own(name: str, value: Any) -> Any:
    """Accept everything: the owner of the option checks it."""
    del name
    return plain(value)


#: Check of every option. None is also accepted where it is the default.
CHECKS: dict[str, Check] = {
    # The budget and how it is spent.
    "rank": number,
    "keep": number,
    "size": own,
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
    "stages": whole,
    "sketch": text,
    "sketch_size": whole,
    "sketch_above": width,
    # rho and the gate.
    "every_n_steps": whole,
    "tokens": whole,
    "threshold": share,
    "observations": whole,
    "gradient": text,
    "log_layers": flag,
    "by": text,
    # Rounding.
    "bits": whole,
    "group": whole,
    "symmetric": flag,
    "rounding": text,
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
    # Other arguments of calls.
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

#: Options that None turns off, whatever their default.
_OPTIONAL = {"sketch"}


def checked(name: str, value: Any, default: Any) -> Any:
    """Return the value to use for an option.

    Raises:
        TypeError: If the value is of a wrong type.
        ValueError: If the value is not valid.
    """
    if value is default or (value is None and name in _OPTIONAL):
        return value
    return CHECKS[name](name, value)


def check_keywords(caller: Callable[..., Any], given: Iterable[str], known: Iterable[str]) -> None:
    """Refuse unknown keywords in the name of the function or class that was called.

    Args:
        caller: The function or class.
        given: Names of the given keywords.
        known: Names of all keywords.

    Raises:
        TypeError: If a keyword is unknown; the message names the nearest one.
    """
    known = set(known) - {"self"}
    for name in given:
        if name not in known:
            owner = caller.__qualname__.removesuffix(".__init__")
            raise TypeError(
                f"{owner}() got an unexpected keyword argument {name!r}.{did_you_mean(name, sorted(known))}"
            )


def checks_options(function: Callable[P, R]) -> Callable[P, R]:
    """Check the arguments of a function that are options, before each call."""
    signature = inspect.signature(function)

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError:
            if all(parameter.kind is not parameter.VAR_KEYWORD for parameter in signature.parameters.values()):
                check_keywords(function, kwargs, signature.parameters)
            return function(*args, **kwargs)  # raises the same error with the function's own name
        for name, value in bound.arguments.items():
            if name in CHECKS:
                bound.arguments[name] = checked(name, value, signature.parameters[name].default)
        return function(*bound.args, **bound.kwargs)

    return call


def check_fields(options: Any, **checks: Check) -> None:
    """Check the fields of a dataclass, in its ``__post_init__``.

    Args:
        options: The dataclass.
        **checks: Checks of fields whose names mean other options in the table.
    """
    for field in fields(options):
        name, value = field.name, getattr(options, field.name)
        value = checks[name](name, value) if name in checks else checked(name, value, field.default)
        object.__setattr__(options, name, value)


def check_word(name: str, value: object, known: tuple[str, ...], beside: str = "") -> None:
    """Refuse a value that is not one of several words.

    Args:
        name: Name of the option.
        value: Its value.
        known: The allowed words.
        beside: Other allowed values, as text.

    Raises:
        ValueError: If the value is none of the words; the message lists them.
    """
    if value not in known:
        raise ValueError(f"Expected `{name}` to be one of {', '.join(known)}{beside} but got {value!r}.")
