"""A linear layer with a weight of 2, 3, 4 or 8 bits, under the names and in the shapes of compressed-tensors.

Its entries in a file of weights are as in the format `pack-quantized`, so other libraries read them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Self

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from fasc_lightning.layers._grid import SCALE_DTYPE, Grid, Rounded, words
from fasc_lightning.layers._packed_codes import (
    Packing,
    codes_of,
    dense_blocks,
    kernel_pack,
    kernel_takes,
    pack,
    row_blocks,
    unpack,
    zeros_of,
)

#: Tokens up to which the int4 kernel is faster than the product with the dense blocks.
KERNEL_TOKENS = 64


class PackedLinear(nn.Module):
    """y = W x + b with W[i, j] = scale[i, g(j)] (code[i, j] - zero[i, g(j)]), codes and zero points of few bits.

    g(j) is the group of input j. The codes are not trained. Gradients pass through them to the input, and to the scales
    after :meth:`widen_scales`.

    The scales keep their type when the layer is converted (``.to(dtype)``, ``.half()``): each of their values is exact
    in wider types, so a conversion to float32 would only double their bytes, and one to float16 could change weights.

    Args:
        in_features: n.
        out_features: m.
        grid: The grid of the weight.
        bias: Whether there is a bias, which is not rounded.
        device: Device of the tensors.
        dtype: Dtype of ``bias``, which counts as the layer's.

    Attributes:
        weight_packed: The codes, parameter without gradient, int32, (m, words(n, bits)); None after :meth:`prepare`.
        weight_scale: The scales, parameter, (m, groups), of ``SCALE_DTYPE`` or, if they are trained, of float32.
        weight_zero_point: The zero points packed along the outputs, buffer, int32, (words(m, bits), groups); None for a
            symmetric grid.
        like: Buffer without elements, of the layer's dtype and device; not in the state dict.
        kernel_codes: The codes for the int4 kernel, buffer, bytes, (m, n / 2); None before :meth:`prepare`.
        kernel_scales: Scales and offsets for the int4 kernel, buffer, (groups, m, 2); None before :meth:`prepare`.
    """

    if TYPE_CHECKING:
        weight_packed: nn.Parameter | None
        weight_scale: nn.Parameter
        weight_zero_point: Tensor | None
        bias: nn.Parameter | None
        like: Tensor
        kernel_codes: Tensor | None
        kernel_scales: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        grid: Grid,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.grid = grid
        m, n, groups = out_features, in_features, grid.groups(in_features)
        codes = torch.zeros(m, words(n, grid.bits), dtype=torch.int32, device=device)
        self.weight_packed = nn.Parameter(codes, requires_grad=False)
        scale = torch.zeros(m, groups, dtype=SCALE_DTYPE, device=device)
        self.weight_scale = nn.Parameter(scale, requires_grad=False)
        zero = None if grid.symmetric else torch.zeros(words(m, grid.bits), groups, dtype=torch.int32, device=device)
        self.register_buffer("weight_zero_point", zero)
        values = torch.zeros(m, device=device, dtype=dtype) if bias else None
        self.register_parameter("bias", None if values is None else nn.Parameter(values))
        self.register_buffer("like", torch.empty(0, device=device, dtype=dtype), persistent=False)
        self.register_buffer("kernel_codes", None, persistent=False)
        self.register_buffer("kernel_scales", None, persistent=False)
        self._packing = Packing(m, n, grid.bits, grid.group or n, None)

    @classmethod
    def from_rounded(cls, rounded: Rounded, bias: Tensor | None, dtype: torch.dtype | None = None) -> Self:
        """Return a layer with a rounded weight.

        Args:
            rounded: W, of shape (m, n).
            bias: b, (m,), or None.
            dtype: Dtype of the layer; None for the bias's, or without one for torch's default.

        Raises:
            ValueError: If the shapes do not fit each other, a scale is not finite, or a code or zero point is not one
                of the grid's.
        """
        grid, codes, scale, zero = rounded.grid, rounded.codes, rounded.scale.detach(), rounded.zero
        _check(rounded, bias)
        m, n = codes.shape
        if dtype is None and bias is not None:
            dtype = bias.dtype
        layer = cls(n, m, grid, bias is not None, "meta", dtype)
        layer.weight_packed = nn.Parameter(pack(codes, grid.bits), requires_grad=False)
        layer.weight_scale = nn.Parameter(scale.to(SCALE_DTYPE, copy=True), requires_grad=False)
        if not grid.symmetric:
            layer.weight_zero_point = pack(zero.t(), grid.bits).t().contiguous()
        layer.like = torch.empty(0, dtype=dtype, device=codes.device)
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach().to(dtype, copy=True), bias.requires_grad)
        return layer

    def rounded(self) -> Rounded:
        """Return the matrix W as codes, scales and zero points."""
        packing, packed = self._packing, self._packed()
        scale = self.weight_scale.detach().to(torch.float32, memory_format=torch.contiguous_format)
        return Rounded(
            self.grid,
            codes_of(packed, packing, 0, packing.m),
            scale,
            zeros_of(self.weight_zero_point, packing, scale.device),
        )

    def dequantize(self) -> Tensor:
        """Return the matrix W, (m, n), in float32."""
        return self.rounded().dequantize()

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., n) to (..., m), in the dtype of x, or of autocast."""
        y = packed_product(
            x, self._packed(), self.weight_scale, self.weight_zero_point, self.kernel_scales, self._packing
        )
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def prepare(self) -> bool:
        """Give the codes the form of torch's int4 kernel for CPUs, in place of the stored form.

        The kernel multiplies few tokens of bfloat16 without gradients faster than a dense layer does. All else gives
        the same results as before, in particular the state dict and copies, which have the stored form. The kernel
        rounds (8 - zero) * scale to bfloat16, which changes the weights by 2^-9 of that.

        Returns:
            Whether the layer has that form now. It has not if the kernel does not take its shape or grid, or its scales
            are trained, or the layer is not on a CPU.
        """
        if self.weight_packed is None:
            return True
        scale, packing = self.weight_scale, self._packing
        fits = packing.bits == 4 and kernel_takes(packing.m, packing.n, packing.group)
        if not fits or not scale.is_cpu or scale.dtype != SCALE_DTYPE or scale.requires_grad:
            return False
        codes = unpack(self.weight_packed, packing.bits, packing.n)
        if (found := kernel_pack(codes)) is None:
            return False
        zero = zeros_of(self.weight_zero_point, packing, scale.device)
        offset = (8 - zero.float()) * scale.float()
        self.kernel_scales = torch.stack((scale.t(), offset.t().to(SCALE_DTYPE)), -1).contiguous()
        self.weight_scale = nn.Parameter(self.kernel_scales[..., 0].t(), requires_grad=False)  # of the same memory
        self.kernel_codes, layout = found
        self._packing = packing._replace(layout=layout)
        self.weight_packed = None
        return True

    def unprepare(self) -> None:
        """Give the codes their stored form again."""
        if self.weight_packed is None:
            self.weight_packed = self._stored_codes()
            self.weight_scale = nn.Parameter(self.weight_scale.detach().contiguous(), requires_grad=False)
            self.kernel_codes = self.kernel_scales = None
            self._packing = self._packing._replace(layout=None)

    def widen_scales(self) -> None:
        """Make the scales a trainable parameter of float32."""
        self.unprepare()
        self.weight_scale = nn.Parameter(self.weight_scale.detach().float())

    def narrow_scales(self) -> None:
        """Round the scales to their stored type, and train them no more."""
        self.weight_scale = nn.Parameter(self.weight_scale.detach().to(SCALE_DTYPE), requires_grad=False)

    def extra_repr(self) -> str:
        """Return shape, bias and grid, for ``repr``."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"bits={self.grid.bits}, group={self.grid.group}, symmetric={self.grid.symmetric}"
        )

    def _packed(self) -> Tensor:
        """Return the codes in the form that the layer has."""
        packed = self.kernel_codes if self.weight_packed is None else self.weight_packed
        assert packed is not None
        return packed

    def _stored_codes(self) -> nn.Parameter:
        """Return the codes of a prepared layer in the stored form."""
        codes = codes_of(self._packed(), self._packing, 0, self.out_features)
        return nn.Parameter(pack(codes, self.grid.bits), requires_grad=False)

    @override
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        prepared = self.weight_packed is None
        self.unprepare()
        scale = self.weight_scale

        def keeping(value: Tensor) -> Tensor:
            if value is not scale and value is not scale.grad:
                return fn(value)
            # As integers, the scales move between devices but are not converted.
            integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[value.dtype.itemsize]
            return fn(value.detach().view(integers)).view(value.dtype)

        super()._apply(keeping, recurse)
        if prepared:
            self.prepare()
        return self

    @override
    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        if self.weight_packed is None:
            codes = self._stored_codes()
            destination[f"{prefix}weight_packed"] = codes if keep_vars else codes.detach()
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.weight_packed is None:  # for files, which take no strides
            destination[f"{prefix}weight_scale"] = destination[f"{prefix}weight_scale"].contiguous()

    @override
    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        prepared = self.weight_packed is None
        self.unprepare()
        key = f"{prefix}weight_scale"
        if isinstance(found := state_dict.get(key), Tensor):  # loading by assignment does not convert
            state_dict[key] = found.to(self.weight_scale.dtype)
        super()._load_from_state_dict(state_dict, prefix, *args)
        if prepared:
            self.prepare()

    def __getstate__(self) -> dict[str, Any]:
        """Return the attributes with the stored form of the codes, for copies and for processors of another kind."""
        state = dict(self.__dict__)
        if self.weight_packed is None:
            scale = nn.Parameter(self.weight_scale.detach().contiguous(), requires_grad=False)
            changed = {"weight_packed": self._stored_codes(), "weight_scale": scale}
            state["_parameters"] = {**self._parameters, **changed}
            state["_buffers"] = {**self._buffers, "kernel_codes": None, "kernel_scales": None}
            state["_packing"] = self._packing._replace(layout=None)
        return state


def packed_product(
    x: Tensor, packed: Tensor, scale: Tensor, zero: Tensor | None, kernel_scales: Tensor | None, packing: Packing
) -> Tensor:
    """Return W x; gradients pass to x and scale. One operation in fx graphs, which cannot follow its branches.

    Args:
        x: Inputs (..., n).
        packed: Codes in the form that ``packing`` describes.
        scale: Scales (m, groups).
        zero: Packed zero points (words(m, bits), groups); None if all are the middle code.
        kernel_scales: Scales and offsets of the int4 kernel, or None.
        packing: Shape and kind of the codes.

    Returns:
        Shape (..., m).
    """
    tracing = torch.jit.is_tracing()
    transformed = torch._C._are_functorch_transforms_active()
    # A trace has the gradients of its own operations: TorchScript cannot save Python's autograd functions.
    if torch.is_grad_enabled() and (x.requires_grad or scale.requires_grad or transformed) and not tracing:
        return _Product.apply(x, packed, scale, zero, packing)
    dtype = _product_dtype(x)
    # A trace, or an exported program, must not depend on the number of tokens of its example.
    if kernel_scales is not None and dtype == torch.bfloat16 and not (tracing or transformed or _is_exporting()):
        tokens = x.numel() // packing.n
        if 0 < tokens <= KERNEL_TOKENS:
            flat = x.reshape(tokens, packing.n).to(dtype).contiguous()
            y = torch.ops.aten._weight_int4pack_mm_for_cpu(flat, packed, packing.group, kernel_scales)
            return y.view(*x.shape[:-1], packing.m)
    return _product(x, packed, scale, zero, packing)


torch.fx.wrap("packed_product")


def _product(x: Tensor, packed: Tensor, scale: Tensor, zero: Tensor | None, packing: Packing) -> Tensor:
    """Return W x, by blocks of outputs."""
    dtype = _product_dtype(x)
    x = x.to(dtype)
    parts = [F.linear(x, W) for _, W in dense_blocks(packed, scale, zero, packing, dtype)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


class _Product(torch.autograd.Function):
    """:func:`_product` that keeps the packed codes for its backward pass, instead of a dense weight.

    Forward-mode derivatives raise an error: the compiler cannot trace functions that have them.
    """

    @staticmethod
    def forward(x: Tensor, packed: Tensor, scale: Tensor, zero: Tensor | None, packing: Packing) -> Tensor:
        return _product(x, packed, scale, zero, packing)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        del output
        x, packed, scale, zero, ctx.packing = inputs
        # Only the gradient of the scales reads the inputs.
        ctx.save_for_backward(x if ctx.needs_input_grad[2] else None, packed, scale, zero)
        ctx.dtype = x.dtype

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, Tensor | None, None, None]:
        x, packed, scale, zero = ctx.saved_tensors
        of_x, of_scale = None, None
        if ctx.needs_input_grad[0]:
            of_x = _input_gradient(grad, packed, scale, zero, ctx.packing).to(ctx.dtype)
        if ctx.needs_input_grad[2]:
            of_scale = _scale_gradient(grad, x, packed, scale, zero, ctx.packing)
        return of_x, None, of_scale, None, None


def _input_gradient(grad: Tensor, packed: Tensor, scale: Tensor, zero: Tensor | None, packing: Packing) -> Tensor:
    """Return W^T grad, (..., n), for grad (..., m)."""
    total: Tensor | None = None
    for rows, W in dense_blocks(packed, scale, zero, packing, grad.dtype):
        part = grad[..., rows] @ W
        if len(W) < packing.m:  # half precision would round each partial sum
            part = part.to(torch.promote_types(part.dtype, torch.float32))
        total = part if total is None else total + part
    assert total is not None
    return total


def _scale_gradient(
    grad: Tensor, x: Tensor, packed: Tensor, scale: Tensor, zero: Tensor | None, packing: Packing
) -> Tensor:
    """Return the gradient of each scale: the sum over its group of (code - zero) times the gradient of the weight."""
    inputs, grads = x.to(grad.dtype).reshape(-1, packing.n), grad.reshape(-1, packing.m)
    wide = torch.promote_types(grad.dtype, torch.float32)
    zeros, parts = zeros_of(zero, packing, scale.device), []
    for a, b in row_blocks(packing):
        of_weight = (grads[:, a:b].t() @ inputs).to(wide)
        steps = _by_group(codes_of(packed, packing, a, b).to(wide), packing) - zeros[a:b, :, None].to(wide)
        parts.append((_by_group(of_weight, packing) * steps).sum(-1))
    return torch.cat(parts).to(scale.dtype)


def _by_group(matrix: Tensor, packing: Packing) -> Tensor:
    """Return a matrix (rows, n) as (rows, groups, group), filled up with zeros."""
    return F.pad(matrix, (0, -packing.n % packing.group)).view(len(matrix), -1, packing.group)


def _product_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of a linear layer's output."""
    device = x.device.type
    # The meta device has no autocast.
    cast = device != "meta" and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if cast else x.dtype


def _is_exporting() -> bool:
    exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)  # not in torch before 2.7
    return bool(exporting())


def _check(rounded: Rounded, bias: Tensor | None) -> None:
    """Raise a ValueError unless the parts of a rounded matrix, and the bias, fit each other."""
    grid, codes, scale, zero = rounded.grid, rounded.codes, rounded.scale, rounded.zero
    if codes.ndim != 2 or codes.dtype != torch.uint8 or zero.dtype != torch.uint8:
        raise ValueError(
            f"Expected a matrix of codes and zero points of uint8 but got codes of shape {tuple(codes.shape)} and "
            f"{codes.dtype}, and zero points of {zero.dtype}."
        )
    m, n = codes.shape
    shape = (m, grid.groups(n))
    if scale.shape != shape or zero.shape != shape:
        raise ValueError(
            f"Expected scales and zero points of shape {shape}, one a group of a ({m}, {n}) matrix, but got "
            f"{tuple(scale.shape)} and {tuple(zero.shape)}."
        )
    if bias is not None and bias.shape != (m,):
        raise ValueError(f"Expected a bias of shape ({m},) but got {tuple(bias.shape)}.")
    if not bool(torch.isfinite(scale.to(SCALE_DTYPE)).all()):
        raise ValueError(f"Expected finite scales but those of a ({m}, {n}) matrix hold NaN, infinity or more.")
    if grid.symmetric and not bool((zero == grid.middle).all()):
        raise ValueError(f"Expected zero points of {grid.middle} on a symmetric grid but got others.")
