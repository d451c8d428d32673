"""Hooks that turn a backward pass into token matrices (x, h).

A tap is a forward hook on a layer that puts a *tensor* hook on the layer's output. A tensor hook fires exactly once for
each backward pass through the output. This also holds under both kinds of gradient checkpointing, where forward hooks
run twice. Unlike module backward hooks, it allows the output to be modified in place (pytorch#61519).
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

#: Called with a layer's name, its counted inputs x (tokens, n), the unscaled gradients h (tokens, m) of the batch's
#: loss at its outputs, the batch, the count of tokens of each sequence, and, if the taps have them, the gradients g
#: (tokens, n) at its inputs.
Pairs = Callable[..., None]


class _SavedInput(torch.autograd.Function):
    """A node that saves a layer's input as the layer's own backward node does; no backward pass ever runs it.

    Mechanisms that handle saved tensors (gradient checkpointing recomputes them, ``save_on_cpu`` moves them) handle
    this one, too, so taps hold no more than the graph does. A plain reference would hold what checkpointing means to
    free.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return anchor.detach()


def _save(x: Tensor, anchor: Tensor) -> Callable[[], Tensor]:
    """Return a function that gives ``x`` back during a backward pass, at most once in each.

    Args:
        x: A layer's input.
        anchor: Any tensor that requires a gradient, so that autograd keeps a node.

    Returns:
        A function without arguments. It raises a RuntimeError if ``x`` was modified in place in the meantime.
    """
    if x.is_inference():  # autograd does not save inference tensors
        return lambda: x
    node: Any = _SavedInput.apply(x.detach(), anchor).grad_fn
    return lambda: node.saved_tensors[0]


@dataclass(eq=False)
class _Call:
    """One input tensor and the layers that share it.

    Attributes:
        source: The tensor; weak, since only its identity matters.
        leading: Its shape without features.
        batch: The batch: which tokens count, and how gradients are scaled.
        members: The layers that read the tensor.
        pending: The members whose gradient has not been counted.
        rows: The tensor's counted tokens, shape (tokens, n), from the first gradient until ``pending`` is empty: a view
            if all tokens count, otherwise a copy.
        version: Version of ``rows``; a view shares it with the tensor, so it shows modifications in place.
        counted: Whether a gradient has arrived: layers that read the tensor later make a new call.
        summed: Whether the rows are in the moments.
        gradients: Sum of the gradients of several backward passes, by layer.
        unannounced: The same sum of passes that were not announced, for batches without announced passes.
        saved: Functions that give the input back, by layer.
        inner: The members whose gradient at the input arrives after the one at the output.
        late: Gradients at the outputs of members whose gradient at the input is still missing, by layer.
        routed: For an expert's input: the indices of its counted rows, and the count of rows of each sequence.
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
    inner: set[str] = field(default_factory=set)
    late: dict[str, Tensor] = field(default_factory=dict)
    routed: tuple[Tensor, list[int]] | None = None

    def select(self, values: Tensor) -> Tensor:
        """Return the counted rows of a tensor with the input's tokens."""
        if self.routed is None:
            return _rows(values, self.batch)
        return values.detach().index_select(0, self.routed[0])

    def lengths(self) -> list[int]:
        """Return the count of counted tokens of each sequence."""
        return self.batch.lengths(self.leading) if self.routed is None else self.routed[1]

    def take_rows(self, name: str) -> Tensor | None:
        """Return the counted rows of the input; None if the input was modified in place after the layer read it.

        The tensor that the layer saved is freed.
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
        """Add a layer's gradient from one of several backward passes."""
        sums = self.gradients if announced else self.unannounced
        # A copy: autograd may write into a gradient that it has passed to a hook.
        sums[name] = h.clone() if name not in sums else sums[name] + h


class Taps:
    """Hooks on layers that pass rows to moments and pairs between ``begin_batch`` and ``end_batch``.

    Forwards outside of a batch, or without gradients, are not touched. A layer's token counts once its gradient has
    arrived.

    The caller decides which gradients belong to the loss. By default every backward pass through the layers counts, and
    each call of a layer is counted with the first pass. If the caller announces backward passes (``begin_backward``,
    ``end_backward``), the gradients of other passes are skipped: a training step may differentiate for other reasons
    (``torch.autograd.grad``). If several backward passes may go through one call, their gradients are summed, and the
    call is counted at the end of the batch. A training step that calls ``loss.backward()`` itself announces none; then
    all of its passes count.

    Args:
        layers: The layers by name.
        moments: Receives the rows of inputs and gradients; None for no moments. With moments, faulty data raise an
            error.
        pairs: Called with each layer's inputs and gradients once both have arrived.
        anchor: Whether layers with nothing trainable before them get a gradient, too; the backward pass then goes down
            to them. Otherwise they are skipped, and the fit computes the same as without taps.
        inputs: Whether ``pairs`` also gets the gradients at the layers' inputs. Autograd computes them for the layers
            before; they need no product W^T h, and no gathered weight. Inputs without a gradient, experts, half
            precision and sums of several backward passes have none.

    Attributes:
        called: The layers that ran in some batch.
        reached: The layers that got a gradient in some batch.
        unannounced: Whether a batch was counted by backward passes that were not announced.
    """

    def __init__(
        self,
        layers: dict[str, nn.Module],
        moments: MomentSums | None = None,
        pairs: Pairs | None = None,
        anchor: bool = True,
        inputs: bool = False,
    ) -> None:
        self.layers = layers
        self.moments = moments
        self.pairs = pairs
        self.anchor = anchor
        self.inputs = inputs
        #: Whether hooks are on the model.
        self.installed = False
        self.called: set[str] = set()
        self.reached: set[str] = set()
        self.unannounced = False
        self._experts = ExpertTaps(layers)
        self._undo = Undo()
        self._batch: TokenRows | None = None
        self._backwards = Backwards()
        self._open = False  # whether an announced backward pass is running
        self._announced = False  # whether this batch has announced one
        self._announces = False  # whether some batch has
        self._calls: list[_Call] = []  # calls with a gradient
        # Weak: a call belongs to the graph whose hooks hold it. The graph that checkpointing recomputes is freed
        # without a backward pass of its own, and its inputs must be freed with it.
        self._by_input: WeakValueDictionary[int, _Call] = WeakValueDictionary()
        self._entered: dict[str, tuple[Tensor, Tensor]] = {}  # a running layer's input and the view that replaces it
        # Added to outputs that require no gradient because everything before them is frozen. Autograd then carries
        # the gradient down to them without computing any weight's.
        self._anchor = torch.zeros((), requires_grad=True)

    def install(self) -> None:
        """Register the hooks."""
        if self.installed:
            return
        self.installed = True
        self._experts.install(self._undo)
        for name, module in self.layers.items():
            if self.inputs and not isinstance(module, ExpertLinear):
                self._undo.hook(module.register_forward_pre_hook, ForwardHook(self._on_entry, name), with_kwargs=True)
            self._undo.hook(module.register_forward_hook, ForwardHook(self._on_forward, name), with_kwargs=True)

    def remove(self) -> None:
        """Remove all hooks; safe at any time and any number of times."""
        self._undo.close()
        self.installed = False
        if self.moments is not None:
            self.moments.drop()  # rows of a batch that did not end, whose error is raised elsewhere
        self._forget_batch()

    def begin_batch(self, rows: TokenRows, backwards: Backwards | None = None) -> None:
        """Start counting: the next forwards belong to the batch of ``rows``.

        Args:
            rows: Which tokens count, and how gradients are scaled.
            backwards: Which backward passes count; by default each one, once for each call of a layer.
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
        """Stop counting, and correct inputs whose gradient reached only some of the layers that share them."""
        try:
            for call in self._calls:
                self._add_summed(call)
                for name, h in call.late.items():  # a backward pass that stopped at the layer
                    if call.rows is not None:
                        self._add(name, call, call.rows, h)
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
        self._entered.clear()

    def settle(self) -> None:
        """Wait until the moments hold all rows that have been counted so far.

        Raises:
            FloatingPointError: If some rows are not finite, and the moments had not raised it yet.
        """
        if self.moments is not None and self._batch is not None:
            with _named("a number", self._batch):
                self.moments.settle()

    def _on_entry(
        self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Give the layer a view of its input: the view's gradient is the layer's own, without that of other layers."""
        if self._batch is None or not torch.is_grad_enabled() or self._backwards.several or not args:
            return None
        x = args[0]
        wide = x.dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled(x.device.type)
        if not x.requires_grad or not wide:
            return None
        view = x.view_as(x)
        self._entered[name] = x, view
        return (view, *args[1:]), kwargs

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
        before, view = self._entered.pop(name, (None, None))
        if before is not None and view is x:
            x = before
        call = self._call(name, x, routing)
        if view is not None and x is before:
            call.inner.add(name)
            view.register_hook(partial(self._on_input_gradient, name, call))
        # Each layer saves its input, shared or not: checkpointing counts the saved tensors, and must find the same
        # count when it recomputes some of the layers that share one.
        call.saved[name] = _save(x, self._anchor)
        output.register_hook(partial(self._on_gradient, name, call))
        return anchored

    def _call(self, name: str, x: Tensor, routing: Routing | None = None) -> _Call:
        """Return the call of ``x``: the same tensor object is the same input."""
        assert self._batch is not None
        call = self._by_input.get(id(x))
        # An id may be used again once its tensor is freed. A layer that reads the same tensor twice sees its tokens
        # twice.
        if call is None or call.source() is not x or name in call.members or call.counted:
            call = _Call(weakref.ref(x), tuple(x.shape[:-1]), self._batch)
            if routing is not None:
                call.routed = self._batch.routed(routing.tokens, routing.total)
            else:
                self._batch.index(call.leading, x.device)  # in the order of the forward: later layers use it
            self._by_input[id(x)] = call
        call.members.append(name)
        call.pending.add(name)
        return call

    @torch.no_grad()
    def _on_gradient(self, name: str, call: _Call, gradient: Tensor) -> None:
        how = self._backwards
        announced = self._open or not how.announced
        if call.batch is not self._batch or name not in call.pending:
            return  # from an earlier batch, or counted already
        if not announced and (self._announces or not how.several):
            return
        x = call.take_rows(name)
        if x is None:
            if self.moments is None:
                return  # the true input is lost
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
            if name in call.inner:
                call.late[name] = h
            else:
                self._add(name, call, x, h)
            return
        if announced and self.moments is not None and not torch.isfinite(h).all():  # before an optimizer steps on it
            with _named(f"a gradient of layer {name!r}", call.batch):
                raise FloatingPointError
        call.add_gradient(name, h, announced)

    @torch.no_grad()
    def _on_input_gradient(self, name: str, call: _Call, gradient: Tensor) -> None:
        """Count a call whose gradient at the output has arrived before."""
        if call.batch is not self._batch or call.batch.overflowed or name not in call.late:
            return
        assert call.rows is not None  # rows stay until the layer is counted
        self._add(name, call, call.rows, call.late.pop(name), call.select(gradient))

    def _add_summed(self, call: _Call) -> None:
        """Count a call with the gradients of all backward passes of its batch."""
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

    def _add(self, name: str, call: _Call, x: Tensor, h: Tensor, g: Tensor | None = None) -> None:
        """Pass one layer's rows of one call to the moments and the pairs."""
        self.reached.add(name)
        if self.moments is not None:
            self._add_moments(self.moments, name, call, x, h)
        # An expert with nothing but padding did not run; a batch of nothing but padding did, and is reported as empty.
        if self.pairs is not None and (len(x) or call.routed is None):
            self.pairs(name, x, h, call.batch, call.lengths(), *(() if g is None else (g,)))
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
        """Return W x or W^T h of each token if a side is projected; otherwise None."""
        side = moments.projects(name)
        if side is None:
            return None
        W = whole(linear_weight(self.layers[name])).detach()
        rows, W = (x, W.T) if side == "inputs" else (h, W)
        if rows.dtype != W.dtype:
            return input_gradient(rows, W)
        # In the weight's type, as in the model's own passes: twice as fast in bfloat16 on a CPU, more on other devices.
        with torch.autocast(rows.device.type, enabled=False):
            return rows @ W


def _modified(name: str) -> RuntimeError:
    return RuntimeError(
        f"The input of layer {name!r} was modified in place after the layer read it, so its statistics would be "
        "wrong. Make the modification out of place, or add the layer to `exclude`."
    )


@contextmanager
def _named(what: str, rows: TokenRows) -> Iterator[None]:
    """Add to errors of refused numbers where the numbers come from."""
    try:
        yield
    except FloatingPointError as error:
        what = error.what if isinstance(error, RowsRefusedError) else what
        raise FloatingPointError(
            f"Expected finite numbers but {what} is NaN or Inf in {rows.label}. The batch was refused. Check the data "
            "and the learning rate; under float16 use bf16, or a GradScaler with a smaller `init_scale`."
        ) from error


def _version(values: Tensor) -> int:
    """Return the count of modifications of a tensor; 0 for inference tensors, which have none."""
    return 0 if values.is_inference() else values._version


def _rows(values: Tensor, rows: TokenRows) -> Tensor:
    """Return the counted tokens of (..., d) activations or gradients as rows (tokens, d), a view if all count."""
    index = rows.index(tuple(values.shape[:-1]), values.device)
    flat = values.detach().reshape(-1, values.shape[-1])
    return flat if index is None else flat.index_select(0, index)
