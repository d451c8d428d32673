"""Forward passes without gradients: straight to the matrix products, and every output written once.

Reading the weights of a small layer for one token takes some tens of microseconds, and calling a child module takes a
few of them; a compressed layer has two children. So where nobody could tell the difference, their weights are used
without calling them, and with few operations: `benchmarks/inference.py` measures what is left of the gain.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as _module

#: Tokens from which a pass over all outputs costs more than the call that makes it.
MANY_TOKENS = 64


def may_be_direct(x: Tensor, first: nn.Module | None, second: nn.Module | None) -> bool:
    """Tell whether a forward pass of ``x`` may use the weights of two children without calling the children.

    It may not where somebody else has a say in what a call does: autograd, autocast, compilers and tracers, function
    transforms, hooks, adapters, and weights that are quantised or offloaded.
    """
    return (
        not torch.is_grad_enabled()
        and type(x) is Tensor
        and x.is_cpu  # nothing was measured elsewhere
        and _is_plain(first)
        and _is_plain(second)
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and not torch._C._are_functorch_transforms_active()
        and not (_module._global_forward_hooks or _module._global_forward_pre_hooks)
    )


def _is_plain(child: nn.Module | None) -> bool:
    """Tell whether a child is a linear layer and nothing else."""
    return (
        type(child) is nn.Linear
        and type(child._parameters.get("weight")) is nn.Parameter
        and not (child._forward_hooks or child._forward_pre_hooks)
        and "forward" not in child.__dict__  # where accelerate puts the one that fetches offloaded weights
    )


def weight_and_bias(child: Any) -> tuple[Tensor, Tensor | None]:
    """Return the parameters of a plain linear layer; the attributes would be looked up ten times as slowly."""
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
        return y.view(*x.shape[:-1], factor_out.shape[0])
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
        x: Inputs (N, n).
        basis: W_p (k, n).
        coefficients: T (m - k, k).
        pivot_bias: Bias of z (k,), added once T has read z; None without biases.
        bias: Bias of T z (m - k,), or None.
        permutation: Position of each output in [z, T z] (m,).

    Returns:
        Shape (N, m).
    """
    tokens = x.shape[0]
    if tokens == 1:
        z = torch.mv(basis, x.view(-1))
        rest = affine(coefficients, z, bias)
        parts = torch.cat((z if pivot_bias is None else z + pivot_bias, rest))
        return parts.index_select(0, permutation).view(1, -1)
    if tokens < MANY_TOKENS:
        z = F.linear(x, basis)
        rest = F.linear(z, coefficients, bias)
        parts = torch.cat((z if pivot_bias is None else z + pivot_bias, rest), 1)
        return permute_columns(parts, permutation)
    # Both products are written where they belong.
    parts = x.new_empty(tokens, len(permutation))
    k = len(basis)
    z = parts[:, :k]
    torch.mm(x, basis.t(), out=z)
    if bias is None:
        torch.mm(z, coefficients.t(), out=parts[:, k:])
    else:
        torch.addmm(bias, z, coefficients.t(), out=parts[:, k:])
    if pivot_bias is not None:
        z += pivot_bias
    return permute_columns(parts, permutation)


def pivot_columns(x: Tensor, basis: Tensor, coefficients: Tensor, bias: Tensor | None, permutation: Tensor) -> Tensor:
    """Return the outputs of a layer that keeps columns: W_c (x_p + T x_rest).

    Args:
        x: Inputs (N, n).
        basis: W_c (m, k).
        coefficients: T (k, n - k).
        bias: Shape (m,), or None.
        permutation: Input at each position of [x_p, x_rest] (n,).

    Returns:
        Shape (N, m).
    """
    # The sum is made in place: the permuted inputs are a copy of our own.
    k = coefficients.shape[0]
    if x.shape[0] == 1:
        z, rest = x.view(-1).index_select(0, permutation).tensor_split((k,))
        z.addmv_(coefficients, rest)
        return affine(basis, z, bias).view(1, -1)
    z, rest = permute_columns(x, permutation).tensor_split((k,), 1)
    return F.linear(z.addmm_(rest, coefficients.t()), basis, bias)


def permute_columns(x: Tensor, index: Tensor) -> Tensor:
    """Return the columns of x (N, d) in the order of index (d,), as a new tensor.

    On the CPU index_select runs on one thread and takes the time of two copies; gather runs on all, at half the speed,
    and is the faster of the two for 16-bit types. Its gradient is the slower one.
    """
    if x.shape[0] < MANY_TOKENS or not x.is_cpu:
        return x.index_select(1, index)
    forward_only = not (x.requires_grad and torch.is_grad_enabled())
    if forward_only and (x.dtype.itemsize < 4 or torch.get_num_threads() > 1):
        return x.gather(1, index.long().expand_as(x))
    return x.index_select(1, index.long())  # int32 indices are half as fast
