"""Models whose layers are on several devices, placed by transformers' ``device_map``."""

from __future__ import annotations

from collections.abc import Iterable

from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor, nn
from typing_extensions import override

from fasc_lightning._utils import undoing


class DeviceMapStrategy(SingleDeviceStrategy):
    """A strategy for one process that leaves every layer on its device; batches go to the first device."""

    @override
    def model_to_device(self) -> None:
        pass

    @override
    def teardown(self) -> None:
        with undoing() as undo:
            undo.set(self, "_lightning_module", None)  # otherwise teardown would move the module to the CPU
            super().teardown()


def is_split(model: nn.Module) -> bool:
    """Tell whether a ``device_map`` has put parts of a model on different devices.

    Raises:
        ValueError: If the parameters are on several devices without a ``device_map``, so that nothing moves
            activations.
    """
    maps = [found for m in model.modules() if (found := getattr(m, "hf_device_map", None))]
    if any(len({str(device) for device in found.values()}) > 1 for found in maps):
        return True
    devices = sorted({str(parameter.device) for parameter in model.parameters()})
    if len(devices) > 1:
        raise ValueError(
            f"Expected a model on one device, or one that `device_map` has split, but its parameters are on "
            f"{', '.join(devices)}. HINT: model.to(device), or from_pretrained(folder, device_map='auto')."
        )
    return False


def check_weights(weights: Iterable[tuple[str, Tensor]]) -> None:
    """Refuse weights that cannot be read.

    Args:
        weights: Weights by name.

    Raises:
        ValueError: If some are on the meta device: empty, or offloaded to the CPU or the disk by ``device_map``.
    """
    weights = list(weights)
    absent = [name for name, weight in weights if weight.is_meta]
    if absent:
        raise ValueError(
            f"Expected weights to compress but {len(absent)} of {len(weights)} are on the meta device (for example "
            f"{absent[0]!r}): an empty model, or layers that `device_map` has offloaded. HINT: a device_map over "
            "devices that hold the weights, or `exclude` those layers; plan() needs no weights."
        )
