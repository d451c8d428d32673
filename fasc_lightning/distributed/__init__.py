"""Fits on several processes and devices: DDP, FSDP2, device maps."""

from fasc_lightning.distributed._collectives import (
    gather_everywhere,
    is_distributed,
    share_layers,
    sum_everywhere,
    union_everywhere,
)
from fasc_lightning.distributed._device_map import DeviceMapStrategy, check_weights, is_split
from fasc_lightning.distributed._dtensor import is_dtensor, whole
from fasc_lightning.distributed._fsdp import Unsharding, check_sharded, is_sharded, lacks_room, reshard
from fasc_lightning.distributed._preconditions import check_module, check_namespace, check_single, check_strategy
from fasc_lightning.distributed._uneven_inputs import UnevenInputs, others_present

__all__ = [
    "DeviceMapStrategy",
    "UnevenInputs",
    "Unsharding",
    "check_module",
    "check_namespace",
    "check_sharded",
    "check_single",
    "check_strategy",
    "check_weights",
    "gather_everywhere",
    "is_distributed",
    "is_dtensor",
    "is_sharded",
    "is_split",
    "lacks_room",
    "others_present",
    "reshard",
    "share_layers",
    "sum_everywhere",
    "union_everywhere",
    "whole",
]
