"""The history of rho in training: a table of observations, with its files and its state in checkpoints."""

from __future__ import annotations

import csv
import operator
from array import array
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, TypedDict, cast, overload

import numpy as np
import torch
from numpy.typing import NDArray

from fasc_lightning._utils import Entry, SchemaError, check, listed, naming, record, require, text, whole_file


class RhoRow(TypedDict):
    """One layer at one step.

    Attributes:
        step: Optimizer steps done before the observation.
        layer: Name of the module.
        rho: Plain score in [0, 1]; NaN where it is undefined.
        null: The value that rho exceeds by chance in at most 5 of 100 cases, by permutations of whole sequences. NaN
            for fewer than four sequences.
        debiased: Signed root of the debiased rho^2; may be negative. NaN for fewer than four sequences.
        low: Lower end of the 95 % interval of ``debiased``, by the jackknife over sequences. NaN for fewer than eight.
        high: Upper end of the interval.
        iid_floor: About the rho of as many independent tokens.
        tokens: Number of tokens observed.
        reason: Why rho, or only its null, its debiased value or its interval, is undefined; "" where all are defined.
    """

    step: int
    layer: str
    rho: float
    null: float
    debiased: float
    low: float
    high: float
    iid_floor: float
    tokens: int
    reason: str


COLUMNS: Final = tuple(RhoRow.__annotations__)
_INTEGERS: Final = ("step", "tokens")
_TEXTS: Final = ("layer", "reason")
#: The columns of numbers, which can be drawn and put into a matrix.
NUMBERS: Final = tuple(name for name in COLUMNS if name not in _TEXTS)


class _TextColumn:
    """A column of repeated texts. Each text is kept once, in order of first appearance; rows hold its number."""

    def __init__(self, vocabulary: Iterable[str] = (), codes: Iterable[int] = ()) -> None:
        self.vocabulary = {text: code for code, text in enumerate(vocabulary)}
        self._texts = list(self.vocabulary)
        self.codes = array("i", codes)

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, position: int) -> str:
        return self._texts[self.codes[position]]

    def __setitem__(self, position: int, text: str) -> None:
        self.codes[position] = self._code(text)

    def append(self, text: str) -> None:
        self.codes.append(self._code(text))

    def _code(self, text: str) -> int:
        if text not in self.vocabulary:
            self.vocabulary[text] = len(self._texts)
            self._texts.append(text)
        return self.vocabulary[text]

    def to_numpy(self) -> NDArray[np.str_]:
        return np.array(self._texts, dtype=np.str_)[np.array(self.codes)]


def _number_column(name: str, values: Iterable[Any] = ()) -> array[Any]:
    return array("q" if name in _INTEGERS else "d", values)


class RhoHistory(Sequence[RhoRow]):
    """Tidy table of observations of rho: one row for each layer and step, in the order of observation.

    ``pandas.DataFrame(history)`` works, and so does any loop over rows. The table keeps columns of numbers, about a
    third of the memory of as many dictionaries; rows are made on access and are copies.

    Args:
        rows: First observations.
    """

    def __init__(self, rows: Iterable[RhoRow] = ()) -> None:
        self._numbers = {name: _number_column(name) for name in NUMBERS}
        self._texts = {name: _TextColumn() for name in _TEXTS}
        # The row number by step and layer.
        self._positions: dict[int, dict[str, int]] = {}
        self.extend(rows)

    def __len__(self) -> int:
        return len(self._numbers["step"])

    @overload
    def __getitem__(self, index: int) -> RhoRow: ...
    @overload
    def __getitem__(self, index: slice) -> list[RhoRow]: ...
    def __getitem__(self, index: int | slice) -> RhoRow | list[RhoRow]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"Expected an index of one of {len(self)} observations but got {index}.")
        columns: Mapping[str, Any] = {**self._numbers, **self._texts}
        return cast(RhoRow, {name: columns[name][index] for name in COLUMNS})

    def __repr__(self) -> str:
        return f"RhoHistory({len(self.layers)} layers, {len(self.steps)} steps, {len(self)} observations)"

    @property
    def layers(self) -> list[str]:
        """Names of the layers in order of first observation, which is the model's order."""
        return list(self._texts["layer"].vocabulary)

    @property
    def steps(self) -> list[int]:
        """The observed steps, ascending."""
        return sorted(self._positions)

    def append(self, row: RhoRow) -> None:
        """Add an observation. It replaces one of the same step and layer, since a resumed run observes steps again.

        Raises:
            ValueError: If a column is missing or unknown, or a value has another type than its column.
        """
        checked = _checked(row)
        step, layer = checked["step"], checked["layer"]
        position = self._positions.get(step, {}).get(layer)
        columns: Mapping[str, Any] = {**self._numbers, **self._texts}
        for name, value in checked.items():
            if position is None:
                columns[name].append(value)
            else:
                columns[name][position] = value
        if position is None:
            self._positions.setdefault(step, {})[layer] = len(self) - 1

    def extend(self, rows: Iterable[RhoRow]) -> None:
        """Add observations, as :meth:`append` does."""
        for row in rows:
            self.append(row)

    def column(self, name: str) -> NDArray[Any]:
        """Return one column as a new array, shape (observations,)."""
        if name in self._texts:
            return self._texts[name].to_numpy()
        _check_number_column(name, COLUMNS)
        return np.array(self._numbers[name])

    def matrix(self, name: str) -> NDArray[np.float64]:
        """Return a column of numbers as a matrix of shape (layers, steps); NaN where a layer was not observed."""
        _check_number_column(name, NUMBERS)
        steps = np.array(self.steps, dtype=np.int64)
        result = np.full((len(self.layers), len(steps)), np.nan)
        places = np.array(self._texts["layer"].codes), np.searchsorted(steps, self.column("step"))
        result[places] = self.column(name)
        return result

    def at(self, step: int | None = None) -> dict[str, RhoRow]:
        """Return the rows of one step by layer, in the order of :attr:`layers`.

        Args:
            step: An observed step. None takes the last one; an empty history then gives no rows.

        Raises:
            ValueError: If nothing was observed at that step.
        """
        if step is None:
            step = max(self._positions, default=None)
            if step is None:
                return {}
        if step not in self._positions:
            raise ValueError(f"Expected a step that was observed but got {step}. Observed: {_abridged(self.steps)}.")
        positions = self._positions[step]
        return {layer: self[positions[layer]] for layer in self.layers if layer in positions}

    def only(self, layers: Collection[str]) -> RhoHistory:
        """Return the history of some layers; this history itself if it has no others."""
        if all(layer in layers for layer in self.layers):
            return self
        return RhoHistory(row for row in self if row["layer"] in layers)

    def to_csv(self, path: str | Path) -> None:
        """Write the table as CSV, whole or not at all. Reading the file gives exactly the same numbers."""
        with whole_file(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            # The csv module writes floats by repr as well; this line makes it a promise.
            writer.writerows({k: repr(v) if isinstance(v, float) else v for k, v in row.items()} for row in self)

    @classmethod
    def from_csv(cls, path: str | Path) -> RhoHistory:
        """Read a file that :meth:`to_csv` wrote.

        Raises:
            ValueError: If the file is no such table, or a value does not fit its column.
        """
        history = cls()
        with Path(path).open(newline="", encoding="utf-8") as file, _as_table(path):
            reader = csv.DictReader(file)
            if tuple(reader.fieldnames or ()) != COLUMNS:
                raise ValueError(f"Expected the columns {', '.join(COLUMNS)} in {path} but got {reader.fieldnames}.")
            for texts in reader:
                try:
                    if None in texts or None in texts.values():  # DictReader's marks of too many and too few
                        raise ValueError(f"expected {len(COLUMNS)} cells")
                    history.append(cast(RhoRow, {name: _TYPES[name](texts[name]) for name in COLUMNS}))
                except (TypeError, ValueError) as error:
                    raise ValueError(f"Line {reader.line_num} of {path} is not an observation: {error}") from error
        return history

    def to_parquet(self, path: str | Path) -> None:
        """Write the table as Parquet, whole or not at all; undefined values are NaN, not null.

        Raises:
            ModuleNotFoundError: If pyarrow is not installed.
        """
        require("Parquet needs", "table", "pyarrow", instead="or write to_csv()")
        import pyarrow as pa
        import pyarrow.parquet as pq

        types = {int: pa.int64(), float: pa.float64(), str: pa.string()}
        schema = pa.schema([(name, types[_TYPES[name]]) for name in COLUMNS])
        table = pa.table({name: self.column(name) for name in COLUMNS}, schema=schema)
        with whole_file(path) as temporary:
            pq.write_table(table, temporary)

    def state_dict(self) -> dict[str, torch.Tensor | list[str]]:
        """Return the history as tensors and lists of texts, which ``torch.load(weights_only=True)`` accepts.

        Returns:
            A tensor of shape (observations,) for each column. "layer" and "reason" hold indices into the lists
            "layers" and "reasons".
        """
        state: dict[str, torch.Tensor | list[str]] = {
            name: torch.from_numpy(np.array(column)) for name, column in self._numbers.items()
        }
        for name, column in self._texts.items():
            state[f"{name}s"] = list(column.vocabulary)
            state[name] = torch.from_numpy(np.array(column.codes, dtype=np.int32))
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace this history by the one of a :meth:`state_dict`.

        Raises:
            ValueError: If the state is not the state of a history; this history then stays unchanged.
        """
        expected = {*COLUMNS, *(f"{name}s" for name in _TEXTS)}
        if not isinstance(state, Mapping) or set(state) != expected:
            found = sorted(map(str, state)) if isinstance(state, Mapping) else type(state).__name__
            raise ValueError(f"Expected the state of a RhoHistory, {sorted(expected)}, but got {found}.")
        lengths = {
            name: len(state[name]) for name in COLUMNS if isinstance(state[name], torch.Tensor) and state[name].ndim
        }
        if len(set(lengths.values())) > 1:
            raise ValueError(f"Expected columns of one length in the state of a RhoHistory but got {lengths}.")
        check(state, _STATE, "The state of a RhoHistory")
        with naming("The state of a RhoHistory"):
            for name in _TEXTS:
                Entry((torch.int32,), low=0, high=len(state[f"{name}s"]) - 1)(state[name], name)
        numbers = {name: _number_column(name, state[name].tolist()) for name in NUMBERS}
        texts = {name: _TextColumn(state[f"{name}s"], state[name].tolist()) for name in _TEXTS}
        positions: dict[int, dict[str, int]] = {}
        for position, step in enumerate(numbers["step"]):
            positions.setdefault(step, {})[texts["layer"][position]] = position
        if sum(map(len, positions.values())) < len(numbers["step"]):
            raise SchemaError("Expected one observation of a layer at a step in a RhoHistory but there are several.")
        self._numbers, self._texts, self._positions = numbers, texts, positions


_TYPES: Final[dict[str, type]] = {
    name: str if name in _TEXTS else int if name in _INTEGERS else float for name in COLUMNS
}

#: Schema of :meth:`RhoHistory.state_dict`.
_STATE: Final = record(
    {
        **{name: Entry((torch.int64,), ((None,),), 0) for name in _INTEGERS},
        **{name: Entry((torch.float64,), ((None,),), finite=False) for name in NUMBERS if name not in _INTEGERS},
        **{name: Entry((torch.int32,), ((None,),), 0) for name in _TEXTS},
        **{f"{name}s": listed(text, distinct=True) for name in _TEXTS},
    }
)


def _checked(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the row with plain types; scalars of NumPy and torch are accepted."""
    if set(row) != set(COLUMNS):
        raise ValueError(f"Expected an observation with the columns {', '.join(COLUMNS)} but got {', '.join(row)}.")
    checked: dict[str, Any] = {}
    for name, kind in _TYPES.items():
        value = row[name]
        try:
            if kind is str and not isinstance(value, str):
                raise TypeError
            checked[name] = operator.index(value) if kind is int else kind(value)
        except (TypeError, ValueError) as error:
            raise ValueError(f"Expected {name} to be of type {kind.__name__} but got {value!r}.") from error
    return checked


@contextmanager
def _as_table(path: str | Path) -> Iterator[None]:
    """Add the file's name to errors of its encoding and its format."""
    try:
        yield
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"Expected a table of rho in {path} but it is none, or is damaged: {error}.") from error


def _check_number_column(name: str, allowed: Sequence[str]) -> None:
    if name not in allowed:
        raise ValueError(f"Expected one of the columns {', '.join(allowed)} but got {name!r}.")


def _abridged(steps: Sequence[int]) -> str:
    shown = [str(s) for s in (steps if len(steps) <= 6 else [*steps[:3], "...", *steps[-3:]])]
    return ", ".join(shown) or "none"
