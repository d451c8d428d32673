"""Which layers are compressed, and the hooks that turn a backward pass into (x, h) token matrices.

A tap is a forward hook on a layer that puts a *tensor* hook on the layer's output. A tensor hook fires exactly once
for each backward pass through the output, also under both kinds of gradient checkpointing, where forward hooks run
twice; and unlike module backward hooks it lets the output be modified in place (pytorch#61519).
"""

from __future__ import annotations

import re
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fasc_lightning._dtensor import whole
from fasc_lightning._undo import Undo
from fasc_lightning.expert_views import ExpertLinear, ExpertTaps, Routing, expert_views, holds_experts, routers
from fasc_lightning.lowrank import linear_shape, linear_weight
from fasc_lightning.offload import MomentSums, RowsRefusedError
from fasc_lightning.pooled import input_gradient
from fasc_lightning.tokens import TokenRows

#: Takes a layer's name, its counted inputs x (tokens, n), the gradients h (tokens, m) of the batch's loss at its
#: outputs, not scaled, the batch, and how many of the tokens each sequence has.
Pairs = Callable[[str, Tensor, Tensor, TokenRows, list[int]], None]


def matches(name: str, patterns: str | Iterable[str]) -> bool:
    """Tell whether a module name is selected, by the rules of peft's ``target_modules``.

    Args:
        name: Dotted module name.
        patterns: A string is a regular expression for the whole name; a list holds names or their last parts.
    """
    if isinstance(patterns, str):
        return re.fullmatch(patterns, name) is not None
    return any(name == pattern or name.endswith(f".{pattern}") for pattern in patterns)


def select_layers(
    model: nn.Module,
    targets: str | list[str] | None = None,
    exclude: str | list[str] | None = None,
    eligible: Callable[[nn.Module], bool] | None = None,
) -> dict[str, nn.Module]:
    """Return the linear layers to compress, by dotted name, in the model's order.

    Args:
        model: Any module.
        targets: Patterns as in peft (see :func:`matches`). None or "all-linear" takes every ``nn.Linear`` and
            transformers ``Conv1D`` and every projection of fused experts (:mod:`~fasc_lightning.expert_views`) except
            output embeddings, routers and layers whose weight is tied to another module's; those are only taken when
            a pattern names them.
        exclude: Patterns of layers to leave alone.
        eligible: What is a layer to select from; by default :func:`is_plain_linear`, and experts.

    Raises:
        ValueError: If nothing is selected.
    """
    eligible = eligible or (lambda module: isinstance(module, ExpertLinear) or is_plain_linear(module))
    everything = targets is None or targets == "all-linear"
    protected = _protected(model) if everything else set()
    layers: dict[str, nn.Module] = {}
    linear: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if eligible(module):
            linear[name] = module
        elif holds_experts(name, module):
            linear |= {place: view for place, view in expert_views(name, module).items() if eligible(view)}
    for name, module in linear.items():
        if everything:
            selected = id(module) not in protected
        else:
            assert targets is not None
            selected = matches(name, targets)
        if selected and not (exclude is not None and matches(name, exclude)):
            layers[name] = module
    if not layers:
        known = ", ".join(list(linear)[:8]) or "none"
        raise ValueError(
            f"Expected `targets` to select linear layers but {targets=} with {exclude=} matches none of the "
            f"{len(linear)} in {type(model).__name__} (for example: {known}). A string is a regular expression for "
            "the whole name, a list holds names or their last parts."
        )
    return layers


def is_plain_linear(module: nn.Module) -> bool:
    """Tell whether a module is a dense linear layer that can be tapped and replaced.

    Subclasses that compute something else (scaled, ternary, adapted) are not.
    """
    if not isinstance(module, nn.Linear | Conv1D) or type(module).forward not in (nn.Linear.forward, Conv1D.forward):
        return False
    weight = module.weight
    # Packed quantised layers are subclasses of nn.Linear whose weight is bytes of another shape.
    return weight.ndim == 2 and weight.is_floating_point() and tuple(weight.shape) in _weight_shapes(module)


def _weight_shapes(module: nn.Linear | Conv1D) -> set[tuple[int, int]]:
    if isinstance(module, nn.Linear):
        return {(module.out_features, module.in_features)}
    return {(module.nx, module.nf)}


def _protected(model: nn.Module) -> set[int]:
    """Ids of the layers that "all linear" does not mean: output embeddings, routers and tied weights."""
    protected = routers(model)
    owners: Counter[int] = Counter()
    for module in model.modules():
        get_output = getattr(module, "get_output_embeddings", None)
        if callable(get_output) and (output := get_output()) is not None:
            protected.add(id(output))
        owners.update(id(parameter) for parameter in module.parameters(recurse=False))
    for module in model.modules():
        if is_plain_linear(module) and owners[id(module.weight)] > 1:
            protected.add(id(module))
    return protected


@dataclass
class _Call:
    """One input tensor on its way through the layers that share it.

    Attributes:
        source: The tensor; weak, since only its identity matters.
        leading: Its shape without features.
        rows: Its counted tokens, shape (tokens, n): a view where all count, else a copy. None once they are used.
        version: Of ``rows``, which a view shares with the tensor: it tells of modifications in place.
        batch: What counts, and how gradients are scaled.
        members: The layers that were given it.
        pending: Those of them whose gradient has not arrived.
        counted: Whether a gradient has arrived, and the rows are in the moments.
        routed: Of an expert's input: its rows that count, and how many of each sequence.
    """

    source: weakref.ref[Tensor]
    leading: tuple[int, ...]
    rows: Tensor | None
    version: int
    batch: TokenRows
    members: list[str] = field(default_factory=list)
    pending: set[str] = field(default_factory=set)
    counted: bool = False
    routed: tuple[Tensor, list[int]] | None = None

    def select(self, values: Tensor) -> Tensor:
        """Return the counted rows of a tensor of the input's tokens."""
        if self.routed is None:
            return _rows(values, self.batch)
        return values.detach().index_select(0, self.routed[0])

    def lengths(self) -> list[int]:
        """Return how many counted tokens each sequence has."""
        return self.batch.lengths(self.leading) if self.routed is None else self.routed[1]


class Taps:
    """Hooks on the tapped layers, feeding moments and pairs of rows on between ``begin_batch`` and ``end_batch``.

    Forwards outside of a batch, or without gradients, pass untouched. A layer's token counts once its gradient has
    arrived.

    Args:
        layers: The layers by name.
        moments: Where input and gradient rows go, if anywhere. With them, data that would make them wrong raise.
        pairs: Called with each layer's inputs and gradients once both are there.
        anchor: Whether layers that nothing trainable comes before get a gradient, too: the backward pass then goes
            down to them. Else they are passed over, and the fit computes what it would anyway.
    """

    def __init__(
        self,
        layers: dict[str, nn.Module],
        moments: MomentSums | None = None,
        pairs: Pairs | None = None,
        anchor: bool = True,
    ) -> None:
        self.layers = layers
        self.moments = moments
        self.pairs = pairs
        self.anchor = anchor
        #: Whether hooks are on the model.
        self.installed = False
        self._experts = ExpertTaps(layers)
        self._undo = Undo()
        self._batch: TokenRows | None = None
        self._calls: list[_Call] = []
        # Weak: a call belongs to the graph whose hooks hold it. The graph that checkpointing recomputes is dropped
        # without a backward pass of its own, and its inputs must go with it.
        self._by_input: WeakValueDictionary[int, _Call] = WeakValueDictionary()
        # Outputs that nothing upstream makes require a gradient (everything before them is frozen) are added to
        # this zero, so that autograd carries the gradient down to them without computing any weight's.
        self._anchor = torch.zeros((), requires_grad=True)

    def install(self) -> None:
        """Put the hooks on."""
        if self.installed:
            return
        self.installed = True
        self._experts.install(self._undo)
        for name, module in self.layers.items():
            self._undo.hook(module.register_forward_hook, partial(self._on_forward, name), with_kwargs=True)

    def remove(self) -> None:
        """Take every hook off; safe to call at any time, any number of times."""
        self._undo.close()
        self.installed = False
        if self.moments is not None:
            self.moments.drop()  # of a batch that was not ended: why has been said, or is about to be
        self._batch = None
        self._calls.clear()
        self._by_input.clear()

    def begin_batch(self, rows: TokenRows) -> None:
        """Start counting: the next forwards belong to the batch that ``rows`` describes."""
        self.end_batch()
        self._batch = rows

    def end_batch(self) -> None:
        """Stop counting, and settle inputs whose gradient reached only some of the layers that share them."""
        for call in self._calls:
            if call.pending and call.rows is not None and self.moments is not None:
                reached = [name for name in call.members if name not in call.pending]
                self.moments.move_inputs(call.members, reached, call.rows)
        self.settle()
        self._batch = None
        self._calls.clear()
        self._by_input.clear()

    def settle(self) -> None:
        """Wait until the moments hold all rows of the batch so far.

        Raises:
            FloatingPointError: If some of them are not finite, and the moments did not say so at once.
        """
        if self.moments is not None and self._batch is not None:
            with _named("a number", self._batch):
                self.moments.settle()

    def _on_forward(
        self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> Tensor | None:
        if self._batch is None or not torch.is_grad_enabled():
            return None
        anchored = None
        if not output.requires_grad:
            if not self.anchor:
                return None
            output = anchored = output + self._anchor.to(output)
        routing = args[2] if isinstance(module, ExpertLinear) else None
        call = self._call(name, args[0] if args else next(iter(kwargs.values())), routing)
        output.register_hook(partial(self._on_gradient, name, call))
        return anchored

    def _call(self, name: str, x: Tensor, routing: Routing | None = None) -> _Call:
        """Return the call that ``x`` belongs to: the same tensor object is the same input."""
        assert self._batch is not None
        call = self._by_input.get(id(x))
        # An id may be used again once its tensor is gone; and a layer that is given the same tensor twice sees its
        # tokens twice.
        if call is None or call.source() is not x or name in call.members or call.counted:
            call = _Call(weakref.ref(x), tuple(x.shape[:-1]), None, 0, self._batch)
            if routing is not None:
                call.routed = self._batch.routed(routing.tokens, routing.total)
            call.rows = rows = call.select(x)
            call.version = _version(rows)
            self._by_input[id(x)] = call
        call.members.append(name)
        call.pending.add(name)
        return call

    @torch.no_grad()
    def _on_gradient(self, name: str, call: _Call, gradient: Tensor) -> None:
        x = call.rows
        if name not in call.pending or x is None:
            return  # a second backward pass through the same graph: its tokens are already counted
        modified = _version(x) != call.version
        if modified and self.moments is None:
            return  # for want of a true input
        if modified:
            raise RuntimeError(
                f"The input of layer {name!r} was modified in place after the layer read it, so its statistics "
                "would be wrong. Make the modification out of place, or add the layer to `exclude`."
            )
        h = call.select(gradient)
        if call.batch.may_overflow and not torch.isfinite(h).all():
            call.batch.overflowed = True
        if call.batch.overflowed:
            return
        if self.moments is not None:
            self._add_moments(self.moments, name, call, x, h)
        call.counted = True
        # An expert that is given nothing but padding was not seen; a batch of padding was, and is said to be empty.
        if self.pairs is not None and (len(x) or call.routed is None):
            self.pairs(name, x, h, call.batch, call.lengths())
        call.pending.discard(name)
        if not call.pending:
            call.rows = None

    def _add_moments(self, moments: MomentSums, name: str, call: _Call, x: Tensor, h: Tensor) -> None:
        if not call.counted:
            with _named(f"an activation of layer {name!r}", call.batch):
                moments.add_inputs(call.members, x)
            self._calls.append(call)
        with _named(f"a gradient of layer {name!r}", call.batch):
            moments.add_gradients(name, h, call.batch.scale)
            if moments.takes_pairs:
                lengths = call.lengths()
                g = input_gradient(h, whole(linear_weight(self.layers[name]))) if "saliency" in moments.needs else None
                moments.add_pairs(name, x, h, lengths, call.batch.scale, g, self._seen(moments, name, x, h))

    def _seen(self, moments: MomentSums, name: str, x: Tensor, h: Tensor) -> Tensor | None:
        """Return W x or W^T h of each token, where a moment is held as the weight sees it."""
        side = moments.projects(name)
        if side is None:
            return None
        W = whole(linear_weight(self.layers[name])).detach()
        return input_gradient(x, W.T) if side == "inputs" else input_gradient(h, W)


@contextmanager
def _named(what: str, rows: TokenRows) -> Iterator[None]:
    """Say where numbers that the moments refuse come from."""
    try:
        yield
    except FloatingPointError as error:
        what = error.what if isinstance(error, RowsRefusedError) else what
        raise FloatingPointError(
            f"Expected finite numbers but {what} is NaN or Inf in {rows.label}. The batch was refused. Check the data "
            "and the learning rate; under float16 use bf16, or a GradScaler with a smaller `init_scale`."
        ) from error


def _version(values: Tensor) -> int:
    """Return how often a tensor was modified in place; inference tensors do not count."""
    return 0 if values.is_inference() else values._version


def _rows(values: Tensor, rows: TokenRows) -> Tensor:
    """Return the counted tokens of (..., d) activations or gradients as rows (tokens, d); a view if all count."""
    index = rows.index(tuple(values.shape[:-1]), values.device)
    flat = values.detach().reshape(-1, values.shape[-1])
    return flat if index is None else flat.index_select(0, index)


def layer_shapes(layers: dict[str, nn.Module]) -> dict[str, tuple[int, int]]:
    """Return (m, n) = (outputs, inputs) of each layer."""
    return {name: linear_shape(module) for name, module in layers.items()}
