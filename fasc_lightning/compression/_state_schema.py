"""Schemas of the states of the callback and of a recovery, which FascCallback writes into checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fasc_lightning._utils import (
    Entry,
    anything,
    check,
    check_sum,
    checksum,
    integer,
    listed,
    mapping,
    naming,
    number,
    one_of,
    optional,
    record,
    row,
    text,
)
from fasc_lightning.compression._report_schema import REPORT

_COUNT = integer(0)

_CHECKSUM = "checksum"

_CALLBACK = record({"rho_history": mapping(anything)}, {"report": REPORT, "teacher": text, _CHECKSUM: text}, extra=True)

_VALUES = mapping(Entry(finite=False))

_RECOVERY = record(
    {
        "arm": one_of("lora", "factors"),
        "initial": mapping(Entry()),
        "current": _VALUES,  # which may have diverged
        "best": record(
            {"losses": listed(row(_COUNT, number(finite=False))), "step": _COUNT, "values": mapping(Entry())}
        ),
        "start": _COUNT,
        "tokens": _COUNT,
        "seconds": number(0),
        "teacher": optional(text),
    },
    {_CHECKSUM: text},
)


def sealed(state: dict[str, Any]) -> dict[str, Any]:
    """Return a state with its checksum."""
    return {**state, _CHECKSUM: checksum(state)}


def check_callback_state(state: Any, where: str = "The state of FascCallback in the checkpoint") -> None:
    """Refuse an invalid or altered state of the callback; the states of a running fit are not checked here.

    Raises:
        SchemaError: If an entry is invalid; the message names it.
    """
    check(state, _CALLBACK, where)
    _check_sum({key: state[key] for key in ("rho_history", "report", "teacher") if key in state}, state, where)


def check_recovery_state(state: Any, where: str = "The state of the recovery in the checkpoint") -> None:
    """Refuse an invalid or altered state of a recovery.

    Raises:
        SchemaError: If an entry is invalid; the message names it.
    """
    check(state, _RECOVERY, where)
    with naming(where):
        steps = [step for step, _ in state["best"]["losses"]]
        one_of(*steps)(state["best"]["step"], "best.step")
    _check_sum({key: value for key, value in state.items() if key != _CHECKSUM}, state, where)


def _check_sum(summed: Mapping[str, Any], state: Mapping[str, Any], where: str) -> None:
    if _CHECKSUM in state:
        with naming(where):
            check_sum(checksum(summed), state[_CHECKSUM], "a state")
