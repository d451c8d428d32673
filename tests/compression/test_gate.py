from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from tiny import causal_model

from fasc_lightning import FascCallback, Gate
from fasc_lightning.compression import choose_methods, excluded_layers, failure_flags
from fasc_lightning.compression._gate import early_attention, last_projections, variation
from fasc_lightning.layers import select_layers
from fasc_lightning.statistics import CalibrationMoments, Moments


def test_layers_above_the_gate_get_the_method_and_the_others_the_cheap_one():
    scores = {"a": 0.5, "b": 0.3, "c": -0.2, "d": 0.31}
    assert choose_methods(scores, 0.3) == {"a": "fasc", "b": "svd", "c": "svd", "d": "fasc"}
    assert choose_methods(scores, 0.0, "svd-llm") == {"a": "svd-llm", "b": "svd-llm", "c": "svd", "d": "svd-llm"}


def test_an_undefined_score_gets_the_method():
    assert choose_methods({"a": math.nan, "b": 0.1}, 1.0) == {"a": "fasc", "b": "svd"}


def test_without_a_gate_every_layer_gets_the_method():
    assert choose_methods({"a": 0.0, "b": math.nan}, None, "svd-llm") == {"a": "svd-llm", "b": "svd-llm"}


def test_excluded_layers_are_not_decided_by_their_score():
    scores = {"layers.0.attn.q_proj": 0.9, "layers.0.up": math.nan, "layers.9.attn.q_proj": 0.9}
    assert set(choose_methods(scores, 0.3, exclude=r".*q_proj").values()) == {"svd", "fasc"}
    assert choose_methods(scores, 0.3, exclude=["q_proj", "up"]) == dict.fromkeys(scores, "svd")
    assert choose_methods(scores, 0.3, exclude="paper")["layers.0.attn.q_proj"] == "svd"
    assert choose_methods(scores, 0.3, exclude="paper")["layers.9.attn.q_proj"] == "fasc"


@pytest.mark.parametrize(
    ("family", "attention", "last"),
    [
        ("llama", {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"}, {
            "self_attn.o_proj", "mlp.down_proj",
        }),
        ("gpt2", {"attn.c_attn", "attn.c_proj"}, {"attn.c_proj", "mlp.c_proj"}),
        ("opt", {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj"}, {
            "self_attn.out_proj", "fc2",
        }),
        ("gpt_neox", {"attention.query_key_value", "attention.dense"}, {"attention.dense", "mlp.dense_4h_to_h"}),
    ],
)  # fmt: skip
def test_the_papers_exclusions_in_several_families(family, attention, last):
    layers = {"n_layer" if family == "gpt2" else "num_hidden_layers": 5}
    names = list(select_layers(causal_model(family, **layers)))
    in_block = {name: (int(next(p for p in name.split(".") if p.isdecimal())), name) for name in names}
    expected_attention = {n for n, (i, _) in in_block.items() if i < 3 and n.endswith(tuple(attention))}
    expected_last = {n for n, (i, _) in in_block.items() if i == 4 and n.endswith(tuple(last))}
    assert len(expected_attention) == 3 * len(attention)
    assert len(expected_last) == len(last)
    assert early_attention(names) == expected_attention
    assert last_projections(names) == expected_last
    assert excluded_layers(names, "paper") == expected_attention | expected_last
    assert excluded_layers(names, None) == set()


def test_each_stack_has_a_last_block_of_its_own():
    names = ["vision.layers.1.fc2", "vision.layers.0.fc2", "text.layers.3.fc2", "text.layers.1.fc2", "head.fc2"]
    assert last_projections(names) == {"vision.layers.1.fc2", "text.layers.3.fc2"}


def test_layers_outside_of_blocks_are_not_excluded():
    names = ["attention.query", "down_proj", "lm_head"]
    assert excluded_layers(names, "paper") == set()


def fed(vectors: torch.Tensor) -> Moments:
    moments = Moments(vectors.shape[1])
    moments.update(vectors)
    return moments


@pytest.mark.parametrize("d", [1, 5, 200])
def test_variation_is_the_share_of_the_variance(d):
    vectors = torch.randn(50, d) + 2
    expected = np.var(vectors.double().numpy(), axis=0).sum() / (vectors.double().numpy() ** 2).mean(0).sum()
    assert variation(fed(vectors)) == pytest.approx(expected, rel=1e-4)
    assert variation(fed(1e-12 * vectors)) == pytest.approx(expected, rel=1e-4)


def test_constant_vectors_do_not_vary():
    assert variation(fed(torch.ones(10, 3))) == pytest.approx(0, abs=1e-6)
    assert variation(fed(torch.zeros(10, 3))) == 0


def test_flags_name_the_failure_modes_and_scale_does_not_matter():
    names = ["h.0.attn.q", "h.0.up", "h.5.up", "h.5.down_proj", "h.5.gate", "h.4.up"]
    moments = CalibrationMoments(dict.fromkeys(names, (4, 3)))
    noise = torch.randn(100, 4)
    noise -= noise.mean(0)
    noise /= noise.square().sum(1).mean().sqrt()
    unit = torch.tensor([1.0, 0.0, 0.0, 0.0])
    for name in names[:5]:
        moments.add_inputs([name], torch.randn(100, 3))
    moments.add_gradients("h.0.attn.q", 1e-9 * (unit + 0.05 * noise))
    moments.add_gradients("h.0.up", 1e-9 * noise)  # far below the paper's absolute 1e-4, and not constant at all
    moments.add_gradients("h.5.up", 1e6 * (unit + 0.2 * noise))
    moments.add_gradients("h.5.down_proj", 1e6 * (unit + 0.05 * noise))
    moments.add_gradients("h.5.gate", torch.zeros(100, 4))
    assert failure_flags(names, moments) == {
        "h.0.attn.q": ("near-constant gradients", "early attention"),
        "h.0.up": (),
        "h.5.up": (),
        "h.5.down_proj": ("near-constant gradients", "last projection"),
        "h.5.gate": ("near-constant gradients",),
        "h.4.up": (),
    }


def test_good_options_pass():
    FascCallback(keep=0.5, gate=None)
    FascCallback(keep=0.5, gate=0.3)
    FascCallback(keep=0.5, gate=Gate(1, "rho", "paper"), method="svd-llm")
    FascCallback(keep=0.5, gate=Gate(0, "debiased", ["q_proj"]))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"gate": -0.1}, ValueError, r"in \[0, 1\], as rho is, but got -0.1"),
        ({"gate": 1.5}, ValueError, r"but got 1.5"),
        ({"gate": math.nan}, ValueError, "but got nan"),
        ({"gate": "0.3"}, TypeError, "a number in"),
        ({"gate": True}, TypeError, "but got True"),
        ({"gate": 0.3, "gate_by": "null"}, ValueError, "one of debiased, pooled, rho but got 'null'"),
        ({"gate": 0.3, "method": "svd"}, ValueError, "nothing to decide"),
        ({"gate": 0.3, "method": "pca"}, ValueError, "one of asvd, fasc, .* but got 'pca'"),
        ({"gate": None, "gate_exclude": "paper"}, ValueError, "together with a `gate`"),
        ({"gate": 0.3, "gate_exclude": 3}, TypeError, "but got 3|got 3"),
        ({"gate": 0.3, "gate_exclude": [3]}, TypeError, r"got \[3\]"),
    ],
)
def test_bad_options_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        FascCallback(keep=0.5, **options)
