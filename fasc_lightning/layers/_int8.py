"""A linear layer with an int8 weight, in tensors that every file format and loader accepts.

The numbers equal torchao's int8 weight-only and dynamic quantisation (symmetric, one scale a row). They are not held in
torchao's tensor subclasses, which need torchao, in a version that still has the class, wherever a model is loaded, and
which safetensors files cannot hold. An int8 tensor and a float tensor can be saved, sent, moved and read anywhere.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.fx
from torch import Tensor, nn
from torch.jit import is_scripting
from torch.nn import functional as F

from fasc_lightning.layers._grid import Rounded
from fasc_lightning.layers._inference import is_eager

#: Half of the 255 steps from -128 to 127.
_HALF_RANGE = 127.5

#: A second int8 number holds the rounding error of the first, at most half a step, in this many steps.
_FINER = 254

#: Tokens up to which torch's int8 kernel for CPUs is faster than the product with a widened weight, and the numbers
#: that have to divide inputs and outputs: with other numbers of inputs it reads beyond its tensors (torch 2.13).
KERNEL_TOKENS, KERNEL_INPUTS, KERNEL_OUTPUTS = 64, 64, 8

#: Bytes of which the kernel needs addresses of weights and inputs to be a multiple.
KERNEL_BYTES = 16

#: Bits to which inputs are rounded; None for no rounding.
InputBits = Literal[8, 16] | None


class Int8Linear(nn.Module):
    """y = W x + b with W[i, j] = scale[i] weight[i, j], weight of int8: m n bytes and m numbers.

    Each output has one scale, which can then leave the sum over inputs: the int8 numbers enter the matrix product
    unscaled, and the product is scaled. The weight is not trained. Gradients pass through it to the input, with
    ``input_bits`` as if the input had not been rounded.

    Args:
        in_features: n.
        out_features: m.
        bias: Whether there is a bias, which is not rounded.
        input_bits: 8 rounds the input to int8, with one scale a token, for a product of integers: faster than one in
            the input's dtype, and less exact. 16 rounds it to two int8 numbers, at the cost of two such products: for
            inputs with a few features far larger than the rest. None does not round.
        device: Device of the tensors.
        dtype: Dtype of ``scale`` and ``bias``, which counts as the layer's.

    Attributes:
        weight: The int8 parameter, (m, n), without gradient.
        scale: Buffer, (m,).
        rounds_inputs: True, if ``input_bits`` is given; it tells the kind of layer in a file of weights.
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
        """Return a layer with a rounded weight.

        Args:
            weight: W, (m, n).
            bias: b, (m,), or None.
            input_bits: Bits to which inputs are rounded, or None.
            dtype: Dtype of the layer; None for the weight's.

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

    @classmethod
    def from_rounded(cls, rounded: Rounded, bias: Tensor | None, dtype: torch.dtype) -> Int8Linear:
        """Return a layer with a matrix that is on a symmetric grid of 8 bits with one scale an output.

        Args:
            rounded: W on the grid, (m, n).
            bias: b, (m,), or None.
            dtype: Dtype of the layer.
        """
        m, n = rounded.codes.shape
        layer = cls(n, m, bias is not None, device="meta")
        centred = (rounded.codes.to(torch.int16) - rounded.grid.middle).to(torch.int8)
        layer.weight = nn.Parameter(centred, requires_grad=False)
        layer.scale = rounded.scale[:, 0].to(dtype)
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach().clone(), bias.requires_grad)
        return layer

    def dequantize(self) -> Tensor:
        """Return the matrix W, (m, n), in the dtype of the scales or float32, whichever is wider."""
        wide = torch.promote_types(self.scale.dtype, torch.float32)
        return self.weight.to(wide) * self.scale.to(wide)[:, None]

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., n) to (..., m), in the dtype of x, or of autocast."""
        y = int8_product(x, self.weight, self.scale, self.input_bits)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self) -> str:
        """Return shape, bias and kind, for ``repr``."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"input_bits={self.input_bits}"
        )


def int8_product(x: Tensor, weight: Tensor, scale: Tensor, input_bits: int | None) -> Tensor:
    """Return W x; gradients pass through it to x. One operation in fx graphs, which cannot follow its branches."""
    if not is_scripting():
        # TorchScript cannot save Python's autograd functions; a trace has the gradients of its own operations.
        graded = x.requires_grad or torch._C._are_functorch_transforms_active()
        if torch.is_grad_enabled() and graded and not torch.jit.is_tracing():
            return _Product.apply(x, weight, scale, input_bits)
    return _product(x, weight, scale, input_bits)


torch.fx.wrap("int8_product")


def round_rows(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Round each row to int8 with a scale of its own.

    Args:
        weight: (m, n).
        dtype: Dtype of the scales. Scales are rounded to it before they divide the rows, so that a half-precision scale
            does not shift a whole row.

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
    """Return the scale of each row; a row of zeros has one, too. TorchScript reads constants from defaults only."""
    return (wide.abs().amax(-1) / half_range).clamp_min(least)


def _rounded(wide: Tensor, scale: Tensor) -> Tensor:
    return torch.round(wide * (1.0 / scale)).clamp(-128, 127).to(torch.int8)


def _product(x: Tensor, weight: Tensor, scale: Tensor, input_bits: int | None) -> Tensor:
    """Return W x in the dtype of a linear layer's output."""
    dtype = x.dtype
    if not is_scripting():
        device = x.device.type
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
    if input_bits is not None:
        return _integer_product(x, weight, scale, input_bits).to(dtype)
    if not is_scripting():  # noqa: SIM102 # TorchScript would compile the rest of a joint condition
        if dtype == torch.bfloat16 and _fits_kernel(x, weight):
            flat = x.reshape(-1, weight.shape[1]).to(dtype).contiguous()
            y = torch.ops.aten._weight_int8pack_mm(flat if is_aligned(flat) else flat.clone(), weight, scale.to(dtype))
            return y.view(*x.shape[:-1], weight.shape[0])
    if dtype == torch.float16:  # unscaled sums are 127 times as large and could overflow
        return F.linear(x, weight.to(dtype) * scale.to(dtype)[:, None])
    return F.linear(x, weight.to(dtype)) * scale.to(dtype)


def _fits_kernel(x: Tensor, weight: Tensor) -> bool:
    """Tell whether torch's kernel multiplies these tokens: at once, on a CPU, and few of them."""
    m, n = weight.shape
    at_once = type(x) is Tensor and not (torch.compiler.is_compiling() or torch.jit.is_tracing())
    if not (at_once and x.is_cpu and weight.is_cpu) or n % KERNEL_INPUTS or m % KERNEL_OUTPUTS:
        return False
    few = 0 < x.numel() // n <= KERNEL_TOKENS and weight.is_contiguous()
    return few and not torch._C._are_functorch_transforms_active() and is_aligned(weight) and _has_kernel()


def is_aligned(values: Tensor) -> bool:
    """Tell whether a tensor lies where torch's kernel can read it; elsewhere the kernel ends the process (torch 2.13).

    Weights that are mapped from a file, and inputs that are a part of a tensor, may lie elsewhere.
    """
    return values.data_ptr() % KERNEL_BYTES == 0


def align_weights(model: nn.Module) -> None:
    """Copy the int8 weights on a CPU that torch's kernel cannot read where they lie, in place.

    Args:
        model: Any module.
    """
    for module in model.modules():
        if isinstance(module, Int8Linear) and module.weight.is_cpu and not is_aligned(module.weight):
            module.weight.data = module.weight.data.clone()


@lru_cache
def _has_kernel() -> bool:
    """Tell whether this torch has the kernel for this processor, and whether it gives the right product."""
    if not hasattr(torch.ops.aten, "_weight_int8pack_mm"):
        return False
    weight = torch.arange(KERNEL_OUTPUTS * KERNEL_INPUTS).view(KERNEL_OUTPUTS, KERNEL_INPUTS).remainder(251).sub(125)
    x = torch.arange(3 * KERNEL_INPUTS).view(3, KERNEL_INPUTS).remainder(7).sub(3).bfloat16()
    try:
        found = torch.ops.aten._weight_int8pack_mm(x, weight.to(torch.int8), torch.ones(KERNEL_OUTPUTS).bfloat16())
    except (RuntimeError, NotImplementedError):
        return False
    return torch.equal(found, (x.float() @ weight.float().T).bfloat16())


def _integer_product(x: Tensor, weight: Tensor, scale: Tensor, input_bits: int, finer: int = _FINER) -> Tensor:
    """Return W x for tokens rounded to one or two int8 numbers, in float32 or wider."""
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
    if not is_scripting():  # noqa: SIM102 # TorchScript would compile the rest of a joint condition
        if is_eager(x):
            return y.view(*x.shape[:-1], weight.shape[0])
    return y.view_as(x.narrow(-1, 0, 1) * scale)  # takes the dimensions from x, not from a traced example


def _int8_matmul(x: Tensor, weight: Tensor) -> Tensor:
    """Return the sums over n of int8 tensors (tokens, n) and (m, n), shape (tokens, m)."""
    # CUDA has the product of integers for some shapes only, and ONNX lacks it. With n = 1, torch (2.13) misreads the
    # shape of the transposed weight. In float32 the product is exact up to n = 1000, and rounded as any other beyond.
    # The stride of rows stands for n, because tracers do not treat it as a size that changes with the example.
    exports = False
    if not is_scripting():
        exports = torch.onnx.is_in_onnx_export()
    if x.device.type == "cpu" and weight.stride(0) > 1 and not exports:
        return torch._int_mm(x, weight.T)
    return x.float() @ weight.float().T


class _Product(torch.autograd.Function):
    """:func:`_product` that keeps the int8 numbers for its backward pass, instead of a float copy.

    Rounding has no useful gradient, so the gradient of the unrounded product takes its place (the straight-through
    estimate). Forward-mode derivatives raise an error: the compiler cannot trace functions that have them.
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
        # The scales multiply the weight: scaled float16 gradients could vanish.
        W = weight.to(grad.dtype) * scale.to(grad.dtype)[:, None]
        return (grad @ W).to(ctx.dtype), None, None, None
