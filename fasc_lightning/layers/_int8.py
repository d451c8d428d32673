"""A linear layer whose weight is held as int8, in tensors that every file format and every loader takes.

The numbers are those of torchao's int8 weight-only and dynamic quantisation (symmetric, one scale a row). They are
not held in its tensor subclasses: those need torchao wherever a model is loaded, in a version that still has the
class, and a safetensors file cannot hold them as they are. An int8 tensor and a float one can be saved, sent, moved
and read anywhere.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.fx
from torch import Tensor, nn
from torch.jit import is_scripting
from torch.nn import functional as F

from fasc_lightning.layers._inference import is_eager

#: Half of the 255 steps from -128 to 127.
_HALF_RANGE = 127.5

#: A second int8 number holds what rounding to the first has left, half a step of it at most, in so many steps.
_FINER = 254

#: To how many bits inputs are rounded; None: not at all.
InputBits = Literal[8, 16] | None


class Int8Linear(nn.Module):
    """y = W x + b with W[i, j] = scale[i] weight[i, j], weight of int8: m n bytes and m numbers.

    One scale for each output, since it can then leave the sum over inputs: the int8 numbers go into the matrix product
    as they are, and the product is scaled. The weight is not trained; gradients pass through it to the input, with
    ``input_bits`` as if the input had not been rounded.

    Args:
        in_features: n.
        out_features: m.
        bias: Whether there is a bias, which stays as it is.
        input_bits: 8 rounds the input to int8, with one scale a token, and makes a product of integers: faster than one
            in the input's dtype, and less exact. 16 rounds it to two int8 numbers, for twice that product: for inputs
            of which one is far larger than the rest. None does not round.
        device: Device of the tensors.
        dtype: Dtype of ``scale`` and ``bias``, which stands for the layer's.

    Attributes:
        weight: The parameter of int8, (m, n), without gradient.
        scale: Buffer, (m,).
        rounds_inputs: With ``input_bits``, True: so that a file of weights says which kind of layer they are of.
    """

    if TYPE_CHECKING:  # TorchScript cannot read them
        scale: Tensor
        bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        input_bits: InputBits = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.input_bits: InputBits = input_bits
        weight = torch.zeros(out_features, in_features, dtype=torch.int8, device=device)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_buffer("scale", torch.ones(out_features, device=device, dtype=dtype))
        if input_bits is not None:
            self.register_buffer("rounds_inputs", torch.tensor(True, device=device))
        values = torch.zeros(out_features, device=device, dtype=dtype) if bias else None
        self.register_parameter("bias", None if values is None else nn.Parameter(values))

    @classmethod
    def from_weight(
        cls, weight: Tensor, bias: Tensor | None, input_bits: InputBits = None, dtype: torch.dtype | None = None
    ) -> Int8Linear:
        """Round a weight.

        Args:
            weight: W, (m, n).
            bias: b, (m,), or None.
            input_bits: To what inputs are rounded, if at all.
            dtype: Of the layer; None for that of the weight.

        Raises:
            ValueError: If the weight is not finite.
        """
        m, n = weight.shape
        layer = cls(n, m, bias is not None, input_bits, device="meta")
        rounded, scale = round_rows(weight.detach(), dtype or weight.dtype)
        layer.weight = nn.Parameter(rounded, requires_grad=False)
        layer.scale = scale
        if input_bits is not None:
            layer.rounds_inputs = torch.tensor(True, device=scale.device)
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach().clone(), bias.requires_grad)
        return layer

    def dequantize(self) -> Tensor:
        """The matrix W, (m, n), in the dtype of the scales, and at least in float32."""
        wide = torch.promote_types(self.scale.dtype, torch.float32)
        return self.weight.to(wide) * self.scale.to(wide)[:, None]

    def forward(self, x: Tensor) -> Tensor:
        """Maps (..., n) to (..., m), in the dtype of x, or that of autocast."""
        y = int8_product(x, self.weight, self.scale, self.input_bits)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self) -> str:
        """Shape, bias and kind, for ``repr``."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"input_bits={self.input_bits}"
        )


def int8_product(x: Tensor, weight: Tensor, scale: Tensor, input_bits: int | None) -> Tensor:
    """W x; gradients pass through it to x. One operation in the graphs of fx, to which its branches mean nothing."""
    if not is_scripting():
        # TorchScript cannot save what Python differentiates; a trace has the gradients of its own operations.
        graded = x.requires_grad or torch._C._are_functorch_transforms_active()
        if torch.is_grad_enabled() and graded and not torch.jit.is_tracing():
            return _Product.apply(x, weight, scale, input_bits)
    return _product(x, weight, scale, input_bits)


torch.fx.wrap("int8_product")


def round_rows(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Round each row to int8 with a scale of its own.

    Args:
        weight: (m, n).
        dtype: Of the scales. They are rounded to it first, and the row then by what they became, so that a scale of
            half precision shifts no row as a whole.

    Returns:
        Numbers from -128 to 127, (m, n), and scales, (m,).

    Raises:
        ValueError: If the weight is not finite.
    """
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    scale = _scale(wide).to(dtype)
    if not bool(torch.isfinite(scale).all()):
        raise ValueError(f"Expected finite weights to round but a {tuple(weight.shape)} matrix holds NaN or infinity.")
    return _rounded(wide, scale[:, None].to(wide.dtype)), scale


def _scale(wide: Tensor, half_range: float = _HALF_RANGE, least: float = torch.finfo(torch.float32).eps) -> Tensor:
    """Scale of each row. A row of zeros has one, too. (TorchScript reads constants of defaults alone.)."""
    return (wide.abs().amax(-1) / half_range).clamp_min(least)


def _rounded(wide: Tensor, scale: Tensor) -> Tensor:
    return torch.round(wide * (1.0 / scale)).clamp(-128, 127).to(torch.int8)


def _product(x: Tensor, weight: Tensor, scale: Tensor, input_bits: int | None) -> Tensor:
    """W x in the dtype that a linear layer would give it."""
    dtype = x.dtype
    if not is_scripting():
        device = x.device.type
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
    if input_bits is not None:
        return _integer_product(x, weight, scale, input_bits).to(dtype)
    if dtype == torch.float16:  # 127 times as large as the scaled ones, its sums could overflow
        return F.linear(x, weight.to(dtype) * scale.to(dtype)[:, None])
    return F.linear(x, weight.to(dtype)) * scale.to(dtype)


def _integer_product(x: Tensor, weight: Tensor, scale: Tensor, input_bits: int, finer: int = _FINER) -> Tensor:
    """W x of tokens rounded to one or two int8 numbers, in float32 or wider."""
    wide = x.reshape(-1, weight.shape[1]).to(torch.promote_types(x.dtype, torch.float32))
    token_scale = _scale(wide)[:, None]
    coarse = _rounded(wide, token_scale)
    if input_bits == 8:
        sums = _int8_matmul(coarse, weight).to(wide.dtype)
    else:
        fine = _rounded(wide - coarse.to(wide.dtype) * token_scale, token_scale / finer)
        both = _int8_matmul(torch.cat((coarse, fine)), weight).to(wide.dtype).tensor_split(2)
        sums = both[0] + both[1] / finer
    y = sums * token_scale * scale.to(wide.dtype)
    if not is_scripting():  # noqa: SIM102 # TorchScript would compile what is beside it in one condition
        if is_eager(x):
            return y.view(*x.shape[:-1], weight.shape[0])
    return y.view_as(x.narrow(-1, 0, 1) * scale)  # of as many dimensions as x has, and not as the example had


def _int8_matmul(x: Tensor, weight: Tensor) -> Tensor:
    """Sums over n of int8 tensors (tokens, n) and (m, n), shape (tokens, m)."""
    # CUDA has the product of integers for some shapes only, ONNX not at all, and with n = 1 torch (2.13) takes the
    # transposed weight for one of another shape. In float32 it is exact up to n = 1000 and rounded as any other beyond.
    # The stride of rows is n, too, and tracers do not take it for something that changes with the example.
    exports = False
    if not is_scripting():
        exports = torch.onnx.is_in_onnx_export()
    if x.device.type == "cpu" and weight.stride(0) > 1 and not exports:
        return torch._int_mm(x, weight.T)
    return x.float() @ weight.float().T


class _Product(torch.autograd.Function):
    """:func:`_product` that keeps the int8 numbers for its backward pass, not a float copy of them.

    Rounding has no gradient of use: that of the unrounded product is taken for it (the straight-through estimate).
    Forward-mode derivatives are an error: the compiler cannot trace functions that have them.
    """

    @staticmethod
    def forward(x: Tensor, weight: Tensor, scale: Tensor, input_bits: InputBits) -> Tensor:
        return _product(x, weight, scale, input_bits)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        del output
        x, weight, scale, _ = inputs
        ctx.save_for_backward(weight, scale)
        ctx.dtype = x.dtype

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        weight, scale = ctx.saved_tensors
        # Scaled by themselves, gradients in float16 could vanish.
        W = weight.to(grad.dtype) * scale.to(grad.dtype)[:, None]
        return (grad @ W).to(ctx.dtype), None, None, None
