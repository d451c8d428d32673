"""Type, default and description of each option, for command lines and tables."""

from __future__ import annotations

import re
from dataclasses import fields
from typing import Any, NamedTuple, get_type_hints

from fasc_lightning.options._compression import FLAT, GROUPS, CompressionOptions
from fasc_lightning.options._groups import SHORTHANDS

#: References and code in docstrings; only their text is kept.
_MARKUP = re.compile(r":\w+:`~?(?:\w+\.)*(\w+)`|``(.*?)``")


class Option(NamedTuple):
    """Type, default and description (one paragraph of plain text) of an option."""

    type: Any
    default: Any
    help: str


def described(name: str) -> Option:
    """Return the type, default and description of an option.

    Args:
        name: Name of an option, or flat name of an option in a group. The name of a group with a short form (a gate)
            gives the option that the short form sets.
    """
    cls, option = CompressionOptions, name
    if name in FLAT:
        cls, option = GROUPS[FLAT[name].group], FLAT[name].option
    elif (short := SHORTHANDS.get(GROUPS.get(name, cls))) is not None:
        cls, option = GROUPS[name], short[0]
    default = next(field.default for field in fields(cls) if field.name == option)
    return Option(get_type_hints(cls)[option], default, descriptions(cls)[option])


def descriptions(cls: type) -> dict[str, str]:
    """Return the descriptions of the options in the docstring of a class, each in one paragraph of plain text."""
    section = (cls.__doc__ or "").partition("Args:\n")[2].partition("\n\n")[0]
    found = re.findall(r"^ {8}(\w+): (.*(?:\n {12}.*)*)", section, re.MULTILINE)
    return {name: _MARKUP.sub(r"\1\2", " ".join(text.split())) for name, text in found}
