"""Forward passes without gradients: straight to the matrix products, with few operations around them.

Reading the weights of a small layer for one token takes some tens of microseconds, and calling a child module takes a
few of them; a compressed layer has two children. So where nobody could tell the difference, their weights are used
without calling them: `benchmarks/inference.py` measures what is left of the gain.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.jit import is_scripting
from torch.nn.modules import module as _module

#: Tokens from which a pass over all outputs costs more than the call that makes it.
MANY_TOKENS = 64


def may_be_direct(x: Tensor, *children: nn.Module | None) -> bool:
    """Tell whether a forward pass of ``x`` may use the weights of linear children without calling the children.

    It may not where somebody else has a say in what a call does: autograd, autocast, compilers and tracers, function
    transforms, hooks, adapters, and weights that are quantised or offloaded.
    """
    if (
        torch.is_grad_enabled()
        or type(x) is not Tensor
        or not x.is_cpu  # nothing was measured elsewhere
        or torch.is_autocast_enabled("cpu")
        or torch.compiler.is_compiling()
        or torch._C._is_tracing()
        or torch._C._are_functorch_transforms_active()
        or _module._global_forward_hooks
        or _module._global_forward_pre_hooks
    ):
        return False
    for child in children:
        if (
            type(child) is not nn.Linear
            or type(child._parameters.get("weight")) is not nn.Parameter
            or "bias" not in child._parameters
            or child._forward_hooks
            or child._forward_pre_hooks
            or "forward" in child.__dict__  # where accelerate puts the one that fetches offloaded weights
        ):
            return False
    return True


def weight_and_bias(child: Any) -> tuple[Tensor, Tensor | None]:
    """Return the parameters of a child that :func:`may_be_direct` saw; attributes take ten times as long to look up."""
    parameters = child._parameters
    return parameters["weight"], parameters["bias"]


def two_factors(x: Tensor, factor_in: Tensor, factor_out: Tensor, bias: Tensor | None) -> Tensor:
    """Return the outputs of a layer of two factors.

    Args:
        x: Inputs (..., n).
        factor_in: Shape (k, n).
        factor_out: Shape (m, k).
        bias: Shape (m,), or None.

    Returns:
        Shape (..., m).
    """
    if x.numel() == factor_in.shape[1]:
        y = affine(factor_out, torch.mv(factor_in, x.reshape(-1)), bias)
        return y.view(*x.shape[:-1], len(factor_out))
    return F.linear(F.linear(x, factor_in), factor_out, bias)


def affine(weight: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
    """Return the outputs (m,) for one token (n,): as F.linear, and in bfloat16 1.4 times as fast."""
    return torch.mv(weight, x) if bias is None else torch.addmv(bias, weight, x)


def pivot_rows(
    x: Tensor,
    basis: Tensor,
    coefficients: Tensor,
    pivot_bias: Tensor | None,
    bias: Tensor | None,
    permutation: Tensor,
) -> Tensor:
    """Return the outputs of a layer that keeps rows: z = W_p x and T z, put in order.

    Args:
        x: Inputs (..., n).
        basis: W_p (k, n).
        coefficients: T (m - k, k).
        pivot_bias: Bias of z (k,), added once T has read z; None without biases.
        bias: Bias of T z (m - k,), or None.
        permutation: Position of each output in [z, T z] (m,).

    Returns:
        Shape (..., m).
    """
    n, shape = basis.shape[1], (*x.shape[:-1], len(permutation))
    if x.numel() == n:
        z = torch.mv(basis, x.reshape(-1))
        rest = affine(coefficients, z, bias)
        parts = torch.cat((z if pivot_bias is None else z.add_(pivot_bias), rest))
        return parts.index_select(0, permutation).view(shape)
    z = F.linear(x.reshape(-1, n), basis)
    rest = F.linear(z, coefficients, bias)
    if pivot_bias is not None:
        z += pivot_bias
    return join_columns(z, rest, permutation).view(shape)


def pivot_columns(x: Tensor, basis: Tensor, coefficients: Tensor, bias: Tensor | None, permutation: Tensor) -> Tensor:
    """Return the outputs of a layer that keeps columns: W_c (x_p + T x_rest).

    Args:
        x: Inputs (..., n).
        basis: W_c (m, k).
        coefficients: T (k, n - k).
        bias: Shape (m,), or None.
        permutation: Input at each position of [x_p, x_rest] (n,).

    Returns:
        Shape (..., m).
    """
    # The sum is made in place: the permuted inputs are a copy of our own.
    k, n = coefficients.shape[0], len(permutation)
    if x.numel() == n:
        z, rest = x.reshape(-1).index_select(0, permutation).tensor_split((k,))
        y = affine(basis, z.addmv_(coefficients, rest), bias)
    else:
        z, rest = permute_columns(x.reshape(-1, n), permutation).tensor_split((k,), 1)
        y = F.linear(z.addmm_(rest, coefficients.t()), basis, bias)
    return y.view(*x.shape[:-1], len(basis))


def join_columns(z: Tensor, rest: Tensor, permutation: Tensor) -> Tensor:
    """Return the columns of [z, rest] (N, d) in the order of an index (d,).

    Of many tokens in float32, each part is written where it belongs: half the memory traffic of putting them side by
    side first. Scattering 16-bit numbers is slower than both steps.
    """
    tokens, k = z.shape
    if tokens < MANY_TOKENS or z.dtype.itemsize < 4:
        return permute_columns(torch.cat((z, rest), 1), permutation)
    index = permutation.long()
    places = torch.empty_like(index).scatter_(0, index, torch.arange(len(index), device=index.device))
    y = z.new_empty(tokens, len(index))
    y.scatter_(1, places[:k].expand_as(z), z)
    return y.scatter_(1, places[k:].expand_as(rest), rest)


def is_eager(x: Tensor) -> bool:
    """Tell whether operations on x are run as they are called, or compiled; not traced, by TorchScript or fx."""
    return torch.compiler.is_compiling() or (type(x) is Tensor and not torch._C._is_tracing())


def permute_features(x: Tensor, index: Tensor, eager: bool) -> Tensor:
    """Return the features of x (..., d) in the order of index (d,), as a new tensor.

    What is traced or scripted must not depend on the sizes of an example: then it is the same operations for all, and
    for any number of dimensions. Where they are run as they are called (``eager``), x has two, and the operations are
    those of :func:`permute_columns`.
    """
    if not is_scripting():  # noqa: SIM102 # TorchScript would compile what is beside it in one condition
        if eager:
            return permute_columns(x, index)
    # In two dimensions it takes a sixth of the time that it takes in three.
    return x.reshape(-1, index.shape[0]).index_select(1, index).view_as(x)


def permute_columns(x: Tensor, index: Tensor) -> Tensor:
    """Return the columns of x (N, d) in the order of index (d,), as a new tensor.

    On the CPU index_select runs on one thread and takes the time of two copies; gather runs on all, at half the speed,
    and is the faster of the two for 16-bit types. Its gradient is the slower one.
    """
    # A compiled or exported program must not depend on the number of tokens of its example.
    if torch.compiler.is_compiling() or not x.is_cpu or x.shape[0] < MANY_TOKENS:
        return x.index_select(1, index)
    forward_only = not (x.requires_grad and torch.is_grad_enabled())
    if forward_only and (x.dtype.itemsize < 4 or torch.get_num_threads() > 1):
        return x.gather(1, index.long().expand_as(x))
    return x.index_select(1, index.long())  # int32 indices are half as fast
