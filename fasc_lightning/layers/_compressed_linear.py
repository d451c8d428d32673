"""The base of all compressed linear layers."""

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from fasc_lightning.layers._guards import guard_key, is_guard
from fasc_lightning.layers._int8 import Int8Linear
from fasc_lightning.layers._lazy_weight import LazyWeight
from fasc_lightning.layers._packed_linear import PackedLinear


class CompressedLinear(nn.Module, ABC):
    """A linear layer y = W' x + b, W' of shape (m, n) and rank k, held in fewer than m n numbers or in fewer bytes.

    Its matrices are ``nn.Linear`` children or, quantised, ``Int8Linear`` or ``PackedLinear``.

    Model code of transformers reads ``.weight`` of linear layers in about a hundred places, nearly always for its dtype
    or device (T5, GPT-J, Qwen2-VL). So there is a read-only :attr:`weight`, which is no parameter and not in the state
    dict.

    Attributes:
        in_features: n.
        out_features: m.
        rank: k.
        layout: Layout of the matrix, for example "factors" or "pivot".
        from_conv1d: Whether the dense layer was a transformers ``Conv1D``, which holds its weight as (n, m); the layer
            becomes one again. Set by the swap.
        shell: A dense layer of a class of its own, without its parameters; the layer becomes one again. None for other
            classes. Set by the swap; it is no child, and not in the state dict.
    """

    layout: ClassVar[str]
    from_conv1d: bool = False
    shell: nn.Module | None = None

    #: Properties that TorchScript must not compile; it compiles all others.
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
        self.check_rank(in_features, out_features, rank)
        self.in_features = in_features
        self.out_features = out_features
        self.rank = rank

    @staticmethod
    def check_rank(in_features: int, out_features: int, rank: int) -> None:
        """Raise a ValueError unless a rank is between 1 and the full rank of an (m, n) matrix."""
        if not 1 <= rank <= min(in_features, out_features):
            raise ValueError(
                f"Expected a rank between 1 and {min(in_features, out_features)}, the full rank of a "
                f"({out_features}, {in_features}) matrix, got {rank}."
            )

    @staticmethod
    @abstractmethod
    def cost(m: int, n: int, k: int) -> int:
        """Return the count of numbers in the matrix, without the bias."""

    @abstractmethod
    def factors(self) -> tuple[Tensor, Tensor]:
        """Return the left (m, k) and right (k, n) factors of W', differentiable; in float32 for half-precision layers.

        Raises:
            TypeError: If a child is neither a plain linear layer nor one of this package's quantised layers (adapters,
                torchao's tensors).
        """

    @property
    @abstractmethod
    def bias(self) -> Tensor | None:
        """The bias b in the order of the outputs, shape (m,), or None."""

    @property
    @abstractmethod
    def extra_bytes(self) -> int:
        """Bytes of the state dict besides the parameters: the index of a pivoted layer."""

    @property
    @abstractmethod
    def reads_inputs(self) -> str:
        """Name of the child that reads the layer's own inputs, all or some; the other child reads its outputs."""

    @abstractmethod
    def _child(self) -> nn.Module: ...

    @property
    def _like(self) -> Tensor:
        """A tensor of the layer's dtype and device: a weight, or the scales of a quantised weight."""
        child: Any = self._child()
        if isinstance(child, PackedLinear):
            return child.like
        like: Tensor = child.scale if isinstance(child, Int8Linear) else child.weight
        return like

    def to_weight(self) -> Tensor:
        """Return the dense matrix W', shape (m, n), in the layer's dtype, differentiable.

        Raises:
            TypeError: As :meth:`factors`.
        """
        left, right = self.factors()
        return (left @ right).to(self._like.dtype)

    def to_linear(self) -> nn.Linear:
        """Return a new dense layer of the same function, trainable if a parameter of this one is or it is quantised.

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
        """Read-only stand-in for W': its dtype, device and shape are free; any computation makes W'."""
        # The compiler cannot trace the stand-in, and drops an unused W'.
        return self.to_weight() if torch.compiler.is_compiling() else LazyWeight(self)

    @override
    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # A state dict read from a saved file has one more entry than the layer.
        if is_guard(state_dict.get(guard_key(prefix.removesuffix(".")))):
            del state_dict[guard_key(prefix.removesuffix("."))]
        super()._load_from_state_dict(state_dict, prefix, *args)

    @property
    def parameter_count(self) -> int:
        """Count of numbers: :meth:`cost` and the bias, without the integer index of a pivoted layer."""
        bias = 0 if self.bias is None else self.out_features
        return self.cost(self.out_features, self.in_features, self.rank) + bias

    def flops_per_token(self) -> int:
        """Return the floating-point operations for a token, two for each multiply-add."""
        return 2 * self.cost(self.out_features, self.in_features, self.rank)

    def extra_repr(self) -> str:
        """Return shape, rank and bias, for ``repr``."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, "
            f"bias={self.bias is not None}"
        )


def matrix_of(child: nn.Module) -> Tensor:
    """Return the weight of a child; half precision becomes float32, because products would round twice."""
    if isinstance(child, Int8Linear | PackedLinear):
        return child.dequantize()
    if not isinstance(child, nn.Linear) or type(child.weight) not in (nn.Parameter, Tensor):
        found = type(child.weight if isinstance(child, nn.Linear) else child)
        raise TypeError(
            "Expected plain linear layers as the factors of a compressed layer, found "
            f"{found.__module__}.{found.__qualname__}. "
            "Merge adapters, and undo quantisation by other libraries, before asking for the dense matrix."
        )
    return child.weight.to(torch.promote_types(child.weight.dtype, torch.float32))
