"""Which modules hold experts, what routes to them, and what layers are only named like theirs."""

from __future__ import annotations

import pytest
import torch
from expert_cases import MIXTURES, PLACE, E, H, batches, fused, make
from torch import nn

from fasc_lightning.layers import UnfusedExperts, expert_layers, select_layers, split_name, unfuse
from fasc_lightning.layers._fused_experts import holds_experts, is_fused_experts, routers
from fasc_lightning.models import quantize
from fasc_lightning.refit._checks import check_refit


class Block(nn.Module):
    """A block of a mixture by other names than transformers', around real experts."""

    def __init__(self, experts: nn.Module, **others: nn.Module) -> None:
        super().__init__()
        self.experts = experts
        for name, module in others.items():
            self.add_module(name, module)


class Gating(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(H, 7), nn.Linear(7, E)


def shared_expert(width: int) -> nn.ModuleDict:
    return nn.ModuleDict({"gate_proj": nn.Linear(H, width), "down_proj": nn.Linear(width, 1)})


@pytest.mark.parametrize("taken_apart", [False, True])
def test_projections_of_a_shared_expert_are_no_routers_however_wide(taken_apart):
    experts = fused(make("mixtral"))
    block = Block(
        UnfusedExperts(experts) if taken_apart else experts,
        gate=nn.Linear(H, E),
        shared_expert=shared_expert(E),
        shared_expert_gate=nn.Linear(H, 1),
        other=nn.Linear(H, 2 * E),
    )
    assert routers(block) == {id(block.gate), id(block.shared_expert_gate)}


@pytest.mark.parametrize("name", ["router", "gating", "gate"])
def test_all_layers_of_a_router_that_is_a_module_are_left_alone_and_nothing_beside_it(name):
    router = Gating() if name != "router" else nn.Sequential(nn.Linear(H, 7), nn.Linear(7, E))
    # As in a decoder layer whose experts and router are its own children, beside projections of any width.
    block = Block(fused(make("mixtral")), **{name: router}, k_proj=nn.Linear(H, E), mlp=shared_expert(E))
    assert routers(block) == {id(part) for part in router.modules() if isinstance(part, nn.Linear)}


def test_a_shared_expert_as_wide_as_there_are_experts_is_compressed():
    model = make("qwen2")
    block = model.model.layers[0].mlp
    block.shared_expert.gate_proj = nn.Linear(H, E, bias=False)
    names = set(select_layers(model))
    assert "model.layers.0.mlp.shared_expert.gate_proj" in names
    assert not any(name.endswith(("shared_expert_gate", "mlp.gate")) for name in names)


def test_blocks_with_projections_named_like_those_of_experts_are_no_experts():
    block = nn.ModuleDict({"w_gate": nn.Linear(4, 8), "w_up": nn.Linear(4, 8), "w_down": nn.Linear(8, 4)})
    model = nn.Module()
    model.layers = nn.ModuleList([block])
    model.experts = nn.ModuleList([block])
    assert split_name("layers.0.w_up") is None
    assert split_name("experts.0.w_up") == ("experts", 0, "w_up")
    assert expert_layers(model, ["layers.0.w_up", "experts.0.w_up"]) == []
    with pytest.raises(ValueError, match="Expected") as refused:
        check_refit(model, ["experts.0.w_up"])
    assert "go into each expert" not in str(refused.value)


def test_fused_experts_under_a_name_that_does_not_say_so_are_left_alone():
    model = Block(nn.Identity(), ffn=fused(make("mixtral")), proj=nn.Linear(2, 3))
    assert is_fused_experts(model.ffn)
    assert holds_experts("experts", model.ffn)
    assert not holds_experts("ffn", model.ffn)
    assert list(select_layers(model)) == ["proj"]


@pytest.mark.parametrize("family", MIXTURES)
def test_experts_without_tokens_have_zero_gradients_as_those_of_a_fused_module_have(family):
    model, other = make(family), make(family)
    unfuse(other, [f"{PLACE}.0.w_up"])
    ids = batches(1)[0]["input_ids"][:1, :2]  # two tokens cannot reach all experts
    torch.manual_seed(0)
    for each in (model, other):
        each(input_ids=ids, labels=ids).loss.backward()
    experts, apart = fused(model), fused(other)
    idle = [e for e in range(E) if not experts.down_proj.grad[e].any()]
    if not idle:
        pytest.skip("two tokens reached four experts")
    width = experts.gate_up_proj.shape[1] // 2
    for e in range(E):
        torch.testing.assert_close(apart.layer(e, "w_down").weight.grad, experts.down_proj.grad[e])
        torch.testing.assert_close(apart.layer(e, "w_gate").weight.grad, experts.gate_up_proj.grad[e, :width])
    other.zero_grad()
    other.requires_grad_(False)
    apart.layer(idle[0], "w_up").requires_grad_(True)
    other(input_ids=ids, labels=ids).loss.backward()
    assert not apart.layer(idle[0], "w_up").weight.grad.any()


def test_int8_takes_the_experts_of_a_dense_mixture_and_puts_them_back_if_it_fails():
    model = make("qwen3")
    ids = batches(1)[0]["input_ids"]
    expected, dense = model(ids).logits, fused(model)
    with torch.no_grad():
        kept = dense.down_proj[2, 0, 0].item()
        dense.down_proj[2, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="cannot be quantised"):
        quantize(model)
    assert fused(model) is dense
    with torch.no_grad():
        dense.down_proj[2, 0, 0] = kept
    names = quantize(model)
    assert len([name for name in names if split_name(name)]) == 3 * E
    assert not any(name.endswith("mlp.gate") for name in names)
    assert fused(model).layer(0, "w_up").matrix.weight.dtype == torch.int8
    assert (model(ids).logits - expected).abs().max() < 0.05 * expected.abs().max()
