"""Linear layers, dense, low-rank, pivoted, int8 and of experts: selection, swap, description."""

from fasc_lightning.layers._compressed_linear import CompressedLinear
from fasc_lightning.layers._dequantized import dequantized
from fasc_lightning.layers._fused_experts import ExpertLinear, Routing, expert_groups, named_layers, routed, split_name
from fasc_lightning.layers._grid import SCALE_DTYPE, Grid, Rounded, words
from fasc_lightning.layers._guards import GUARD_SHAPE, expect_guards, guards, is_guard, saved_guards
from fasc_lightning.layers._int8 import align_weights
from fasc_lightning.layers._layouts import BREAK_EVEN, Layout, Stored, auto_cost, auto_layout, factors_cost, pivot_cost
from fasc_lightning.layers._linear import Gradient, input_gradient, is_conv1d, linear_shape, linear_weight
from fasc_lightning.layers._lowrank import LowRankLinear
from fasc_lightning.layers._make_lowrank import make_lowrank
from fasc_lightning.layers._pivoted import PivotedLinear, smaller_side
from fasc_lightning.layers._probe import is_plain_linear
from fasc_lightning.layers._quantized_layers import (
    INT8_ROWS,
    QUANTIZATIONS,
    Form,
    Quantization,
    check_quantization,
    form_from_plain,
    form_to_plain,
    packed_matrices,
    quantization_of,
    quantized_layer,
    residual_layer,
    rounded_layer,
    rounded_state,
)
from fasc_lightning.layers._ranks import rank_budget, resolve_rank
from fasc_lightning.layers._reparametrised import DENSE_FORM, DenseForm, trains_weight
from fasc_lightning.layers._residual import ResidualLinear
from fasc_lightning.layers._size import Size, bytes_in_16_bits, layer_sizes, model_size
from fasc_lightning.layers._spec import check_layers, describe_layer, empty_layer, place, set_trainable
from fasc_lightning.layers._swap import (
    check_in_memory,
    compressed_layers,
    empty_dense,
    is_compressed,
    swap_modules,
    swap_to_dense,
)
from fasc_lightning.layers._targets import (
    TargetedLayers,
    layer_shapes,
    matches,
    select_layers,
    target_layers,
    warn_other_layers,
)
from fasc_lightning.layers._unfused_experts import UnfusedExperts, expert_layers, unfuse

__all__ = [
    "BREAK_EVEN",
    "DENSE_FORM",
    "GUARD_SHAPE",
    "INT8_ROWS",
    "QUANTIZATIONS",
    "SCALE_DTYPE",
    "CompressedLinear",
    "DenseForm",
    "ExpertLinear",
    "Form",
    "Gradient",
    "Grid",
    "Layout",
    "LowRankLinear",
    "PivotedLinear",
    "Quantization",
    "ResidualLinear",
    "Rounded",
    "Routing",
    "Size",
    "Stored",
    "TargetedLayers",
    "UnfusedExperts",
    "auto_cost",
    "align_weights",
    "auto_layout",
    "bytes_in_16_bits",
    "check_in_memory",
    "check_layers",
    "check_quantization",
    "compressed_layers",
    "dequantized",
    "describe_layer",
    "empty_dense",
    "empty_layer",
    "expect_guards",
    "expert_groups",
    "expert_layers",
    "factors_cost",
    "form_from_plain",
    "form_to_plain",
    "guards",
    "input_gradient",
    "is_compressed",
    "is_conv1d",
    "is_guard",
    "is_plain_linear",
    "layer_shapes",
    "layer_sizes",
    "linear_shape",
    "linear_weight",
    "make_lowrank",
    "matches",
    "model_size",
    "named_layers",
    "packed_matrices",
    "pivot_cost",
    "place",
    "quantization_of",
    "quantized_layer",
    "rank_budget",
    "residual_layer",
    "resolve_rank",
    "rounded_layer",
    "rounded_state",
    "routed",
    "saved_guards",
    "select_layers",
    "set_trainable",
    "smaller_side",
    "split_name",
    "swap_modules",
    "swap_to_dense",
    "target_layers",
    "trains_weight",
    "unfuse",
    "warn_other_layers",
    "words",
]
