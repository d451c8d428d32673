"""A runner of a model's blocks one by one, with dense or compressed layers."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fasc_lightning._utils import Undo, undoing
from fasc_lightning.refit._batch_loss import BatchLoss
from fasc_lightning.refit._block_stack import WITHOUT_REFIT, RefitError, find_blocks

#: Largest relative difference between a model's own forward and its blocks called one after the other.
REPLAY_TOLERANCE = 1e-2


@dataclass
class _BlockCall:
    """The arguments of a block besides the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass
class _Slot:
    parent: nn.Module
    child: str
    dense: nn.Module
    compressed: nn.Module


@dataclass
class _Interned:
    """Keeps one of several equal tensors: masks and position embeddings are equal in most blocks and batches."""

    kept: dict[tuple[Any, ...], list[Tensor]] = field(default_factory=dict)

    def __call__(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            known = self.kept.setdefault((value.shape, value.dtype, value.device), [])
            for other in known:
                if other is value or torch.equal(other, value):
                    return other
            known.append(value)
            return value
        if isinstance(value, Mapping) and type(value) is dict:
            return {key: self(item) for key, item in value.items()}
        if type(value) in (tuple, list):
            return type(value)(self(item) for item in value)
        return value


class BlockRunner:
    """Runs the blocks of a compressed model one by one on batches, with its dense or its compressed layers.

    Args:
        model: The compressed model, in eval mode.
        dense: The dense layer of each compressed one by name.
        batches: Batches to run the model on.
        loss: Function that sends a batch through the model. Its attribute ``context``, if it has one, returns a context
            manager in which blocks run, for mixed precision.
        tokens: Most tokens to hold; the first batches within this number are taken. None takes all batches.
        remedy: Last sentence of errors.

    Attributes:
        blocks: The ModuleList.
        batches: The batches taken.
        inputs: The hidden states at the first block's input, one tensor for each batch.

    Raises:
        RefitError: If there is no stack of blocks, or the model does more than call its blocks one after the other.
    """

    def __init__(
        self,
        model: nn.Module,
        dense: Mapping[str, nn.Module],
        batches: Iterable[Any],
        loss: BatchLoss,
        tokens: int | None = None,
        remedy: str = WITHOUT_REFIT,
    ) -> None:
        self.model = model
        self.name, self.blocks = find_blocks(model, dense, remedy)
        self.batches: list[Any] = []
        self._loss = loss
        self._context: Callable[[], AbstractContextManager[Any]] = getattr(loss, "context", nullcontext)
        self._remedy = remedy
        self._calls: list[list[_BlockCall]] = []
        self._plain = True  # whether blocks return hidden states and nothing else
        self.inputs: list[Tensor] = []
        modules = dict(model.named_modules(remove_duplicate=False))
        self._slots = [_slot(modules, name, layer) for name, layer in dense.items()]
        self._capture(batches, math.inf if tokens is None else tokens)

    def prefix(self, block: int) -> str:
        """Return the prefix of the names of all modules inside a block."""
        return f"{self.name}.{block}." if self.name else f"{block}."

    @torch.no_grad()
    def loss(self, batch: int) -> float:
        """Return the model's mean loss of a batch."""
        return float(self._loss(self.model, self.batches[batch]))

    @torch.no_grad()
    def run(self, block: int, batch: int, hidden: Tensor) -> Tensor:
        """Return a block's output for hidden states of a batch."""
        call = self._calls[batch][block]
        with self._context():
            return _hidden(self.blocks[block](hidden, *call.args, **call.kwargs))

    def run_with(self, block: int, batch: int, hidden: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return a block's output as :meth:`run` does, differentiable and with given parameters and buffers.

        Args:
            block: Number of the block.
            batch: Number of the batch.
            hidden: Input of the block, in the type of the parameters; further arguments are converted to it.
            tensors: Parameters and buffers by their name inside the block.
        """
        call = self._calls[batch][block]
        args, kwargs = _in_type((call.args, call.kwargs), hidden.dtype)
        return _hidden(torch.func.functional_call(self.blocks[block], dict(tensors), (hidden, *args), kwargs))

    def run_and_see(
        self, block: int, batch: int, hidden: Tensor, layers: Sequence[nn.Module]
    ) -> tuple[list[Tensor], Tensor]:
        """Return the inputs of layers inside a block, and the block's output."""
        found: dict[nn.Module, tuple[Tensor, int]] = {}

        def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = _first(args, kwargs).detach()
            found[module] = x, x._version

        with undoing() as undo:
            for layer in layers:
                undo.hook(layer.register_forward_pre_hook, see, with_kwargs=True)
            output = self.run(block, batch, hidden)
        inputs = []
        for layer in layers:
            x, version = found[layer]
            # An input that was modified in place since is computed again.
            inputs.append(x if x._version == version else self.layer_input(block, batch, hidden, layer))
        return inputs, output

    def layer_input(self, block: int, batch: int, hidden: Tensor, layer: nn.Module) -> Tensor:
        """Return the input of a layer inside a block; the forward stops there."""
        found: list[Tensor] = []

        def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found.append(_first(args, kwargs))
            raise _Reached

        with suppress(_Reached), undoing() as undo:
            undo.hook(layer.register_forward_pre_hook, stop, with_kwargs=True)
            self.run(block, batch, hidden)
        return found[0]

    @contextmanager
    def dense(self) -> Iterator[None]:
        """Put the dense layers in place of the compressed ones inside the context."""
        with undoing() as undo:
            for slot in self._slots:
                undo.add(slot.parent._modules.__setitem__, slot.child, slot.compressed)
                slot.parent._modules[slot.child] = slot.dense
            yield

    @torch.no_grad()
    def groups(self, block: int, hidden: Tensor, layers: Mapping[str, nn.Module]) -> list[list[str]]:
        """Return a block's layers in order of execution on the first batch; layers that share an input form a group.

        Layers that never run, run more than once, or run on other tokens than the block's (experts) are left out: their
        dense and drifted inputs do not pair.

        Args:
            block: Number of the block.
            hidden: Input of the block for the first batch.
            layers: The block's compressed layers by name.
        """
        calls: list[tuple[str, Tensor]] = []

        def note(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls.append((name, _first(args, kwargs)))

        with undoing() as undo:
            for name, layer in layers.items():
                undo.hook(layer.register_forward_pre_hook, partial(note, name), with_kwargs=True)
            self.run(block, 0, hidden)
        tokens = hidden.shape[:-1].numel()
        names = [name for name, _ in calls]
        groups: list[list[str]] = []
        last: Tensor | None = None
        for name, x in calls:
            if names.count(name) > 1 or x.shape[:-1].numel() != tokens:
                continue
            if x is last:
                groups[-1].append(name)
            else:
                groups.append([name])
            last = x
        return groups

    @torch.no_grad()
    def _capture(self, batches: Iterable[Any], most: float) -> None:
        """Run the model on every batch and keep its blocks' arguments; then check that the blocks alone do the same.

        Args:
            batches: Batches, of which at most one more is consumed than is taken.
            most: Most tokens to hold.
        """
        intern = _Interned()
        held = 0
        for number, batch in enumerate(batches):
            calls: list[_BlockCall] = []
            with undoing() as undo, suppress(_Reached):
                # The other arguments of blocks do not depend on the hidden states (``_check_replay``), so that after
                # the first batch no block has to compute them.
                if number and self._plain:
                    self._stand_in(undo)
                for i, block in enumerate(self.blocks):
                    undo.hook(block.register_forward_pre_hook, self._note_call(i, calls, intern), with_kwargs=True)
                    undo.hook(block.register_forward_hook, self._note_output)
                self._loss(self.model, batch)
            if len(calls) != len(self.blocks) or len(self.inputs) != number + 1:
                raise RefitError(
                    f"Expected the model to run the {len(self.blocks)} blocks of {self.name!r} once each but it ran "
                    f"{len(calls)}. {self._remedy}"
                )
            held += self.inputs[-1].shape[:-1].numel()
            if held > most:
                del self.inputs[-1]
                break
            self.batches.append(batch)
            self._calls.append(calls)
        if not self.batches:
            return
        with self.dense():
            self._check_replay()

    def _note_call(self, i: int, calls: list[_BlockCall], intern: _Interned) -> Callable[..., None]:
        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not args or not isinstance(args[0], Tensor):
                raise RefitError(
                    f"Expected blocks whose first argument is the hidden states but {type(module).__name__} is called "
                    f"with other arguments. {self._remedy}"
                )
            if i == 0:
                self.inputs.append(args[0].detach())
            if i == len(calls):  # in order and once; otherwise the count is wrong, which is an error
                calls.append(_BlockCall(intern(_without_cache(args[1:])), intern(_without_cache(kwargs))))

        return note

    def _stand_in(self, undo: Undo) -> None:
        """Put a module in place of each block that returns its input; the forward stops at the last one."""
        last = len(self.blocks) - 1
        for i, block in enumerate(list(self.blocks)):
            undo.add(self.blocks._modules.__setitem__, str(i), block)
            self.blocks._modules[str(i)] = _Skip(block, stops=i == last)

    def _note_output(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._plain = self._plain and isinstance(output, Tensor)

    def _check_replay(self) -> None:
        """Compare the last block's output in the dense model with the output of its blocks called one after the other.

        The calls were captured with the compressed layers. Blocks whose further arguments depend on the hidden states
        therefore differ with the dense ones.
        """
        ends: list[Tensor] = []

        def note(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            ends.append(_hidden(output).detach())

        with undoing() as undo:
            undo.hook(self.blocks[-1].register_forward_hook, note)
            self.loss(0)
        hidden = self.inputs[0]
        for i in range(len(self.blocks)):
            hidden = self.run(i, 0, hidden)
        difference = float((hidden - ends[0]).double().norm() / ends[0].double().norm())
        if not difference < REPLAY_TOLERANCE:
            raise RefitError(
                f"Expected the blocks of {self.name!r}, called one after the other, to do what the model does, but "
                f"their output differs by {difference:.2g} of its norm: the model does something between them, or "
                f"passes on more than hidden states. {self._remedy}"
            )


class _Reached(Exception):  # noqa: N818 (no error: it ends a forward early)
    pass


class _Skip(nn.Module):
    """Stands in for a block and returns its hidden states; other attributes, which models read, are the block's.

    Args:
        block: The block.
        stops: Whether the forward ends here.
    """

    def __init__(self, block: nn.Module, stops: bool) -> None:
        super().__init__()
        object.__setattr__(self, "_block", block)  # not registered as a child
        self._stops = stops

    def forward(self, hidden: Any, *args: Any, **kwargs: Any) -> Any:
        del args, kwargs
        if self._stops:
            raise _Reached
        return hidden

    def __getattr__(self, name: str) -> Any:
        return getattr(object.__getattribute__(self, "_block"), name)


def _slot(modules: Mapping[str, nn.Module], name: str, dense: nn.Module) -> _Slot:
    parent, _, child = name.rpartition(".")
    return _Slot(modules[parent], child, dense, modules[name])


def _first(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """Return a layer's input."""
    return args[0] if args else next(iter(kwargs.values()))


def _without_cache(value: Any) -> Any:
    """Return arguments without the cache of keys and values, which would grow with every run."""
    cache = getattr(sys.modules.get("transformers.cache_utils"), "Cache", None)
    if cache is not None and isinstance(value, cache):
        return None
    if type(value) is dict:
        return {key: False if key == "use_cache" else _without_cache(item) for key, item in value.items()}
    if type(value) is tuple:
        return tuple(_without_cache(item) for item in value)
    return value


def _in_type(value: Any, dtype: torch.dtype) -> Any:
    """Return arguments with their floating-point tensors converted to a type."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if type(value) is dict:
        return {key: _in_type(item, dtype) for key, item in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_in_type(item, dtype) for item in value)
    return value


def _hidden(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output
