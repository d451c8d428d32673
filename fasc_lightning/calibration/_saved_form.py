"""What checkpoints keep of a calibration: the form that it must have, and what is wrong with one that was read."""

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

#: Of what a checkpoint keeps. Those of format 1 have no checksums, and are used, too; of others nothing is.
FORMAT = 2

#: What the checksum leaves out: the plugin that writes the file adds some of it, and the rest has checksums of its own.
_UNSUMMED = ("checksum", "origin", "origin_checksum", "tensors", "obstacle", "run", "token")

_STATE = record(
    {
        "format": integer(1, FORMAT),
        "end": row(optional(integer()), integer(), optional(integer(0))),
        "setting": mapping(anything),  # compared with the fit's own
        "origin": anything,  # of a schema of its own
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

#: Of what a checkpoint of before the calibration keeps.
PLACES = record({"format": integer(1, FORMAT), "positions": listed(anything)})


def state_checksum(state: Mapping[str, Any]) -> str:
    """Return the checksum of a calibration that is about to be written, or was read."""
    return checksum({key: value for key, value in state.items() if key not in _UNSUMMED})


def damage_of(state: Mapping[str, Any]) -> str:
    """Return what is wrong with a calibration that was read; "" if nothing is. Its tensors are looked at later."""
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
    """Return how the checksum of a calibration tells that it was altered; "" if it does not, or there is none."""
    try:
        if "checksum" in state:
            check_sum(state_checksum(state), state["checksum"], "a calibration")
    except SchemaError as error:
        return f"the checkpoint is damaged or was edited. {error}"
    return ""


def damage_of_origin(state: Mapping[str, Any]) -> str:
    """Return what is wrong with where a calibration began; "" if it can start again from there."""
    try:
        LOOPS_BEFORE(state.get("origin"), "origin")
        if "origin_checksum" in state:
            check_sum(checksum(state["origin"]), state["origin_checksum"], "'origin'")
    except SchemaError as error:
        return str(error)
    return ""


def change_of(name: str, was: Any, now: Any) -> str:
    """Return what of a setting has changed, in words.

    Args:
        name: Of the entry.
        was: Its value in a checkpoint.
        now: Its value in the fit.
    """
    if isinstance(was, dict) and isinstance(now, dict):  # of layers, of which there may be hundreds
        key = next(key for key in [*was, *now] if was.get(key) != now.get(key))
        name, was, now = f"{name}: {key!r}", was.get(key, "not there"), now.get(key, "not there")
    return f"{name} was {was} and is {now} now"
