"""Functions that an option finds by name, users' own among them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Generic, NamedTuple, TypeVar

D = TypeVar("D")
F = TypeVar("F", bound=Callable[..., Any])


class _Registered(NamedTuple, Generic[F, D]):
    function: F
    declared: D


class Registry(Generic[F, D]):
    """Functions by the names that an option accepts, in the order of registration.

    Args:
        option: Name of the option.
        noun: What a function is, as "solver".
        takes: Names of the arguments that it is called with, by position.
    """

    def __init__(self, option: str, noun: str, takes: tuple[str, ...]) -> None:
        self._option, self._noun, self._takes = option, noun, takes
        self._known: dict[str, _Registered[F, D]] = {}

    @property
    def names(self) -> list[str]:
        """All names, in the order of registration."""
        return list(self._known)

    def check_name(self, name: object) -> None:
        """Refuse what cannot be a name.

        Raises:
            TypeError: If it is no text, as when the decorator is used without its name.
        """
        if not isinstance(name, str) or not name:
            raise TypeError(
                f"Expected the name of the {self._noun} but got {name!r:.200}. HINT: @register_{self._noun}('mine')."
            )

    def add(self, name: str, function: F, declared: D) -> None:
        """Make a function available under a name.

        The same function, defined again under its own module and name, replaces itself: a cell of a notebook may run
        twice.

        Args:
            name: The value of the option.
            function: The function.
            declared: What is known about it.

        Raises:
            TypeError: If the function cannot be called with the arguments that it will get.
            ValueError: If the name is another function's.
        """
        self._check_signature(name, function)
        known = self._known.get(name)
        if known is not None and _home(known.function) != _home(function):
            raise ValueError(
                f"Expected a new name of a {self._noun} but {name!r} is registered already, for "
                f"{'.'.join(_home(known.function))}. Take another name."
            )
        self._known[name] = _Registered(function, declared)

    def function(self, name: str) -> F:
        """Return a function by name.

        Raises:
            ValueError: If there is no such function; the message lists the names.
        """
        return self._get(name).function

    def declared(self, name: str) -> D:
        """Return what is known about a function.

        Raises:
            ValueError: If there is no such function; the message lists the names.
        """
        return self._get(name).declared

    def _get(self, name: str) -> _Registered[F, D]:
        if name not in self._known:
            raise ValueError(f"Expected `{self._option}` to be one of {', '.join(self.names)} but got {name!r}.")
        return self._known[name]

    def _check_signature(self, name: str, function: F) -> None:
        expected = f"Expected the {self._noun} {name!r} to be a function of ({', '.join(self._takes)})"
        if not callable(function):
            raise TypeError(f"{expected} but got {function!r:.200}.")
        try:
            signature = inspect.signature(function)
        except ValueError:  # a function in C may have none
            return
        try:
            signature.bind(*self._takes)
        except TypeError as error:
            raise TypeError(f"{expected} but it takes {signature}: {error}.") from error


def _home(function: Any) -> tuple[str, str]:
    """Return the module and the name of a function; no two lambdas have the same name."""
    name = getattr(function, "__qualname__", "<lambda>")
    named = name.rpartition(".")[2] != "<lambda>"
    return str(getattr(function, "__module__", "")), name if named else f"{name} at {id(function):#x}"
