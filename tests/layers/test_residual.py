"""The layer of a matrix of few bits and a residual of low rank."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import fx, nn

from fasc_lightning.layers import (
    INT8_ROWS,
    Grid,
    ResidualLinear,
    layer_sizes,
    linear_weight,
    quantization_of,
    residual_layer,
)
from fasc_lightning.models import prepare_decoding
from fasc_lightning.rounding import to_nearest

pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit.*` is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),  # the compiler's own doing
]

GRID = Grid(4, 32)


def made(bias=True, m=48, n=64, k=8, dtype=torch.float32):
    torch.manual_seed(0)
    dense = nn.Linear(n, m, bias, dtype=dtype)
    rounded = to_nearest(dense.weight.detach().float(), GRID)
    U, S, Vh = torch.linalg.svd(dense.weight.detach().float() - rounded.dequantize(), full_matrices=False)
    return dense, residual_layer(dense, rounded, (U[:, :k] * S[:k], Vh[:k])).eval()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(64,), (3, 64), (2, 5, 64), (0, 64)])
def test_outputs_and_gradients_are_those_of_the_dense_matrix(bias, shape):
    dense, layer = made(bias)
    assert (layer.layout, layer.rank, quantization_of(layer)) == ("residual", 8, GRID)
    x = torch.randn(shape, requires_grad=True)
    y = layer(x)
    expected = nn.functional.linear(x, layer.to_weight(), dense.bias)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    (found,) = torch.autograd.grad(y.square().sum(), x)
    (wanted,) = torch.autograd.grad(expected.square().sum(), x)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)
    left, right = layer.factors()
    torch.testing.assert_close(left @ right, layer.to_weight())
    linear = layer.to_linear()
    torch.testing.assert_close(linear.weight, layer.to_weight())
    assert (linear.bias is None) is not bias


def test_the_residual_takes_error_away():
    dense, layer = made()
    alone = layer.matrix.dequantize()
    assert (dense.weight - layer.to_weight()).norm() < 0.9 * (dense.weight - alone).norm()


def test_sizes_count_both_parts():
    _, layer = made()
    size = layer_sizes({"": layer})
    assert size.parameters == 48 * 64 + 8 * (48 + 64) + 48
    assert size.flops_per_token == 2 * (48 * 64 + 8 * (48 + 64))
    matrix = GRID.nbytes(48, 64) + INT8_ROWS.nbytes(8, 64) + INT8_ROWS.nbytes(48, 8)
    assert size.bytes == matrix + 2 * (8 + 48) + 4 * 48  # scales of factors are float32 here, counted as 16 bits there


def test_copies_pickles_traces_graphs_and_programs_are_the_layer(tmp_path):
    _, layer = made()
    net = nn.Sequential(nn.Linear(64, 64), layer, nn.ReLU()).eval()
    x = torch.randn(3, 64)
    expected = net(x)
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net)), fx.symbolic_trace(net)):
        assert torch.equal(other(x), expected)
    trace = torch.jit.trace(net, torch.randn(100, 64))
    torch.testing.assert_close(trace(x), expected)
    batch = torch.export.Dim("batch", min=2, max=4096)
    program = torch.export.export(net, (torch.randn(4, 64),), dynamic_shapes=({0: batch},)).module()
    torch.testing.assert_close(program(x), expected)
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected)


def test_few_tokens_in_half_precision_take_the_kernel():
    dense, layer = made(dtype=torch.bfloat16)
    assert layer.weight.dtype == torch.bfloat16
    x = torch.randn(2, 64).bfloat16()
    before = layer(x)
    if prepare_decoding(layer):
        torch.testing.assert_close(layer(x), before, rtol=0.05, atol=0.02)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x.float()).dtype == torch.bfloat16
    assert linear_weight(layer.to_linear()).dtype == dense.weight.dtype


def test_a_rank_must_fit():
    with pytest.raises(ValueError, match="rank between 1 and 3"):
        ResidualLinear(3, 5, 4)
