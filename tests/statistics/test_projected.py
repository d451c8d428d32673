from __future__ import annotations

import pytest
import torch
from tiny import causal_model, token_loader

from fasc_lightning import FascCallback, compress
from fasc_lightning.calibration import projected
from fasc_lightning.solvers import get_solver, shrink
from fasc_lightning.statistics import (
    CalibrationMoments,
    LayerSketches,
    Projection,
    congruence,
    dense,
    load_moments,
    save_moments,
)
from fasc_lightning.statistics._layer_moments import SketchedLayerMoments

TALL, WIDE = (9, 4), (4, 9)


def data(shape, tokens=50):
    generator = torch.Generator().manual_seed(sum(shape) + shape[0])
    (m, n), kind = shape, torch.float64
    x, h = (torch.randn(tokens, d, generator=generator, dtype=kind) for d in (n, m))
    return torch.randn(m, n, generator=generator, dtype=kind), x, h


def gathered(shape, sketches, seen=True):
    W, x, h = data(shape)
    moments = CalibrationMoments({"layer": shape}, torch.float64, needs={"coupled"}, sketches=sketches)
    for rows in (slice(0, 20), slice(20, None)):
        moments.add_inputs(("layer",), x[rows])
        moments.add_gradients("layer", h[rows], 3.0)
        through = {"inputs": x @ W.T, "outputs": h @ W, None: None}[moments.projects("layer")] if seen else None
        moments.add_pairs("layer", x[rows], h[rows], scale=3.0, seen=None if through is None else through[rows])
    return W, moments


@pytest.mark.parametrize("shape", [TALL, WIDE])
def test_factors_from_projected_moments_are_those_from_whole_ones(shape):
    W, whole = gathered(shape, None)
    _, seen = gathered(shape, {"layer": projected(*shape)})
    assert isinstance(seen.layer("layer"), SketchedLayerMoments)
    first, second = (get_solver("fasc")(W, moments.layer("layer")) for moments in (whole, seen))
    torch.testing.assert_close(first.losses, second.losses)
    for k in (1, 3, 4):
        (B, C), (D, E) = first.truncate(k), second.truncate(k)
        torch.testing.assert_close(B @ C, D @ E)


@pytest.mark.parametrize("shape", [TALL, WIDE])
@pytest.mark.parametrize("amount", [0.0, 0.3])
def test_what_the_weight_lets_through_is_the_congruence_of_the_whole_moment(shape, amount):
    W, whole = gathered(shape, None)
    _, seen = gathered(shape, {"layer": projected(*shape)})
    side = 1 if shape == TALL else 0
    exact, held = whole.layer("layer").coupled_moments()[side], seen.layer("layer").coupled_moments()[side]
    V = W.T if shape == TALL else W
    torch.testing.assert_close(congruence(V, shrink(held.double(), amount)), V @ shrink(exact.double(), amount) @ V.T)
    torch.testing.assert_close(held.diagonal().mean(), exact.diagonal().mean())
    twice = shrink(shrink(held.double(), amount), 0.2)
    torch.testing.assert_close(congruence(V, twice), V @ shrink(shrink(exact.double(), amount), 0.2) @ V.T)


def test_the_whole_moment_is_not_to_be_had():
    _, seen = gathered(WIDE, {"layer": projected(*WIDE)})
    with pytest.raises(ValueError, match="holds only what the layer's weight lets through"):
        dense(seen.layer("layer").coupled_moments()[0])


def test_rows_that_the_weight_has_not_seen_are_refused():
    with pytest.raises(ValueError, match="rows times the layer's weight"):
        gathered(WIDE, {"layer": projected(*WIDE)}, seen=False)


def test_projected_moments_add_up_and_go_through_a_file(tmp_path):
    W, one = gathered(WIDE, {"layer": projected(*WIDE)})
    _, other = gathered(WIDE, {"layer": projected(*WIDE)})
    one.add_(other)
    save_moments(one, tmp_path / "moments.safetensors", "here")
    again = load_moments(tmp_path / "moments.safetensors")
    assert again.sketches == one.sketches
    first, second = (get_solver("fasc")(W, moments.layer("layer")) for moments in (other, again))
    torch.testing.assert_close(first.losses, second.losses)


def test_projected_moments_do_not_serve_layers_that_share_inputs():
    with pytest.raises(ValueError, match="nothing but 'coupled'"):
        CalibrationMoments({"layer": WIDE}, needs={"plain"}, sketches={"layer": projected(*WIDE)})


def test_a_side_is_projected_to_a_narrower_one():
    assert projected(9, 4) == LayerSketches(outputs=Projection(9, 4))
    assert projected(4, 9) == LayerSketches(inputs=Projection(9, 4))
    with pytest.raises(ValueError, match="narrower"):
        Projection(4, 4)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("options", [{}, {"passes": 2}])
def test_a_compression_by_projected_moments_is_the_exact_one_in_less_memory(family, options):
    def compressed(**more):
        model = causal_model(family).eval()
        report = compress(model, token_loader(), keep=0.6, refit=False, progress=False, **options, **more)
        return model, report

    (exact, first), (seen, second) = compressed(), compressed(sketch="projected")
    assert [(a.name, a.rank, a.layout) for a in first.layers] == [(b.name, b.rank, b.layout) for b in second.layers]
    ids = torch.arange(3, 19)[None]
    torch.testing.assert_close(exact(ids).logits, seen(ids).logits, rtol=1e-4, atol=1e-5)
    assert second.moments_bytes < 0.9 * first.moments_bytes


def test_the_weight_lets_through_the_same_in_bfloat16():
    def losses(**more):
        model = causal_model().eval().bfloat16()
        report = compress(model, token_loader(), keep=0.6, refit=False, allocation="fisher", progress=False, **more)
        return [layer.loss for layer in report.layers]

    # A product in bfloat16 is off by 2^-9 at random, the same in all ranks.
    assert losses(sketch="projected") == pytest.approx(losses(), rel=1e-3)


def test_the_refit_is_left_out_unless_it_is_insisted_on():
    report = compress(causal_model().eval(), token_loader(), keep=0.6, sketch="projected", progress=False)
    assert report.refit is None
    assert report.options["sketch"] == "projected"


@pytest.mark.parametrize(
    "options",
    [{"update_weights": True}, {"method": "svd-llm"}, {"gate": 0.1}, {"refit": True}],
)
def test_options_that_need_whole_moments_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        FascCallback(keep=0.6, sketch="projected", **{"update_weights": False, **options})
