"""The format of a calibration in checkpoints, and checks of a calibration that was read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fasc_lightning._utils import (
    SchemaError,
    anything,
    boolean,
    check_sum,
    checksum,
    integer,
    listed,
    mapping,
    optional,
    record,
    row,
    text,
)
from fasc_lightning.batches import LOOPS_BEFORE
from fasc_lightning.calibration._saved_state import CALIBRATION_HEADER

#: Version of the format. Format 1 has no checksums and is also read; other formats are not.
FORMAT = 2

#: Entries outside of the checksum: the plugin that writes the file adds some, and the others have their own checksums.
_UNSUMMED = ("checksum", "origin", "origin_checksum", "tensors", "obstacle", "run", "token")

_STATE = record(
    {
        "format": integer(1, FORMAT),
        "end": row(optional(integer()), integer(), optional(integer(0))),
        "setting": mapping(anything),  # compared with the fit's own setting
        "origin": anything,  # has its own schema
        "schedule": record({"stopping": boolean, "min_steps": optional(integer(0))}, {"extended": boolean}),
        "left": boolean,
        "obstacle": text,
        "accumulated": boolean,
        "tensors": mapping(anything),
    },
    {
        "positions": listed(anything),
        "header": CALIBRATION_HEADER,
        "run": text,
        "token": text,
        "checksum": text,
        "checksums": mapping(text),
        "origin_checksum": text,
    },
)

#: Schema of the positions in a checkpoint before the calibration.
PLACES = record({"format": integer(1, FORMAT), "positions": listed(anything)})


def state_checksum(state: Mapping[str, Any]) -> str:
    """Return the checksum of a calibration to write, or of one that was read."""
    return checksum({key: value for key, value in state.items() if key not in _UNSUMMED})


def damage_of(state: Mapping[str, Any]) -> str:
    """Return the damage of a calibration that was read; "" if there is none. Its tensors are checked later."""
    found = state.get("format")
    if type(found) is not int or not 1 <= found <= FORMAT:
        return f"its format is {found!r:.40}, of which this version knows nothing"
    try:
        _STATE(state, "")
        if found > 1:
            record(dict.fromkeys(("checksum", "checksums", "origin_checksum"), anything), extra=True)(state, "")
    except SchemaError as error:
        return f"the checkpoint is damaged or was edited. {error}"
    return ""


def alteration_of(state: Mapping[str, Any]) -> str:
    """Return the alteration that the checksum of a calibration shows; "" if it shows none, or without a checksum."""
    try:
        if "checksum" in state:
            check_sum(state_checksum(state), state["checksum"], "a calibration")
    except SchemaError as error:
        return f"the checkpoint is damaged or was edited. {error}"
    return ""


def damage_of_origin(state: Mapping[str, Any]) -> str:
    """Return the damage of the record of a calibration's start; "" if the calibration can start again from there."""
    try:
        LOOPS_BEFORE(state.get("origin"), "origin")
        if "origin_checksum" in state:
            check_sum(checksum(state["origin"]), state["origin_checksum"], "'origin'")
    except SchemaError as error:
        return str(error)
    return ""


def change_of(name: str, was: Any, now: Any) -> str:
    """Return the change of a setting in words.

    Args:
        name: Name of the entry.
        was: Its value in a checkpoint.
        now: Its value in the fit.
    """
    if isinstance(was, dict) and isinstance(now, dict):  # by layer, so there may be hundreds
        key = next(key for key in [*was, *now] if was.get(key) != now.get(key))
        name, was, now = f"{name}: {key!r}", was.get(key, "not there"), now.get(key, "not there")
    return f"{name} was {was} and is {now} now"
