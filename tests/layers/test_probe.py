from __future__ import annotations

import random

import pytest
import torch
from probe_cases import (
    Counting,
    Flat,
    Masked,
    OwnDropout,
    Product,
    Scaled,
    Sequences,
    Transposed,
    Upcast,
    variants,
)
from torch import nn
from torch.nn import functional as F

from fasc_lightning.layers import is_plain_linear
from fasc_lightning.layers._shell import own_class


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (64, 64), (1, 30)])
def test_plain_forwards_are_found(shape, bias):
    assert is_plain_linear(Product(*shape, bias=bias))
    assert is_plain_linear(Counting(*shape, bias=bias))
    assert is_plain_linear(Transposed(*shape))
    if bias:
        assert all(is_plain_linear(kind(*shape)) for kind in (Flat, Sequences, Upcast, Scaled, Masked))


@pytest.mark.parametrize("kind", variants(), ids=lambda kind: kind.__name__)
def test_other_forwards_are_found(kind):
    assert not is_plain_linear(kind(64, 48))
    assert not is_plain_linear(kind(64, 48).eval())


def test_what_a_layer_holds_decides_and_not_its_class():
    layer = Scaled(20, 30)
    layer.scale = 2.0
    assert not is_plain_linear(layer)
    masked = Masked(20, 30)
    masked.mask[3, 4] = 0
    assert not is_plain_linear(masked)
    assert is_plain_linear(OwnDropout(20, 30, p=0.0))
    assert not is_plain_linear(OwnDropout(20, 30, p=0.01).eval())  # it would be gone when training goes on


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_layers_of_every_type_are_tried(dtype):
    assert is_plain_linear(Product(20, 30, dtype=dtype))
    assert is_plain_linear(Upcast(20, 30, dtype=dtype))
    assert not is_plain_linear(variants()[0](20, 30).to(dtype))


def test_outputs_of_another_type_are_not_the_layers():
    class Promoted(nn.Linear):
        def forward(self, x):
            return F.linear(x.float(), self.weight.float(), self.bias.float())

    assert is_plain_linear(Promoted(20, 30))
    assert not is_plain_linear(Promoted(20, 30, dtype=torch.bfloat16))


def test_weights_are_not_read():
    assert is_plain_linear(Product(4000, 3000, device="meta"))
    assert is_plain_linear(Counting(4000, 3000).to("meta"))
    assert not is_plain_linear(nn.LazyLinear(3))


def test_a_trial_leaves_no_traces():
    layer = Counting(12, 8)
    layer.register_forward_hook(lambda *args: pytest.fail("a hook ran"))
    layer.register_forward_pre_hook(lambda *args: pytest.fail("a hook ran"))
    state, rng, python = {k: v.clone() for k, v in layer.state_dict().items()}, torch.get_rng_state(), random.getstate()
    before = dict(vars(layer))
    assert is_plain_linear(layer)
    assert dict(vars(layer)) == before
    assert layer.shapes == []
    assert Counting.calls == 0
    assert all(torch.equal(value, layer.state_dict()[key]) for key, value in state.items())
    assert all(p.grad is None and p.requires_grad for p in layer.parameters())
    assert torch.equal(torch.get_rng_state(), rng)
    assert random.getstate() == python
    assert torch.is_grad_enabled()


def test_trials_do_not_depend_on_where_they_are_made():
    for context in (torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16), torch.device("meta")):
        layer = Product(12, 8)
        with context:
            assert is_plain_linear(layer)
    torch.set_float32_matmul_precision("medium")
    try:
        assert is_plain_linear(Product(64, 48))
    finally:
        torch.set_float32_matmul_precision("highest")


def test_parametrised_subclasses_are_tried_by_their_class():
    layer = nn.utils.parametrizations.weight_norm(Product(12, 8))
    assert is_plain_linear(layer)
    assert not is_plain_linear(nn.utils.parametrizations.weight_norm(variants()[0](12, 8)))


def test_a_forward_given_to_an_instance_is_not_the_class_own():
    layer = nn.Linear(5, 4)
    assert is_plain_linear(layer)
    layer.forward = lambda x: 2 * F.linear(x, layer.weight, layer.bias)
    assert not is_plain_linear(layer)
    bound = nn.Linear(5, 4)
    bound.forward = bound.forward
    assert is_plain_linear(bound)


def test_layers_offloaded_by_accelerate_stay_plain():
    from accelerate.hooks import ModelHook, add_hook_to_module

    assert is_plain_linear(add_hook_to_module(nn.Linear(5, 4), ModelHook()))
    assert is_plain_linear(add_hook_to_module(Product(5, 4), ModelHook()))
    assert not is_plain_linear(add_hook_to_module(variants()[0](5, 4), ModelHook()))


def test_torch_own_subclasses_are_plain():
    assert is_plain_linear(nn.MultiheadAttention(8, 2).out_proj)
    assert not is_plain_linear(nn.Bilinear(3, 3, 3))


def test_the_class_is_the_one_its_author_wrote():
    """FSDP2 puts a class of its own before a module's."""
    wrapper = type("FSDPModule", (), {})
    layer = Product(5, 4)
    layer.__class__ = type("FSDPProduct", (wrapper, Product), {})
    assert own_class(layer) is Product
    assert own_class(nn.utils.parametrizations.weight_norm(Product(5, 4))) is Product
    assert own_class(nn.Linear(5, 4)) is nn.Linear
    assert is_plain_linear(layer)
