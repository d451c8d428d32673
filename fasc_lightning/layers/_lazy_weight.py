"""The ``weight`` of a compressed layer: free metadata, and values computed when they are used."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

if TYPE_CHECKING:
    from fasc_lightning.layers._compressed_linear import CompressedLinear


class LazyWeight(Tensor):
    """Tensor with the dtype, device and shape of W'; any computation with it makes W'."""

    _METADATA: ClassVar[set[Any]] = {
        *(
            getattr(Tensor, name).__get__
            for name in ("dtype", "device", "shape", "ndim", "layout", "is_cuda", "is_meta")
        ),
        *(
            Tensor.size,
            Tensor.dim,
            Tensor.numel,
            Tensor.is_floating_point,
            Tensor.element_size,
            Tensor.get_device,
        ),
    }
    #: Keeps transformers from initialising it after loading, as it does weights that it finds by name (GPT-2, T5).
    _is_hf_initialized: ClassVar[bool] = True
    _source: CompressedLinear

    def __new__(cls, source: CompressedLinear) -> LazyWeight:
        like = source._like
        size = (source.out_features, source.in_features)
        lazy = Tensor._make_wrapper_subclass(cls, size, dtype=like.dtype, device=like.device)
        lazy._source = source
        return lazy

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in cls._METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        name = func.__name__
        if name in ("__set__", "__setitem__") or (name.endswith("_") and not name.endswith("__")):
            raise RuntimeError(
                f"{name} would change the weight of a compressed layer, which is computed from its factors. "
                "Change the factors, or make the layer dense with swap_to_dense first."
            )
        args, kwargs = tree_map_only(cls, lambda lazy: lazy._source.to_weight(), (args, kwargs or {}))
        return func(*args, **kwargs)

    # A wrapper must have it; only code that bypasses __torch_function__ reaches it.
    __torch_dispatch__ = __torch_function__  # type: ignore[assignment]
