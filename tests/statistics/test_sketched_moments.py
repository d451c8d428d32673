from __future__ import annotations

import math

import pytest
import torch
from layer_moments import full_moments
from torch.utils._python_dispatch import TorchDispatchMode

from fasc_lightning.compression import compress_layers, fisher_losses, fisher_metric
from fasc_lightning.compression._gate import variation
from fasc_lightning.solvers import available_methods, get_solver, solver_needs
from fasc_lightning.statistics import (
    CalibrationMoments,
    LayerSketches,
    Sketch,
    dense,
    empty_moments,
    load_moments,
    moments_bytes,
    pack_moments,
    save_moments,
    sketch_figures,
    unpack_moments,
)
from fasc_lightning.statistics._layer_moments import SketchedLayerMoments
from fasc_lightning.statistics._nystrom import NystromMoment

M, N = 24, 40
BOTH = LayerSketches(Sketch(N, 20, 1), Sketch(M, 12, 1))


@pytest.fixture
def data():
    """x and h of ranks 8 and 6, which the sketches hold whole, and a weight."""
    generator = torch.Generator().manual_seed(0)

    def low_rank(d, rank):
        parts = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((90, rank), (rank, d)))
        left, right = parts
        return left @ right

    return low_rank(N, 8), low_rank(M, 6), torch.randn(M, N, generator=generator, dtype=torch.float64)


def gathered(x, h, W, needs, sketches=None) -> CalibrationMoments:
    moments = CalibrationMoments({"a": (M, N)}, torch.float64, needs=needs, sketches=sketches)
    moments.add_inputs(["a"], x)
    moments.add_gradients("a", h)
    if moments.takes_pairs:
        moments.add_pairs("a", x, h, g=h @ W)
    return moments


@pytest.mark.parametrize("method", available_methods())
@pytest.mark.parametrize("sides", [BOTH, LayerSketches(inputs=BOTH.inputs), LayerSketches(outputs=BOTH.outputs)])
def test_every_solver_takes_sketches_and_says_the_same_where_they_hold_all(data, method, sides):
    x, h, W = data
    needs = solver_needs(method)
    exact = get_solver(method)(W, gathered(x, h, W, needs).layer("a"))
    sketched = get_solver(method)(W, gathered(x, h, W, needs, {"a": sides}).layer("a"))
    torch.testing.assert_close(sketched.losses, exact.losses, rtol=1e-5, atol=1e-7 * float(exact.losses[0]))
    if not method.startswith("fasc-eq6"):  # whose vectors are not determined beyond the rank of the data
        k = 4
        torch.testing.assert_close(
            sketched.left[:, :k] @ sketched.right[:k], exact.left[:, :k] @ exact.right[:k], rtol=1e-4, atol=1e-5
        )


def test_moments_without_sketches_are_bit_for_bit_what_they_were(data):
    x, h, W = data
    needs = {"plain", "coupled"}
    one, other = gathered(x, h, W, needs), gathered(x, h, W, needs, {"a": LayerSketches()})
    for moments in (one, other):
        layer = moments.layer("a")
        assert not isinstance(layer, SketchedLayerMoments)
        assert all(isinstance(S, torch.Tensor) for S in (*layer.plain_moments(), *layer.coupled_moments()))
    assert torch.equal(one.layer("a").A, other.layer("a").A)
    assert torch.equal(one.layer("a").G, other.layer("a").G)


def test_what_is_read_as_a_matrix_is_the_form_made_dense(data):
    x, h, W = data
    layer = gathered(x, h, W, {"plain", "coupled"}, {"a": BOTH}).layer("a")
    expected = full_moments(x, h, W)
    assert all(isinstance(S, NystromMoment) for S in (*layer.plain_moments(), *layer.coupled_moments()))
    torch.testing.assert_close(layer.A, expected.A, rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(layer.G, expected.G, rtol=1e-7, atol=1e-8)
    for found, right in zip(layer.coupled or (), expected.coupled or (), strict=True):
        torch.testing.assert_close(found, right, rtol=1e-7, atol=1e-8)


def test_coupled_moments_of_layers_that_did_not_gather_them_are_refused(data):
    x, h, W = data
    with pytest.raises(ValueError, match=r"`coupled`.*it was not gathered"):
        gathered(x, h, W, {"plain"}, {"a": BOTH}).layer("a").coupled_moments()


def test_runs_merge_and_rows_move_as_exact_ones_do(data):
    x, h, W = data
    shapes, sketches = {"a": (M, N), "b": (M, N)}, {"a": BOTH, "b": BOTH}
    parts = [CalibrationMoments(shapes, torch.float64, sketches=sketches) for _ in range(2)]
    for moments, rows in zip(parts, (slice(0, 30), slice(30, 90)), strict=True):
        moments.add_inputs(["a", "b"], x[rows])
        moments.add_gradients("a", h[rows])
    parts[0].move_inputs(["a", "b"], ["a"], x[:30])
    merged = parts[0].add_(parts[1])
    whole = gathered(x, h, W, {"plain"}, {"a": BOTH})
    torch.testing.assert_close(merged.layer("a").A, whole.layer("a").A)
    torch.testing.assert_close(merged.layer("a").G, whole.layer("a").G)


def test_runs_of_other_random_matrices_do_not_merge():
    shapes = {"a": (M, N)}
    other = LayerSketches(Sketch(N, 20, 2), Sketch(M, 12, 2))
    mine, theirs = (CalibrationMoments(shapes, sketches={"a": sides}) for sides in (BOTH, other))
    with pytest.raises(ValueError, match="the same sketches"):
        mine.add_(theirs)


def test_a_file_brings_sketches_back(data, tmp_path):
    x, h, W = data
    moments = gathered(x, h, W, {"plain", "coupled"}, {"a": BOTH})
    save_moments(moments, tmp_path / "moments")
    loaded = load_moments(tmp_path / "moments")
    assert loaded.sketches == {"a": BOTH}
    assert torch.equal(loaded.layer("a").A, moments.layer("a").A)
    assert torch.equal(loaded.G("a"), moments.G("a"))


def test_moments_of_nothing_add_up_with_those_of_a_file(data):
    x, h, W = data
    moments = gathered(x, h, W, {"coupled"}, {"a": BOTH})
    tensors, header = pack_moments(moments)
    empty = empty_moments(header)
    assert empty.nbytes < 100
    assert torch.equal(empty.add_(moments).layer("a").A, unpack_moments(header, tensors.__getitem__).layer("a").A)


def test_variation_and_mean_square_need_the_exact_diagonal_alone(data):
    x, h, W = data
    exact, sketched = (gathered(x, h, W, {"plain"}, sketches) for sketches in (None, {"a": BOTH}))
    assert variation(sketched.gradients["a"]) == pytest.approx(variation(exact.gradients["a"]))


def test_memory_is_predicted_to_the_byte(data):
    x, h, W = data
    for needs in ({"plain"}, {"coupled"}):
        moments = gathered(x, h, W, needs, {"a": BOTH})
        counts = 8 * sum(1 for _ in moments._streams())  # one float64 a stream is not predicted
        assert moments_bytes([(M, N)], torch.float64, needs, [BOTH]) == moments.nbytes - counts


def test_layers_of_a_model_are_factorised_from_sketches(data):
    x, h, W = data
    linear = torch.nn.Linear(N, M, bias=False, dtype=torch.float64)
    linear.weight.data.copy_(W)
    found = [
        compress_layers({"a": linear}, gathered(x, h, W, {"coupled"}, sketches), rank=0.25, allocation="uniform")
        for sketches in (None, {"a": BOTH})
    ]
    exact, sketched = (result.replacements["a"](x) for result in found)
    torch.testing.assert_close(sketched, exact, rtol=1e-4, atol=1e-4)
    assert found[0].layers[0].rank == found[1].layers[0].rank


@pytest.mark.parametrize(
    ("sketches", "message"),
    [
        ({"z": BOTH}, "'z' is none of the 2"),
        ({"a": LayerSketches(Sketch(M, 5), None)}, "width 40 for layer 'a'"),
        ({"a": BOTH}, "one sketch for all inputs of width 40"),
    ],
)
def test_sketches_that_do_not_fit_the_layers_are_refused(sketches, message):
    with pytest.raises(ValueError, match=message):
        CalibrationMoments({"a": (M, N), "b": (M, N)}, sketches=sketches)


def test_inputs_that_are_never_shared_may_differ():
    CalibrationMoments({"a": (M, N), "b": (M, N)}, needs={"coupled"}, sketches={"a": BOTH})


def test_a_report_has_the_size_and_the_error_of_each_sketched_side(data):
    x, h, W = data
    moments = gathered(x, h, W, {"plain", "coupled"}, {"a": BOTH})
    found = sketch_figures(BOTH, moments.layer("a"))
    assert {side: figures["size"] for side, figures in found.items()} == {"inputs": 20, "outputs": 12}
    assert all(0 <= figures["error"] < 1e-6 for figures in found.values())
    assert sketch_figures(LayerSketches(), moments.layer("a")) == {}
    gaussian = LayerSketches(Sketch(N, 20, kind="gaussian"))
    found = sketch_figures(gaussian, gathered(x, h, W, {"plain"}, {"a": gaussian}).layer("a"))
    assert set(found) == {"inputs"}
    assert math.isnan(found["inputs"]["error"])


@pytest.fixture
def wide():
    """A layer with far more inputs than outputs: tokens of low rank and noise."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(300, 6, generator=generator) @ torch.randn(6, 200, generator=generator)
    x = x + 0.1 * torch.randn(300, 200, generator=generator)
    h = torch.randn(300, 10, generator=generator)
    W = torch.randn(10, 200, generator=generator, dtype=torch.float64)
    return x, h, W


class NoSquares(TorchDispatchMode):
    """Refuses to make tensors as large as a square of a width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        assert not (isinstance(result, torch.Tensor) and result.numel() >= self.width**2), func
        return result


#: Those that need eigenvectors of the wider side's own moment, or a square of it by what they are.
SQUARE = {"svd", "grad-svd", "fasc-eq6", "fasc-eq6-centred", "fasc-eq6-literal", "gfwsvd"}


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("method", sorted(set(available_methods()) - SQUARE))
def test_no_square_of_the_wide_side_is_ever_made(wide, method, transposed):
    x, h, W = wide
    sides = LayerSketches(Sketch(200, 40, 1), None)
    if transposed:
        x, h, W, sides = h, x, W.T.contiguous(), LayerSketches(None, sides.inputs)
    m, n = W.shape
    needs = solver_needs(method)
    with NoSquares(200):
        moments = CalibrationMoments({"a": (m, n)}, needs=needs, sketches={"a": sides})
        for part in range(0, 300, 50):
            rows = slice(part, part + 50)
            moments.add_inputs(["a"], x[rows])
            moments.add_gradients("a", h[rows])
            if moments.takes_pairs:
                moments.add_pairs("a", x[rows], h[rows])
        layer = moments.layer("a")
        found = get_solver(method)(W, layer)
        losses = fisher_losses(W, *fisher_metric(layer), found)
    A, G = (dense(S) for S in fisher_metric(layer))
    B, C = found.truncate(4)
    D = W - B.double() @ C.double()
    torch.testing.assert_close(losses[4], torch.trace(G @ D @ A @ D.T), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("method", ["fasc", "fasc-plain", "svd-llm", "svd", "fisher-diag", "weight-svd"])
def test_low_rank_and_noise_cost_a_solver_next_to_nothing(wide, method):
    x, h, W = wide
    sides = LayerSketches(Sketch(200, 40, 1), None)
    needs = solver_needs(method)
    layers = []
    for sketches in (None, {"a": sides}):
        moments = CalibrationMoments({"a": (10, 200)}, needs=needs, sketches=sketches)
        moments.add_inputs(["a"], x)
        moments.add_gradients("a", h)
        if moments.takes_pairs:
            moments.add_pairs("a", x, h)
        layers.append(moments.layer("a"))
    # Judged by the exact moments: what the factors lose, not what a solver says of them.
    metric = fisher_metric(layers[0])
    exact, sketched = (fisher_losses(W, *metric, get_solver(method)(W, layer)) for layer in layers)
    k = 5
    assert sketched[k] <= 1.02 * exact[k]
