"""The base of all compressed linear layers."""

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from fasc_lightning.layers._guards import guard_key, is_guard
from fasc_lightning.layers._int8 import Int8Linear
from fasc_lightning.layers._lazy_weight import LazyWeight


class CompressedLinear(nn.Module, ABC):
    """A linear layer y = W' x + b, W' of shape (m, n) and rank k, held in fewer than m n numbers, or in fewer bytes.

    The matrices it is held in are ``nn.Linear`` children, or, quantised, ``Int8Linear``.

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
            TypeError: If a child is neither a plain linear layer nor an ``Int8Linear``
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
