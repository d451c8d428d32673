"""The registry of allocations by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from fasc_lightning._utils import Registry

#: Chooses one way to store each layer, by index, within a budget: ``allocate(options, budget)``. The options are the
#: ``StorageOptions`` of ``fasc_lightning.compression``.
AllocationFunction: TypeAlias = Callable[[Sequence[Any], int], Sequence[int]]

_ALLOCATIONS: Registry[AllocationFunction, bool] = Registry("allocation", "allocation", ("options", "budget"))


def register_allocation(name: str, *, measures: bool = True) -> Callable[[AllocationFunction], AllocationFunction]:
    """Return a decorator that makes an allocation available as ``allocation=name``, in this process.

    An allocation takes the ways to store each layer (a sequence of
    :class:`~fasc_lightning.compression.StorageOptions`, one for each layer) and the budget, an int in the unit of the
    options' costs: parameters for ``rank`` and ``keep``, bytes for ``size``. It returns the index of one option for
    each layer; their costs together must not exceed the budget.
    :func:`~fasc_lightning.compression.spend` is the allocation of "fisher". The same function may be registered again,
    as when a cell of a notebook runs twice.

    Args:
        name: The allocation.
        measures: Whether the losses are corrected on an eighth of the calibration batches, as for "measured". The
            allocation then runs twice: on predicted losses, and on corrected ones.

    Raises:
        TypeError: If the function does not take (options, budget).
        ValueError: If the name is another allocation's.
    """
    _ALLOCATIONS.check_name(name)

    def register(allocate: AllocationFunction) -> AllocationFunction:
        _ALLOCATIONS.add(name, allocate, measures)
        return allocate

    return register


def get_allocation(name: str) -> AllocationFunction:
    """Return an allocation by name.

    Raises:
        ValueError: If there is no such allocation.
    """
    return _ALLOCATIONS.function(name)


def measures_losses(name: str) -> bool:
    """Return whether an allocation wants losses that are corrected on batches.

    Raises:
        ValueError: If there is no such allocation.
    """
    return _ALLOCATIONS.declared(name)


def available_allocations() -> list[str]:
    """Return the names of all allocations."""
    return _ALLOCATIONS.names
