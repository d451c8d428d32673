"""Restoration of a module after user code: attributes, containers, buffers, metrics and generators.

A training step may do more than return a loss: it may count batches, collect outputs, update metrics and running
statistics, or draw from a generator of the module. When a step runs again for its loss alone, none of this may stay.
"""

from __future__ import annotations

import random
import sys
import types
from argparse import Namespace
from collections import OrderedDict, UserDict, UserList, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from operator import is_
from typing import Any

import numpy as np
import torch
from lightning.fabric.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fasc_lightning._utils import amount
from fasc_lightning.distributed import is_dtensor

#: Bytes up to which a tensor or an array is copied each time, so that writes into it can be undone.
COPIED = 2**24

#: Bytes up to which all parameters together are copied.
PARAMETERS = 2**26

#: Most entries of a container whose entries are visited; larger containers are restored without visiting them.
ENTRIES = 10_000

#: Depth to which objects inside of objects are visited.
DEPTH = 8

#: Libraries whose objects are not a module's own state: trainers, loaders, optimizers, loggers, tokenizers.
_LIBRARIES = frozenset(
    {"torch", "torchmetrics", "lightning", "lightning_fabric", "lightning_utilities", "pytorch_lightning"}
    | {"transformers", "tokenizers", "datasets", "peft", "accelerate", "numpy", "pandas", "PIL", "fasc_lightning"}
    | {"tqdm", "rich", "tensorboard", "tensorboardX", "wandb", "mlflow"}
)
_PLAIN = (str, bytes, int, float, complex, bool, type(None), type, types.FunctionType, types.ModuleType)
_NAMESPACES = (types.SimpleNamespace, Namespace, UserDict, UserList)


@contextmanager
def untouched(module: nn.Module, *beside: Any) -> Iterator[None]:
    """Restore a module on every exit from this context, whatever runs inside.

    Objects are restored in place, and so for everyone who holds them: the attributes of all modules and of objects of
    the user's own classes, containers in any nesting, class attributes of the user's modules, values of buffers and
    tensors, states of metrics, gradients and flags of parameters, modes, hooks, and generators of the module.
    Parameters of more than :data:`PARAMETERS` bytes together, and other tensors of more than :data:`COPIED` bytes, are
    not copied: a write into one of them stays, and a warning is logged.

    Args:
        module: The module.
        *beside: Further containers to restore.
    """
    look = _Look(sum(p.nbytes for p in module.parameters() if not is_lazy(p)) <= PARAMETERS)
    for value in (module, *beside):
        look.at(value, 0)
    try:
        yield
    finally:
        look.put_back()


class _Look:
    """One walk over all objects of a module, which records how to restore them.

    Args:
        parameters: Whether parameters are copied.
    """

    def __init__(self, parameters: bool) -> None:
        self._parameters = parameters
        self._empty: list[dict[Any, Any]] = []  # most dicts of a module are empty: it has a dozen for hooks
        self._steps: list[tuple[Callable[..., Any], tuple[Any, ...]]] = []
        # Objects are kept alive, so that no id is used again.
        self._seen: dict[int, Any] = {}

    def put_back(self) -> None:
        """Restore all objects; an error of one does not stop the others and is raised at the end."""
        failed: BaseException | None = None
        for value in self._empty:
            if value:
                value.clear()
        for step, arguments in self._steps:
            try:
                step(*arguments)
            except BaseException as error:
                failed = failed or error
        if failed is not None:
            raise failed

    def _undo(self, step: Callable[..., Any], *arguments: Any) -> None:
        self._steps.append((step, arguments))

    def at(self, value: Any, depth: int) -> None:
        """Visit one value and everything inside of it."""
        if isinstance(value, _PLAIN) or id(value) in self._seen:
            return
        self._seen[id(value)] = value
        if type(value) is OrderedDict and not value:
            self._empty.append(value)
            return
        if isinstance(value, Tensor):
            self._tensor(value)
        elif isinstance(value, nn.Module):
            self._inside(self._mapping(vars(value)), depth)
            self._class(type(value), depth)
        elif isinstance(value, dict):
            self._inside(self._mapping(value), depth)
        elif isinstance(value, list | deque | set):
            self._inside(self._collection(value), depth)
        elif isinstance(value, tuple | frozenset):
            self._inside(value, depth)
        elif isinstance(value, np.ndarray):
            self._array(value)
        elif not self._generator(value) and depth < DEPTH and _is_own(value):
            self._object(value, depth)

    def _inside(self, values: Iterable[Any], depth: int) -> None:
        for value in values:
            self.at(value, depth)

    def _mapping(self, value: dict[Any, Any]) -> list[Any]:
        """Record a dict, and return its values to visit."""
        if not value:
            self._empty.append(value)
            return []
        kind = OrderedDict if isinstance(value, OrderedDict) else dict
        keys, items = list(kind.keys(value)), list(kind.values(value))
        self._undo(_put_mapping, kind, value, keys, items)
        return items if len(items) <= ENTRIES else []

    def _collection(self, value: list[Any] | deque[Any] | set[Any]) -> list[Any]:
        saved = list(value)
        self._undo(_put_collection, value, saved)
        return saved if len(saved) <= ENTRIES else []

    def _object(self, value: Any, depth: int) -> None:
        attributes = getattr(value, "__dict__", None)
        if isinstance(attributes, dict):
            self._inside(self._mapping(attributes), depth + 1)
        slots = [name for kind in type(value).__mro__ for name in _slots(kind) if hasattr(value, name)]
        self._attributes(value, {name: getattr(value, name) for name in slots}, depth + 1)

    def _class(self, kind: type, depth: int) -> None:
        """Record the class attributes of a user's modules, such as a list in the class body."""
        for each in kind.__mro__ if id(kind) not in self._seen else ():
            if id(each) in self._seen or _root(each) in _LIBRARIES or _root(each) in sys.stdlib_module_names:
                continue
            self._seen[id(each)] = each
            data = {k: v for k, v in vars(each).items() if not (k.startswith("__") or _is_code(v))}
            self._attributes(each, data, depth)

    def _attributes(self, owner: Any, saved: dict[str, Any], depth: int) -> None:
        self._undo(_put_attributes, owner, saved)
        self._inside(saved.values(), depth)

    def _tensor(self, value: Tensor) -> None:
        if value.is_leaf:
            self._undo(_put_flags, value, value.requires_grad, value.grad)
        if is_lazy(value) or is_dtensor(value) or value.layout is not torch.strided or value.is_meta:
            return
        data = value.data
        small = self._parameters if isinstance(value, nn.Parameter) else value.nbytes <= COPIED
        copied = data.clone() if small else None
        self._undo(_put_tensor, value, data, copied, 0 if value.is_inference() else value._version)

    def _array(self, value: np.ndarray) -> None:
        if value.flags.writeable and value.nbytes <= COPIED:
            self._undo(_put_array, value, value.copy())

    def _generator(self, value: Any) -> bool:
        """Record a generator of random numbers; return whether the value is one."""
        if isinstance(value, torch.Generator):
            self._undo(value.set_state, value.get_state())
        elif isinstance(value, random.Random):
            self._undo(value.setstate, value.getstate())
        elif isinstance(value, np.random.Generator):
            self._undo(setattr, value.bit_generator, "state", value.bit_generator.state)
        elif isinstance(value, np.random.RandomState):
            self._undo(value.set_state, value.get_state())
        else:
            return False
        return True


def _put_mapping(kind: type[dict[Any, Any]], value: dict[Any, Any], keys: list[Any], items: list[Any]) -> None:
    same = len(value) == len(keys) and all(map(is_, kind.keys(value), keys))
    if same and all(map(is_, kind.values(value), items)):
        return
    # Methods of subclasses may do something else: a Counter's `update` adds.
    kind.clear(value)
    for key, item in zip(keys, items, strict=True):
        kind.__setitem__(value, key, item)


def _put_collection(value: list[Any] | deque[Any] | set[Any], saved: list[Any]) -> None:
    if len(value) == len(saved) and all(map(is_, value, saved)):
        return
    value.clear()
    value.update(saved) if isinstance(value, set) else value.extend(saved)


def _put_attributes(owner: Any, saved: dict[str, Any]) -> None:
    for name, value in saved.items():
        if getattr(owner, name, _MISSING) is not value:
            setattr(owner, name, value)


def _put_flags(value: Tensor, requires_grad: bool, grad: Tensor | None) -> None:
    if value.requires_grad != requires_grad and value.is_leaf:
        value.requires_grad_(requires_grad)
    if value.is_leaf and value.grad is not grad:
        value.grad = grad


def _put_tensor(value: Tensor, data: Tensor, copied: Tensor | None, version: int) -> None:
    moved = value.data_ptr() != data.data_ptr() or value.shape != data.shape
    if moved:
        value.data = data
    if copied is None:
        if not value.is_inference() and value._version != version:
            rank_zero_warn(
                f"A training step that ran again wrote into a tensor of {amount(value.nbytes, 'B')} and "
                f"shape {tuple(value.shape)}. It is too large to be copied each time, and stays as that step left it. "
                "HINT: write into it in `on_train_batch_end`."
            )
    elif not torch.equal(data, copied):
        # Through `data`, so that the version of a tensor saved in a graph does not change.
        with torch.inference_mode(value.is_inference()):
            data.copy_(copied)


def _put_array(value: np.ndarray, saved: np.ndarray) -> None:
    value[...] = saved


_MISSING = object()


def _is_own(value: Any) -> bool:
    """Return whether an object's class is the user's own and derives from no library's class."""
    if isinstance(value, _NAMESPACES):
        return True
    if _root(type(value)) in sys.stdlib_module_names:
        return False
    return not any(_root(kind) in _LIBRARIES for kind in type(value).__mro__)


def _root(kind: type) -> str:
    return kind.__module__.partition(".")[0]


def _is_code(value: Any) -> bool:
    return callable(value) or hasattr(value, "__get__")


def _slots(kind: type) -> tuple[str, ...]:
    slots = vars(kind).get("__slots__", ())
    slots = (slots,) if isinstance(slots, str) else tuple(slots)
    return tuple(name for name in slots if name not in ("__dict__", "__weakref__"))
