"""The hooks that turn a backward pass into (x, h) token matrices.

A tap is a forward hook on a layer that puts a *tensor* hook on the layer's output. A tensor hook fires exactly once
for each backward pass through the output, also under both kinds of gradient checkpointing, where forward hooks run
twice; and unlike module backward hooks it lets the output be modified in place (pytorch#61519).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from fasc_lightning._utils import ForwardHook, Undo
from fasc_lightning.batches import Backwards, TokenRows
from fasc_lightning.distributed import whole
from fasc_lightning.hooks._expert_taps import ExpertTaps
from fasc_lightning.layers import ExpertLinear, Routing, input_gradient, linear_weight
from fasc_lightning.statistics import MomentSums, RowsRefusedError

#: Takes a layer's name, its counted inputs x (tokens, n), the gradients h (tokens, m) of the batch's loss at its
#: outputs, not scaled, the batch, and how many of the tokens each sequence has.
Pairs = Callable[[str, Tensor, Tensor, TokenRows, list[int]], None]


class _SavedInput(torch.autograd.Function):
    """A node that saves a layer's input as the layer's own backward node does, and that no backward pass ever runs.

    Whoever decides what becomes of saved tensors (gradient checkpointing recomputes them, ``save_on_cpu`` moves them)
    decides for this one, too, so that taps hold no more than the graph does. A reference would hold what checkpointing
    means to free.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return anchor.detach()


def _save(x: Tensor, anchor: Tensor) -> Callable[[], Tensor]:
    """Return what gives ``x`` back during a backward pass, at most once in each.

    Args:
        x: A layer's input.
        anchor: Any tensor that requires a gradient, which makes autograd keep a node.

    Returns:
        A function without arguments. It raises a RuntimeError if ``x`` was modified in place in the meantime.
    """
    if x.is_inference():  # autograd saves none of these
        return lambda: x
    node: Any = _SavedInput.apply(x.detach(), anchor).grad_fn
    return lambda: node.saved_tensors[0]


@dataclass(eq=False)
class _Call:
    """One input tensor on its way through the layers that share it.

    Attributes:
        source: The tensor; weak, since only its identity matters.
        leading: Its shape without features.
        batch: What counts, and how gradients are scaled.
        members: The layers that were given it.
        pending: Those of them whose gradient has not been counted.
        rows: Its counted tokens, shape (tokens, n), from the first gradient until the last of ``pending`` is counted:
            a view where all tokens count, else a copy.
        version: Of ``rows``, which a view shares with the tensor: it tells of modifications in place.
        counted: Whether a gradient has arrived: the layers that read the tensor from now on make a call of their own.
        summed: Whether the rows are in the moments.
        gradients: By layer, the sum of the gradients that several backward passes have brought.
        unannounced: The same of passes that were not announced, for batches that announce none.
        saved: By layer, what gives the input back.
        routed: Of an expert's input: its rows that count, and how many of each sequence.
    """

    source: weakref.ref[Tensor]
    leading: tuple[int, ...]
    batch: TokenRows
    members: list[str] = field(default_factory=list)
    pending: set[str] = field(default_factory=set)
    rows: Tensor | None = None
    version: int = 0
    counted: bool = False
    summed: bool = False
    gradients: dict[str, Tensor] = field(default_factory=dict)
    unannounced: dict[str, Tensor] = field(default_factory=dict)
    saved: dict[str, Callable[[], Tensor]] = field(default_factory=dict)
    routed: tuple[Tensor, list[int]] | None = None

    def select(self, values: Tensor) -> Tensor:
        """Return the counted rows of a tensor of the input's tokens."""
        if self.routed is None:
            return _rows(values, self.batch)
        return values.detach().index_select(0, self.routed[0])

    def lengths(self) -> list[int]:
        """Return how many counted tokens each sequence has."""
        return self.batch.lengths(self.leading) if self.routed is None else self.routed[1]

    def take_rows(self, name: str) -> Tensor | None:
        """Return the counted rows of the input; None if the input was modified in place after the layer read it.

        What the layer saved is let go of.
        """
        saved = self.saved.pop(name, None)
        if self.rows is None:
            assert saved is not None  # rows stay as long as a gradient is missing
            try:
                self.rows = self.select(saved())
            except RuntimeError as error:
                if "inplace operation" not in str(error):
                    raise
                return None
            self.version = _version(self.rows)
        return self.rows if _version(self.rows) == self.version else None

    def add_gradient(self, name: str, h: Tensor, announced: bool) -> None:
        """Add what one of several backward passes has brought a layer."""
        sums = self.gradients if announced else self.unannounced
        # A copy: autograd may write into a gradient that it has handed out.
        sums[name] = h.clone() if name not in sums else sums[name] + h


class Taps:
    """Hooks on the tapped layers, feeding moments and pairs of rows on between ``begin_batch`` and ``end_batch``.

    Forwards outside of a batch, or without gradients, pass untouched. A layer's token counts once its gradient has
    arrived.

    Which gradients are the loss's is the caller's to say. By default every backward pass through the layers is, and
    each call of a layer is counted with the first one. Where the caller announces backward passes
    (``begin_backward``, ``end_backward``), gradients of all others are passed over: a training step may differentiate
    for reasons of its own (``torch.autograd.grad``). Where several backward passes may go through one call, their
    gradients are summed, and the call is counted at the end of the batch. A training step that calls
    ``loss.backward()`` by itself announces none; then all of its passes count.

    Args:
        layers: The layers by name.
        moments: Where input and gradient rows go, if anywhere. With them, data that would make them wrong raise.
        pairs: Called with each layer's inputs and gradients once both are there.
        anchor: Whether layers that nothing trainable comes before get a gradient, too: the backward pass then goes
            down to them. Else they are passed over, and the fit computes what it would anyway.

    Attributes:
        called: The layers that ran in some batch.
        reached: The layers that a gradient has reached in some batch.
        unannounced: Whether a batch was counted by backward passes that nobody announced.
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
        self.called: set[str] = set()
        self.reached: set[str] = set()
        self.unannounced = False
        self._experts = ExpertTaps(layers)
        self._undo = Undo()
        self._batch: TokenRows | None = None
        self._backwards = Backwards()
        self._open = False  # whether an announced backward pass goes on
        self._announced = False  # whether this batch has announced one
        self._announces = False  # whether some batch has
        self._calls: list[_Call] = []  # those that a gradient has reached
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
            self._undo.hook(module.register_forward_hook, ForwardHook(self._on_forward, name), with_kwargs=True)

    def remove(self) -> None:
        """Take every hook off; safe to call at any time, any number of times."""
        self._undo.close()
        self.installed = False
        if self.moments is not None:
            self.moments.drop()  # of a batch that was not ended: why has been said, or is about to be
        self._forget_batch()

    def begin_batch(self, rows: TokenRows, backwards: Backwards | None = None) -> None:
        """Start counting: the next forwards belong to the batch that ``rows`` describes.

        Args:
            rows: Which tokens count, and how gradients are scaled.
            backwards: Which backward passes count; by default each one, once for a call of a layer.
        """
        self.end_batch()
        self._batch = rows
        self._backwards = Backwards() if backwards is None else backwards

    def begin_backward(self) -> None:
        """Announce a backward pass whose gradients count."""
        self._open = self._announced = self._announces = True

    def end_backward(self) -> None:
        """End an announced backward pass."""
        self._open = False

    def end_batch(self) -> None:
        """Stop counting, and settle inputs whose gradient reached only some of the layers that share them."""
        try:
            for call in self._calls:
                self._add_summed(call)
                if call.pending and call.summed and call.rows is not None and self.moments is not None:
                    reached = [name for name in call.members if name not in call.pending]
                    self.moments.move_inputs(call.members, reached, call.rows)
            self.settle()
        finally:
            self._forget_batch()

    def _forget_batch(self) -> None:
        self._batch = None
        self._open = self._announced = False
        self._calls.clear()
        self._by_input.clear()

    def settle(self) -> None:
        """Wait until the moments hold all rows that have been counted so far.

        Raises:
            FloatingPointError: If some of them are not finite, and the moments did not say so at once.
        """
        if self.moments is not None and self._batch is not None:
            with _named("a number", self._batch):
                self.moments.settle()

    def _on_forward(
        self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> Tensor | None:
        if self._batch is None:
            return None
        self.called.add(name)
        if not torch.is_grad_enabled():
            return None
        anchored = None
        if not output.requires_grad:
            if not self.anchor:
                return None
            output = anchored = output + self._anchor.to(output)
        routing = args[2] if isinstance(module, ExpertLinear) else None
        x = args[0] if args else next(iter(kwargs.values()))
        call = self._call(name, x, routing)
        # Each layer saves its input, shared or not: checkpointing counts what is saved, and has to find as much when it
        # recomputes some of the layers that share one.
        call.saved[name] = _save(x, self._anchor)
        output.register_hook(partial(self._on_gradient, name, call))
        return anchored

    def _call(self, name: str, x: Tensor, routing: Routing | None = None) -> _Call:
        """Return the call that ``x`` belongs to: the same tensor object is the same input."""
        assert self._batch is not None
        call = self._by_input.get(id(x))
        # An id may be used again once its tensor is gone; and a layer that is given the same tensor twice sees its
        # tokens twice.
        if call is None or call.source() is not x or name in call.members or call.counted:
            call = _Call(weakref.ref(x), tuple(x.shape[:-1]), self._batch)
            if routing is not None:
                call.routed = self._batch.routed(routing.tokens, routing.total)
            else:
                self._batch.index(call.leading, x.device)  # in the order of the forward: later layers learn from it
            self._by_input[id(x)] = call
        call.members.append(name)
        call.pending.add(name)
        return call

    @torch.no_grad()
    def _on_gradient(self, name: str, call: _Call, gradient: Tensor) -> None:
        how = self._backwards
        announced = self._open or not how.announced
        if call.batch is not self._batch or name not in call.pending:
            return  # of an earlier batch, or counted already
        if not announced and (self._announces or not how.several):
            return
        x = call.take_rows(name)
        if x is None:
            if self.moments is None:
                return  # for want of a true input
            raise _modified(name)
        h = call.select(gradient)
        if call.batch.may_overflow and not torch.isfinite(h).all():
            call.batch.overflowed = True
        if call.batch.overflowed:
            return
        if not call.counted:
            call.counted = True
            self._calls.append(call)
        if not how.several:
            self._add(name, call, x, h)
            return
        if announced and self.moments is not None and not torch.isfinite(h).all():  # before an optimizer steps on it
            with _named(f"a gradient of layer {name!r}", call.batch):
                raise FloatingPointError
        call.add_gradient(name, h, announced)

    def _add_summed(self, call: _Call) -> None:
        """Count a call with what all backward passes of its batch have brought."""
        if call.batch.overflowed:
            return
        unannounced = self._backwards.announced and not self._announced
        self.unannounced = self.unannounced or unannounced
        for name, h in (call.unannounced if unannounced else call.gradients).items():
            x = call.take_rows(name)
            if x is not None:
                self._add(name, call, x, h)
            elif self.moments is not None:
                raise _modified(name)

    def _add(self, name: str, call: _Call, x: Tensor, h: Tensor) -> None:
        """Give one layer's rows of one call to the moments and the pairs."""
        self.reached.add(name)
        if self.moments is not None:
            self._add_moments(self.moments, name, call, x, h)
        # An expert that is given nothing but padding was not seen; a batch of padding was, and is said to be empty.
        if self.pairs is not None and (len(x) or call.routed is None):
            self.pairs(name, x, h, call.batch, call.lengths())
        call.pending.discard(name)
        if not call.pending:
            call.rows = None

    def _add_moments(self, moments: MomentSums, name: str, call: _Call, x: Tensor, h: Tensor) -> None:
        if not call.summed:
            with _named(f"an activation of layer {name!r}", call.batch):
                moments.add_inputs(call.members, x)
            call.summed = True
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


def _modified(name: str) -> RuntimeError:
    return RuntimeError(
        f"The input of layer {name!r} was modified in place after the layer read it, so its statistics would be "
        "wrong. Make the modification out of place, or add the layer to `exclude`."
    )


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
