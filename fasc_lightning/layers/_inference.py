"""Forward passes without gradients: the matrix products with as few operations around them as possible.

Reading the weights of a small layer for one token takes some tens of microseconds. Calling a child module takes a few,
and a compressed layer has two children. So if no one could notice the difference, the children's weights are used
without a call: `benchmarks/inference.py` measures the remaining gain.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.jit import is_scripting
from torch.nn.modules import module as _module

#: Tokens from which a pass over all outputs costs more than the call that makes it.
MANY_TOKENS = 64

#: Tokens from which gather is faster than index_select in 16-bit dtypes.
FEW_TOKENS = 8


def may_be_direct(x: Tensor, *children: nn.Module | None) -> bool:
    """Tell whether a forward pass of ``x`` may use the weights of linear children without calling the children.

    It may not if anything else acts on a call: autograd, autocast, compilers and tracers, function transforms, hooks,
    adapters, and weights that are quantised or offloaded.
    """
    if (
        torch.is_grad_enabled()
        or type(x) is not Tensor
        or not x.is_cpu  # not measured on other devices
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
            or "forward" in child.__dict__  # accelerate's forward, which fetches offloaded weights
        ):
            return False
    return True


def weight_and_bias(child: Any) -> tuple[Tensor, Tensor | None]:
    """Return the parameters of a child that passed :func:`may_be_direct`, in a tenth of an attribute look-up's time."""
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
    if x.numel() == factor_in.shape[1] and multiplies_vectors(x.dtype):
        y = affine(factor_out, torch.mv(factor_in, x.reshape(-1)), bias)
        return y.view(*x.shape[:-1], len(factor_out))
    return F.linear(F.linear(x, factor_in), factor_out, bias)


@cache
def multiplies_vectors(dtype: torch.dtype) -> bool:
    """Tell whether a product of a matrix and a vector is at least as fast as F.linear for one token.

    It has less overhead, and in float32 the same kernel. In 16-bit dtypes it has a kernel of its own: 1.4 times as fast
    as F.linear on a CPU with matrix units (AMX), whose tiles one token leaves empty; 0.5 to 0.85 times on one without.
    """
    return dtype.itemsize >= 4 or torch.cpu._is_amx_tile_supported()


def affine(weight: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
    """Return the outputs (m,) for one token (n,), as F.linear does."""
    return torch.mv(weight, x) if bias is None else torch.addmv(bias, weight, x)


def pivot_rows(
    x: Tensor,
    basis: Tensor,
    coefficients: Tensor,
    pivot_bias: Tensor | None,
    bias: Tensor | None,
    permutation: Tensor,
) -> Tensor:
    """Return the outputs of a layer that keeps rows: z = W_p x and T z, reordered.

    Args:
        x: Inputs (..., n).
        basis: W_p (k, n).
        coefficients: T (m - k, k).
        pivot_bias: Bias of z (k,), added after T has read z; None without biases.
        bias: Bias of T z (m - k,), or None.
        permutation: Position of each output in [z, T z] (m,).

    Returns:
        Shape (..., m).
    """
    n, shape = basis.shape[1], (*x.shape[:-1], len(permutation))
    if x.numel() == n and multiplies_vectors(x.dtype):
        z = torch.mv(basis, x.reshape(-1))
        rest = affine(coefficients, z, bias)
        parts = torch.cat((z if pivot_bias is None else z.add_(pivot_bias), rest))
        return parts.index_select(0, permutation).view(shape)
    z = F.linear(x.reshape(-1, n), basis)
    rest = F.linear(z, coefficients, bias)
    if pivot_bias is not None:
        z += pivot_bias
    return permute_columns(torch.cat((z, rest), 1), permutation).view(shape)


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
    # The sum is in place, because the permuted inputs are a copy.
    k, n = coefficients.shape[0], len(permutation)
    if x.numel() == n and multiplies_vectors(x.dtype):
        z, rest = x.reshape(-1).index_select(0, permutation).tensor_split((k,))
        y = affine(basis, z.addmv_(coefficients, rest), bias)
    else:
        z, rest = permute_columns(x.reshape(-1, n), permutation).tensor_split((k,), 1)
        y = F.linear(z.addmm_(rest, coefficients.t()), basis, bias)
    return y.view(*x.shape[:-1], len(basis))


def is_eager(x: Tensor) -> bool:
    """Tell whether operations on x run at once or are compiled, and are not traced by TorchScript or fx."""
    return torch.compiler.is_compiling() or (type(x) is Tensor and not torch._C._is_tracing())


def permute_features(x: Tensor, index: Tensor, eager: bool) -> Tensor:
    """Return the features of x (..., d) in the order of index (d,), as a new tensor.

    Traced and scripted code must not depend on the sizes of an example, so it has the same operations for every size
    and any number of dimensions. If operations run at once (``eager``), x has two dimensions, and
    :func:`permute_columns` does the work.
    """
    if not is_scripting():  # noqa: SIM102 # TorchScript would compile the rest of a joint condition
        if eager:
            return permute_columns(x, index)
    # Two dimensions take a sixth of the time of three.
    return x.reshape(-1, index.shape[0]).index_select(1, index).view_as(x)


def permute_columns(x: Tensor, index: Tensor) -> Tensor:
    """Return the columns of x (N, d) in the order of index (d,), as a new tensor.

    On the CPU, index_select runs on one thread. It takes the time of three copies in float32 and of 30 in 16 bits.
    gather runs on all threads, and takes the time of six copies on one. Its gradient is slower.
    """
    # A compiled or exported program must not depend on the number of tokens of its example.
    if torch.compiler.is_compiling() or not x.is_cpu:
        return x.index_select(1, index)
    tokens = x.shape[0]
    forward_only = not (x.requires_grad and torch.is_grad_enabled())
    if forward_only and x.dtype.itemsize == 2 and tokens >= FEW_TOKENS:
        # Integers of the same size take three quarters of the time.
        return x.view(torch.int16).gather(1, index.long().expand(tokens, -1)).view(x.dtype)
    if tokens < MANY_TOKENS:
        return x.index_select(1, index)
    if forward_only and torch.get_num_threads() > 1:
        return x.gather(1, index.long().expand(tokens, -1))
    return x.index_select(1, index.long())  # int32 indices take a third more time
