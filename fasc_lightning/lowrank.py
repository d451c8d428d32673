"""Linear layers that hold a rank-k matrix, and how they are made."""

import sys
from abc import ABC, abstractmethod
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.jit import is_scripting
from typing_extensions import override

from fasc_lightning._direct import (
    is_eager,
    may_be_direct,
    permute_features,
    pivot_columns,
    pivot_rows,
    two_factors,
    weight_and_bias,
)
from fasc_lightning._guards import guard_key, is_guard
from fasc_lightning._lazy_weight import LazyWeight
from fasc_lightning.expert_views import ExpertLinear
from fasc_lightning.int8 import Int8Linear
from fasc_lightning.layouts import Layout, auto_layout, factors_cost, pivot_cost
from fasc_lightning.pivots import orthonormal_basis, other_rows, select_basis_rows
from fasc_lightning.reparametrised import computed_weight, is_reparametrised


class CompressedLinear(nn.Module, ABC):
    """A linear layer y = W' x + b, W' of shape (m, n) and rank k, held in fewer than m n numbers, or in fewer bytes.

    The matrices it is held in are ``nn.Linear`` children, or, quantised, :class:`~fasc_lightning.int8.Int8Linear`.

    Model code of transformers reads ``.weight`` of linear layers in about a hundred places, nearly always for
    its dtype or device (T5, GPT-J, Qwen2-VL). So there is a read-only :attr:`weight`; it is no parameter and
    not in the state dict.

    Attributes:
        in_features: n.
        out_features: m.
        rank: k.
        layout: How the matrix is held, "factors" or "pivot".
        from_conv1d: Whether the dense layer was a transformers ``Conv1D``, which holds its weight as (n, m); then it
            becomes one again. Set by the swap.
        shell: Where the dense layer was of a class of its own, that layer without its parameters; it becomes one
            again. Set by the swap; no child, and not in the state dict.
    """

    layout: ClassVar[str]
    from_conv1d: bool = False
    shell: nn.Module | None = None

    #: Which TorchScript does not compile: properties, and it compiles all of those that are not named.
    __jit_unused_properties__: ClassVar[list[str]] = [
        "bias",
        "extra_bytes",
        "reads_inputs",
        "_like",
        "weight",
        "parameter_count",
        "pivots",
    ]

    def __init__(self, in_features: int, out_features: int, rank: int) -> None:
        super().__init__()
        if not 1 <= rank <= min(in_features, out_features):
            raise ValueError(
                f"Expected a rank between 1 and {min(in_features, out_features)}, the full rank of a "
                f"({out_features}, {in_features}) matrix, got {rank}."
            )
        self.in_features = in_features
        self.out_features = out_features
        self.rank = rank

    @staticmethod
    @abstractmethod
    def cost(m: int, n: int, k: int) -> int:
        """Numbers held for the matrix, without the bias."""

    @abstractmethod
    def factors(self) -> tuple[Tensor, Tensor]:
        """Left (m, k) and right (k, n) factors of W', differentiable; of half-precision layers in float32.

        Raises:
            TypeError: If a child is neither a plain linear layer nor an :class:`~fasc_lightning.int8.Int8Linear`
                (adapters, torchao's tensors).
        """

    @property
    @abstractmethod
    def bias(self) -> Tensor | None:
        """The bias b in the order of the outputs, shape (m,), or None."""

    @property
    @abstractmethod
    def extra_bytes(self) -> int:
        """Bytes of the state dict beside the parameters: the index of a pivoted layer."""

    @property
    @abstractmethod
    def reads_inputs(self) -> str:
        """Name of the child whose inputs are the layer's own, all or some; the other reads what comes of them."""

    @abstractmethod
    def _child(self) -> nn.Module: ...

    @property
    def _like(self) -> Tensor:
        """A tensor of the layer's dtype and device: a weight, or the scales of a quantised one."""
        child: Any = self._child()
        like: Tensor = child.scale if isinstance(child, Int8Linear) else child.weight
        return like

    def to_weight(self) -> Tensor:
        """The dense matrix W', shape (m, n), in the layer's dtype, differentiable.

        Raises:
            TypeError: As :meth:`factors`.
        """
        left, right = self.factors()
        return (left @ right).to(self._like.dtype)

    def to_linear(self) -> nn.Linear:
        """A new dense layer of the same function; trainable if any parameter of this layer is, or it was quantised.

        Raises:
            TypeError: As :meth:`factors`.
        """
        weight, bias = self.to_weight().detach(), self.bias
        linear = nn.Linear(self.in_features, self.out_features, bias is not None, device="meta")
        linear.weight = nn.Parameter(weight)
        if bias is not None:
            linear.bias = nn.Parameter(bias.detach().clone())
        trainable = any(p.requires_grad or not p.is_floating_point() for p in self.parameters())
        return linear.train(self.training).requires_grad_(trainable)

    @property
    def weight(self) -> Tensor:
        """Read-only stand-in for W': dtype, device and shape cost nothing, any computation makes W'."""
        # The compiler drops what is not used, and cannot trace the stand-in.
        return self.to_weight() if torch.compiler.is_compiling() else LazyWeight(self)

    @override
    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # A saved file, read as a state dict, has one more entry than the layer.
        if is_guard(state_dict.get(guard_key(prefix.removesuffix(".")))):
            del state_dict[guard_key(prefix.removesuffix("."))]
        super()._load_from_state_dict(state_dict, prefix, *args)

    @property
    def parameter_count(self) -> int:
        """Numbers held: :meth:`cost` and the bias. The integer index of a pivoted layer is not among them."""
        bias = 0 if self.bias is None else self.out_features
        return self.cost(self.out_features, self.in_features, self.rank) + bias

    def flops_per_token(self) -> int:
        """Floating-point operations a token costs, two for each multiply-add."""
        return 2 * self.cost(self.out_features, self.in_features, self.rank)

    def extra_repr(self) -> str:
        """Shape, rank and bias, for ``repr``."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, "
            f"bias={self.bias is not None}"
        )


class LowRankLinear(CompressedLinear):
    """Rank-k layer as two factors: ``factor_out(factor_in(x))``, k (m + n) numbers.

    Args:
        in_features: n.
        out_features: m.
        rank: k, at most min(m, n).
        bias: Whether ``factor_out`` has a bias.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    layout = "factors"
    cost = staticmethod(factors_cost)

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, rank)
        self.factor_in = nn.Linear(in_features, rank, bias=False, device=device, dtype=dtype)
        self.factor_out = nn.Linear(rank, out_features, bias=bias, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (..., n) to (..., m)."""
        if not is_scripting():
            first, second = self._modules["factor_in"], self._modules["factor_out"]
            if may_be_direct(x, first, second):
                return two_factors(x, weight_and_bias(first)[0], *weight_and_bias(second))
        return self.factor_out(self.factor_in(x))

    @override
    def factors(self) -> tuple[Tensor, Tensor]:
        return matrix_of(self.factor_out), matrix_of(self.factor_in)

    @property
    @override
    def bias(self) -> Tensor | None:
        return self.factor_out.bias

    @property
    @override
    def extra_bytes(self) -> int:
        return 0

    @property
    @override
    def reads_inputs(self) -> str:
        return "factor_in"

    @override
    def _child(self) -> nn.Module:
        return self.factor_in


class PivotedLinear(CompressedLinear):
    """Rank-k layer as k rows or columns of W' and the others' coefficients in them, k (m + n - k) numbers.

    ``side="out"`` keeps rows: z = W_p x are k of the outputs and T z the other m - k. ``side="in"`` keeps
    columns: y = W_c (x_p + T x_rest). Both cost the same; the side decides whether outputs or inputs are
    permuted.

    With ``side="out"`` the bias of the pivot outputs is the parameter ``pivot_bias``, added after T has read
    z. (Folding it into ``basis`` and its image under T out of the other bias would save that addition, about
    1 % of a forward, but large biases as those of Qwen2's keys would then cancel in half precision.) All
    other biases are part of a matrix product.

    Args:
        in_features: n.
        out_features: m.
        rank: k, at most min(m, n) and below the number of features of the permuted side.
        bias: Whether there is a bias.
        side: "out" (rows) or "in" (columns); None for the smaller side (:func:`smaller_side`).
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Attributes:
        basis: Holds the rows W_p (k, n) or the columns W_c (m, k).
        coefficients: Holds T, (m - k, k) or (k, n - k).
        permutation: int32 buffer, in the state dict as it is part of the weights. Position of each output in
            [z, T z] (m,), or input at each position of [x_p, x_rest] (n,).
    """

    layout = "pivot"
    cost = staticmethod(pivot_cost)
    permutation: Tensor
    pivot_bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = True,
        side: Literal["out", "in"] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, rank)
        if side not in ("out", "in", None):
            raise ValueError(f'Expected side "out", "in" or None, got {side!r}.')
        self.side = side or smaller_side(out_features, in_features)
        permuted = out_features if self.side == "out" else in_features
        if rank >= permuted:
            raise ValueError(
                f'Expected a rank below {permuted}, the features that side="{self.side}" permutes, got '
                f"{rank}. At full rank nothing is saved: keep the dense layer."
            )
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        if self.side == "out":
            self.basis = nn.Linear(in_features, rank, bias=False, **options)
            self.coefficients = nn.Linear(rank, out_features - rank, bias=bias, **options)
        else:
            self.basis = nn.Linear(rank, out_features, bias=bias, **options)
            self.coefficients = nn.Linear(in_features - rank, rank, bias=False, **options)
        has_pivot_bias = bias and self.side == "out"
        self.register_parameter("pivot_bias", nn.Parameter(torch.zeros(rank, **options)) if has_pivot_bias else None)
        self.register_buffer("permutation", torch.arange(permuted, dtype=torch.int32, device=device))

    def forward(self, x: Tensor) -> Tensor:
        """Maps (..., n) to (..., m)."""
        if not is_scripting():
            basis, coefficients = self._modules["basis"], self._modules["coefficients"]
            if may_be_direct(x, basis, coefficients):
                W, bias = weight_and_bias(basis)
                T, rest_bias = weight_and_bias(coefficients)
                permutation: Any = self._buffers["permutation"]
                if self.side == "in":
                    return pivot_columns(x, W, T, bias, permutation)
                return pivot_rows(x, W, T, self.pivot_bias, rest_bias, permutation)
            if is_eager(x):
                # On the CPU an index along the last of two dimensions is 3 times faster than along the last of three.
                y = self._composed(x.reshape(-1, self.in_features), True)
                return y.view(*x.shape[:-1], self.out_features)
        return self._composed(x, False)

    def _composed(self, x: Tensor, eager: bool) -> Tensor:
        """(N, n) to (N, m) by calls of the children: for autograd, hooks, adapters, compilers; (..., n) for tracers."""
        if self.side == "in":
            permuted = permute_features(x, self.permutation, eager)
            # Slices would be traced as those of a numbered dimension.
            rest = permuted.narrow(-1, self.rank, self.in_features - self.rank)
            return self.basis(permuted.narrow(-1, 0, self.rank) + self.coefficients(rest))
        z = self.basis(x)
        rest = self.coefficients(z)
        pivot_bias = self.pivot_bias
        # Autocast leaves the bias in float32, which would promote the output.
        pivots = z if pivot_bias is None else z + pivot_bias.to(z.dtype)
        return permute_features(torch.cat([pivots, rest], dim=-1), self.permutation, eager)

    @property
    @override
    def reads_inputs(self) -> str:
        return "basis" if self.side == "out" else "coefficients"

    @property
    def pivots(self) -> Tensor:
        """Indices of the rows or columns that are kept, shape (k,), in the order of ``basis``."""
        order = self.permutation.argsort() if self.side == "out" else self.permutation
        return order[: self.rank]

    @override
    def factors(self) -> tuple[Tensor, Tensor]:
        basis, T = matrix_of(self.basis), matrix_of(self.coefficients)
        eye = torch.eye(self.rank, dtype=T.dtype, device=T.device)
        if self.side == "out":
            return torch.cat([eye, T])[self.permutation], basis
        return basis, torch.cat([eye, T], dim=1)[:, self.permutation.argsort()]

    @property
    @override
    def bias(self) -> Tensor | None:
        if self.side == "in":
            return self.basis.bias
        if self.pivot_bias is None:
            return None
        return torch.cat([self.pivot_bias, self.coefficients.bias])[self.permutation]

    @property
    @override
    def extra_bytes(self) -> int:
        return self.permutation.numel() * self.permutation.element_size()

    @override
    def _child(self) -> nn.Module:
        return self.basis

    def extra_repr(self) -> str:
        """Shape, rank, bias and side, for ``repr``."""
        return f"{super().extra_repr()}, side={self.side}"


def smaller_side(m: int, n: int) -> Literal["out", "in"]:
    """Return the side of an (m, n) layer with fewer features to permute; of equal ones the inputs, one copy less."""
    return "out" if m < n else "in"


def make_lowrank(
    B: Tensor,
    C: Tensor,
    bias: Tensor | None = None,
    layout: Layout = "auto",
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    bound: float = 2.0,
    side: Literal["out", "in"] | None = None,
) -> CompressedLinear:
    """Makes the layer y = B C x + b. Computes in float64 on the device of ``B`` (not MPS); draws no random numbers.

    Args:
        B: Left factor of W', shape (m, k). Dependent columns are allowed.
        C: Right factor of W', shape (k, n).
        bias: Bias b, shape (m,), or None.
        layout: "pivot", which stores less at every k < min(m, n), "factors", or "auto", the one of them that
            :func:`~fasc_lightning.layouts.auto_layout` takes. "factors" makes B's columns orthogonal and gives both
            factors equal column and row norms, so that nothing cancels or overflows in half precision.
        dtype: Dtype of the layer; None for that of B.
        device: Device of the layer; None for that of B.
        bound: Largest coefficient of the pivot layout in absolute value, above 1.
        side: Of the pivot layout; None for the smaller one.

    Returns:
        The layer, in training mode, with parameters that require gradients.

    Raises:
        ValueError: If shapes disagree, a factor is not finite, the rank does not fit the layout, or layout is
            unknown.
    """
    if B.ndim != 2 or C.ndim != 2 or B.shape[1] != C.shape[0]:
        raise ValueError(f"Expected factors (m, k) and (k, n), got {tuple(B.shape)} and {tuple(C.shape)}.")
    (m, k), n = B.shape, C.shape[1]
    if bias is not None and bias.shape != (m,):
        raise ValueError(f"Expected a bias of shape ({m},), got {tuple(bias.shape)}.")
    if layout not in ("auto", "pivot", "factors"):
        raise ValueError(f'Expected layout "auto", "pivot" or "factors", got {layout!r}.')
    if not bool(torch.isfinite(B).all() and torch.isfinite(C).all()):
        raise ValueError("Expected finite factors, got NaN or infinity. Check the statistics they were computed from.")
    target: dict[str, Any] = {"dtype": dtype or B.dtype, "device": device or B.device}
    if layout == "auto" and auto_layout(m, n, k, target["dtype"]) == "factors":
        layout = "factors"

    def parameter(value: Tensor) -> nn.Parameter:
        return nn.Parameter(value.detach().to(**target).contiguous().clone())

    # Built on meta: no random initialisation to pay for, and the caller's random state stays as it is.
    left, right = B.detach().double(), C.detach().to(B.device, torch.float64)
    if layout == "factors":
        factored = LowRankLinear(n, m, k, bias is not None, device="meta")
        out_weight, in_weight = _balance(left, right)
        factored.factor_out.weight, factored.factor_in.weight = parameter(out_weight), parameter(in_weight)
        if bias is not None:
            factored.factor_out.bias = parameter(bias)
        return factored

    pivoted = PivotedLinear(n, m, k, bias is not None, side=side, device="meta")
    out = pivoted.side == "out"
    # An orthonormal basis rather than B itself: it has full rank even where columns vanished in the solver.
    rows, T = select_basis_rows(orthonormal_basis(left if out else right.T)[0], bound)
    rest = other_rows(rows, m if out else n)
    order = torch.cat([rows, rest])
    pivoted.basis.weight = parameter(left[rows] @ right if out else left @ right[:, rows])
    pivoted.coefficients.weight = parameter(T if out else T.T)
    pivoted.permutation = (order.argsort() if out else order).to(target["device"], torch.int32)
    if bias is not None and out:
        bias = bias.to(rows.device)
        pivoted.pivot_bias, pivoted.coefficients.bias = parameter(bias[rows]), parameter(bias[rest])
    elif bias is not None:
        pivoted.basis.bias = parameter(bias)
    return pivoted


def linear_weight(module: nn.Module) -> Tensor:
    """The weight of a dense linear layer as an (m, n) view, that is, transposed for GPT-2's ``Conv1D``.

    One that is computed from other tensors is that of eval mode, and the layer's state stays as it is.

    Raises:
        TypeError: If the module is neither ``nn.Linear`` nor transformers' ``Conv1D``.
    """
    if isinstance(module, nn.Linear) or is_conv1d(module):
        weight: Any = computed_weight(module) if is_reparametrised(module) else module.weight
        return weight if isinstance(module, nn.Linear) else weight.T
    raise TypeError(f"Expected an nn.Linear or a transformers Conv1D, got {type(module).__name__}.")


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """(m, n), outputs and inputs, of a dense or compressed linear layer.

    Raises:
        TypeError: If the module is not a linear layer.
    """
    if isinstance(module, CompressedLinear | ExpertLinear):  # of an expert no slice is made to see its shape
        return module.out_features, module.in_features
    if isinstance(module, nn.Linear) and is_reparametrised(module):  # nothing is computed to see its shape
        return module.out_features, module.in_features
    m, n = linear_weight(module).shape
    return m, n


def flops_per_token(module: nn.Module) -> int:
    """Floating-point operations a token costs in a linear layer, dense or compressed; 0 for other modules."""
    if isinstance(module, CompressedLinear):
        return module.flops_per_token()
    if isinstance(module, nn.Linear) or is_conv1d(module):
        m, n = linear_shape(module)
        return 2 * m * n
    return 0


def matrix_of(child: nn.Module) -> Tensor:
    """Weight of a child; float32 if it is of half precision, whose products would round twice."""
    if isinstance(child, Int8Linear):
        return child.dequantize()
    if not isinstance(child, nn.Linear) or type(child.weight) not in (nn.Parameter, Tensor):
        found = type(child.weight if isinstance(child, nn.Linear) else child)
        raise TypeError(
            "Expected plain linear layers as the factors of a compressed layer, found "
            f"{found.__module__}.{found.__qualname__}. "
            "Merge adapters, and undo quantisation by other libraries, before asking for the dense matrix."
        )
    return child.weight.to(torch.promote_types(child.weight.dtype, torch.float32))


def _balance(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of the same product: orthogonal columns (m, k), each as long as its row of the other (k, n)."""
    Q, R = orthonormal_basis(left)
    rows = R @ right
    norms = rows.norm(dim=1)
    scale = norms.sqrt()
    return Q * scale, rows * torch.where(norms > 0, 1 / scale, 0.0)[:, None]


def is_conv1d(module: nn.Module) -> bool:
    """Whether a module is GPT-2's linear layer, whose weight is (in, out)."""
    # An instance exists only where transformers has been imported; importing it here would take seconds.
    conv1d = getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)
    return conv1d is not None and isinstance(module, conv1d)
