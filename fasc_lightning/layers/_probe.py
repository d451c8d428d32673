"""Trial of a layer's forward: whether it computes y = W x + b and nothing else.

Subclasses of ``nn.Linear`` with a forward of their own may write the same map another way (Falcon's), count their
calls, or compute something else (scaled, masked, quantised, adapted). Only numbers can tell. The layer itself never
runs. A stand-in with small random weights runs in its place, so no hook fires, no state changes, and the layer's
weights may be anywhere.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from transformers.pytorch_utils import Conv1D

from fasc_lightning._utils import same_rng
from fasc_lightning.layers._reparametrised import computed_weight, is_reparametrised
from fasc_lightning.layers._shell import shell

#: (outputs, inputs) of a stand-in; unequal, so that a transposed weight does not fit.
SMALL = 10, 12
#: Leading shapes of the inputs; the forward must accept one, and be right for each that it accepts.
LEADING = ((6,), (2, 3), (2, 1, 3))
#: Largest error relative to the largest output of a token. Half-precision rounding inside of a forward exceeds it.
TOLERANCE = 1e-5
#: Largest error if the layer's own dtype, or its products, may have half precision.
ROUGH = 0.05
#: Attributes that hold sizes: 0 for outputs, 1 for inputs.
_SIZES = {"out_features": 0, "in_features": 1, "nf": 0, "nx": 1}


def is_plain_linear(module: nn.Module) -> bool:
    """Tell whether a module is a dense linear layer that can be tapped and replaced.

    Subclasses must compute the plain map in training and in eval mode (:func:`computes_plain_map`). Others (scaled,
    ternary, adapted) do not count.
    """
    if not holds_dense_weight(module):
        return False
    inherited = type(module).forward in (nn.Linear.forward, Conv1D.forward)
    return (inherited and _own_forward(module) is not None) or computes_plain_map(module)


def holds_dense_weight(module: nn.Module) -> bool:
    """Tell whether a module is a linear layer, of any class, with one floating-point number for each weight."""
    weight = _weight(module) if isinstance(module, nn.Linear | Conv1D) else None
    if not isinstance(weight, Tensor) or is_lazy(weight):
        return False
    # Packed quantised layers are subclasses of nn.Linear; their weight is bytes in another shape.
    return weight.ndim == 2 and weight.is_floating_point() and tuple(weight.shape) in _weight_shapes(module)


def _weight(module: nn.Module) -> Any:
    """Return a layer's weight, stored or computed; the read changes nothing."""
    return computed_weight(module) if is_reparametrised(module) else getattr(module, "weight", None)


def _weight_shapes(module: nn.Module) -> set[tuple[int, int]]:
    if isinstance(module, nn.Linear):
        return {(module.out_features, module.in_features)}
    assert isinstance(module, Conv1D)
    return {(module.nx, module.nf)}


def computes_plain_map(module: nn.Module) -> bool:
    """Tell whether a linear layer's forward gives W x + b for any W, b and x, in training and in eval mode.

    Args:
        module: A layer that passes :func:`holds_dense_weight`, on any device; it does not run. A layer with parameters
            besides weight and bias, which a replacement would lose, fails.
    """
    extra = {name for name, _ in module.named_parameters() if not name.startswith("parametrizations.")}
    forward = _own_forward(module)
    if extra - {"weight", "bias"} or forward is None or not _takes_inputs_alone(forward):
        return False
    conv = not isinstance(module, nn.Linear)
    m, n = tuple(_weight(module).shape)[:: -1 if conv else 1]
    sizes = min(m, SMALL[0]), min(n, SMALL[1])
    found = _agrees(module, forward, sizes)
    # A layer with sizes of its own (a mask, a number of groups) can only be tried at its true size.
    return bool(_agrees(module, forward, (m, n)) if found is None and sizes != (m, n) else found)


def _own_forward(module: nn.Module) -> Callable[..., Any] | None:
    """Return the function that a call of the module runs, unbound; None if the instance has another one.

    accelerate sets a forward on the instance that fetches offloaded weights and calls the module's own.
    """
    own: Any = vars(module).get("forward")
    if own is not None and "_hf_hook" in vars(module):
        own = vars(module).get("_old_forward")
    if own is None:
        return type(module).forward
    return own.__func__ if isinstance(own, MethodType) and own.__self__ is module else None


def _takes_inputs_alone(forward: Callable[..., Any]) -> bool:
    """Tell whether a forward takes the inputs alone: a caller may use other arguments, which a replacement lacks."""
    code = getattr(forward, "__code__", None)
    return code is None or (code.co_argcount <= 2 and code.co_kwonlyargcount == 0)


def _agrees(module: nn.Module, forward: Callable[..., Any], sizes: tuple[int, int]) -> bool | None:
    """Tell whether a stand-in of (m, n) weights computes the plain map; None if it cannot be made or run."""
    own = _weight(module).dtype
    found: dict[torch.dtype, bool | None] = {}
    for dtype in (torch.float32, torch.float64):  # float32 products may be set to round; some forwards take one dtype
        found[dtype] = _agrees_in(module, forward, sizes, dtype, TOLERANCE)
        if found[dtype]:
            return True if dtype == own else _agrees_in(module, forward, sizes, own, ROUGH)  # outputs in its own dtype
    return None if None in found.values() else False


def _agrees_in(
    module: nn.Module, forward: Callable[..., Any], sizes: tuple[int, int], dtype: torch.dtype, tolerance: float
) -> bool | None:
    generator = torch.Generator().manual_seed(0)
    found: list[bool] = []
    with torch.inference_mode(False), torch.no_grad(), torch.autocast("cpu", enabled=False), torch.device("cpu"):
        try:
            stand_in = _stand_in(module, sizes, dtype, generator)
        except Exception:  # a copy of the user's class may raise anything
            return None
        W, b = _values(stand_in)
        for training in (True, False):
            stand_in.train(training)
            for leading in LEADING:
                x = torch.randn(*leading, sizes[1], generator=generator, dtype=torch.float64)
                # Several magnitudes, which a forward that clips, rounds or normalises would not keep.
                x = (x * torch.logspace(-3, 3, leading[-1], dtype=torch.float64)[:, None]).to(dtype)
                try:
                    with _no_traces(type(stand_in)):
                        y = forward(stand_in, x.clone())
                except Exception:  # the user's code may raise anything; it does not accept these inputs
                    continue
                expected = x.double() @ W.double().T + (0 if b is None else b.double())
                found.append(_same(y, expected, dtype, tolerance))
    return all(found) if found else None


@contextmanager
def _no_traces(kind: type) -> Iterator[None]:
    """Undo the changes of a forward outside of its module: generators, and attributes of its classes (counters)."""
    before = [(part, dict(vars(part))) for part in kind.__mro__ if issubclass(part, nn.Linear | Conv1D)]
    with same_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            for part, attributes in before:
                for name in [name for name, value in vars(part).items() if attributes.get(name) is not value]:
                    if name in attributes:
                        setattr(part, name, attributes[name])
                    else:
                        delattr(part, name)


def _same(y: Any, expected: Tensor, dtype: torch.dtype, tolerance: float) -> bool:
    if not isinstance(y, Tensor) or y.shape != expected.shape or y.dtype != dtype or y.is_meta:
        return False
    errors = (y.double() - expected).abs().amax(-1)
    return bool((errors <= tolerance * expected.abs().amax(-1)).all())  # NaN compares false


def _values(stand_in: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Return copies of W (m, n) and b (m,), because a forward may change them."""
    weight, bias = stand_in._parameters["weight"], stand_in._parameters["bias"]
    assert weight is not None
    W = weight if isinstance(stand_in, nn.Linear) else weight.T
    return W.clone(), None if bias is None else bias.clone()


def _stand_in(module: nn.Module, sizes: tuple[int, int], dtype: torch.dtype, generator: torch.Generator) -> nn.Module:
    """Return a module of the same class and state with other weights, of (m, n) numbers, on the CPU, without hooks."""
    stand_in: Any = shell(module)
    # Copies of everything that a forward might change, except the weights.
    memo: dict[int, Any] = {id(p): p for p in module.parameters()} | {id(module): stand_in}
    vars(stand_in).update(copy.deepcopy(vars(stand_in), memo))
    for part in stand_in.modules():
        for name in [name for name in vars(part) if name.endswith("_hooks")]:
            vars(part)[name].clear()
        for holder in (vars(part), part._buffers):
            for name, value in list(holder.items()):
                if isinstance(value, Tensor):  # values on the meta device are unknown; one changes least
                    holder[name] = torch.ones_like(value, device="cpu") if value.is_meta else value.cpu()
    m, n = sizes
    for name, side in _SIZES.items():
        if name in vars(stand_in):
            vars(stand_in)[name] = sizes[side]
    W = torch.randn(m, n, generator=generator, dtype=torch.float32) / n**0.5
    weight = (W if isinstance(module, nn.Linear) else W.T.contiguous()).to(dtype)
    stand_in._parameters["weight"] = nn.Parameter(weight, requires_grad=False)
    bias = None
    if getattr(module, "bias", None) is not None:
        bias = nn.Parameter(torch.randn(m, generator=generator, dtype=torch.float32).to(dtype), requires_grad=False)
    stand_in._parameters["bias"] = bias
    return stand_in
