"""Mixture of experts: taps, moments, compression, plans, checkpoints and folders of fused experts."""

import copy
import math

import pytest
import torch
from expert_cases import COMMON, MIXTURES, PLACE, E, H, K, batches, fused, make
from tiny import aligned
from torch import nn
from transformers import GptOssConfig, GptOssForCausalLM

from fasc_lightning import apply_plan, compress, compression_plan, load_compressed
from fasc_lightning.batches import TokenRows
from fasc_lightning.compression._expert_report import expert_rows
from fasc_lightning.hooks import Taps
from fasc_lightning.layers import (
    LowRankLinear,
    UnfusedExperts,
    layer_shapes,
    linear_shape,
    model_size,
    named_layers,
    select_layers,
    split_name,
    swap_modules,
    swap_to_dense,
    unfuse,
)
from fasc_lightning.layers._fused_experts import is_fused_experts, unknown_experts
from fasc_lightning.models._checkpoints import match_state_dict
from fasc_lightning.refit import RefitError
from fasc_lightning.statistics import CalibrationMoments


@pytest.fixture(params=MIXTURES)
def model(request):
    return make(request.param)


@pytest.fixture
def batch():
    torch.manual_seed(1)
    ids, mask = torch.randint(1, 64, (3, 10)), torch.ones(3, 10, dtype=torch.long)
    mask[1, 7:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def test_experts_have_names_and_routers_are_left_alone(model):
    layers = select_layers(model)
    names = [name for name in layers if split_name(name)]
    assert len(names) == 3 * E
    assert names[0] == f"{PLACE}.0.w_gate"
    assert not any(name.endswith((".gate", "shared_expert_gate")) for name in layers)
    assert linear_shape(layers[f"{PLACE}.2.w_up"])[1] == H
    assert set(select_layers(model, ["w_down"])) == {f"{PLACE}.{e}.w_down" for e in range(E)}
    weight = layers[f"{PLACE}.3.w_down"].weight
    assert weight.data_ptr() == fused(model).down_proj[3].data_ptr()


def test_tapped_experts_compute_the_same_numbers_to_the_last_bit_and_count_each_experts_tokens(model, batch):
    layers, state = select_layers(model), list(model.state_dict())
    expected = model(**batch)
    expected.loss.backward()
    gradient = fused(model).down_proj.grad.clone()
    model.zero_grad()
    taps = Taps(layers, CalibrationMoments(layer_shapes(layers)))
    taps.install()
    taps.begin_batch(TokenRows(mask=batch["attention_mask"]))
    got = model(**batch)
    assert torch.equal(got.logits, expected.logits)
    got.loss.backward()
    taps.end_batch()
    assert torch.equal(fused(model).down_proj.grad, gradient)
    assert list(model.state_dict()) == state
    taps.remove()
    assert "forward" not in vars(fused(model))


def test_moments_of_experts_are_those_of_their_real_tokens(model, batch):
    model.double()
    layers = select_layers(model, ["w_gate", "w_up", "w_down"])
    moments = CalibrationMoments(layer_shapes(layers), torch.float64, needs={"C"})
    seen = []
    handle = fused(model).register_forward_pre_hook(lambda module, args: seen.append(args))
    taps = Taps(layers, moments)
    taps.install()
    terms = int((batch["labels"][:, 1:] != -100).sum())
    taps.begin_batch(TokenRows(mask=batch["attention_mask"], scale=terms))
    model(**batch).loss.backward()
    taps.end_batch()
    taps.remove()
    handle.remove()
    x, index, _ = seen[0]
    real = batch["attention_mask"].flatten().bool()
    experts, width = fused(model), fused(model).gate_up_proj.shape[1] // 2
    for e in range(E):
        mine = (index == e).any(1) & real
        assert moments.tokens(f"{PLACE}.{e}.w_gate") == int(mine.sum()) > 0
        gate, up, down = (moments.layer(f"{PLACE}.{e}.{p}") for p in ("w_gate", "w_up", "w_down"))
        rows = x[mine].detach()
        torch.testing.assert_close(gate.A, rows.T @ rows / len(rows))
        assert torch.equal(gate.A, up.A)
        # The sum of h x^T over tokens is the gradient of the weight; padding has none.
        pair = experts.gate_up_proj.grad[e] * terms
        torch.testing.assert_close(gate.C.T * gate.tokens, pair[:width])
        torch.testing.assert_close(up.C.T * up.tokens, pair[width:])
        torch.testing.assert_close(down.C.T * down.tokens, experts.down_proj.grad[e] * terms)
    assert len([key for key in moments.inputs if len(key) == 2]) == E  # gate and up share their A


def test_rows_of_an_expert_are_ordered_by_token_and_counted_by_sequence():
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    order, lengths = TokenRows(mask=mask).routed(torch.tensor([5, 3, 0, 4, 2]), 8)
    assert order.tolist() == [2, 4, 3, 0]  # tokens 0, 2, 4, 5; token 3 is padding
    assert lengths == [2, 2]
    order, lengths = TokenRows().routed(torch.tensor([2, 0]), 3)
    assert (order.tolist(), lengths) == ([1, 0], [2])


def test_unfused_experts_compute_what_fused_ones_do_and_fuse_again(model, batch):
    expected = model(**batch).logits
    state = {name: value.clone() for name, value in model.state_dict().items()}
    unfuse(model, [f"{PLACE}.0.w_gate", "lm_head"])
    assert isinstance(fused(model), UnfusedExperts)
    torch.testing.assert_close(model(**batch).logits, expected, rtol=1e-5, atol=1e-6)
    swap_to_dense(model)
    assert is_fused_experts(fused(model))
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_swap_of_experts_is_undone_by_what_it_returns(model, batch):
    dense = fused(model)
    m, n = linear_shape(named_layers(model)[f"{PLACE}.1.w_up"])
    replaced = swap_modules(model, {f"{PLACE}.1.w_up": LowRankLinear(n, m, 2, bias=False)})
    assert fused(model).layer(1, "w_up").rank == 2
    assert torch.equal(fused(model).layer(0, "w_down").weight, dense.down_proj[0])
    swap_modules(model, replaced)
    assert fused(model) is dense
    with pytest.raises(ValueError, match="Expected a replacement of shape"):
        swap_modules(model, {f"{PLACE}.1.w_up": LowRankLinear(n + 1, m, 2, bias=False)})


@pytest.mark.parametrize("family", MIXTURES)
def test_compressed_experts_save_reload_and_generate(family, tmp_path):
    model = make(family)
    router = copy.deepcopy(model.model.layers[0].mlp.gate.state_dict())
    before = model_size(model)
    report = compress(model, batches(), keep=0.6, refit=False, progress=False)
    experts = [layer for layer in report.layers if split_name(layer.name)]
    assert len(experts) == 3 * E
    assert report.kept <= 0.6
    dense = sum(math.prod(layer.shape) for layer in report.layers)
    assert report.targeted["dense"].parameters >= dense
    assert model_size(model).parameters < before.parameters
    assert report.whole["compressed"].flops_per_token < report.whole["dense"].flops_per_token
    assert sum(layer.tokens for layer in experts if layer.name.endswith("w_up")) == K * 4 * 4 * 24
    after = model.model.layers[0].mlp.gate.state_dict()
    assert all(torch.equal(router[name], after[name]) for name in router)
    assert {row.expert for row in expert_rows(report.layers)} == set(range(E))

    model.save_pretrained(tmp_path)
    again = aligned(load_compressed(tmp_path))
    ids = batches(1)[0]["input_ids"]
    assert torch.equal(again(ids).logits, model(ids).logits)
    options = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(again.generate(ids[:1], **options), model.generate(ids[:1], **options))
    swap_to_dense(again)
    assert is_fused_experts(fused(again))
    torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)


def test_plan_and_checkpoints_of_experts_move_between_models():
    model, other = make("qwen3"), make("qwen3")
    dense = copy.deepcopy(model.state_dict())
    m, n = linear_shape(named_layers(model)[f"{PLACE}.1.w_up"])
    layer = LowRankLinear(n, m, 2, bias=False)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    swap_modules(model, {f"{PLACE}.1.w_up": layer})
    apply_plan(other, compression_plan(model))
    assert compression_plan(other) == compression_plan(model)
    fresh = make("qwen3")
    match_state_dict(fresh, model.state_dict())
    fresh.load_state_dict(model.state_dict())
    ids = batches(1)[0]["input_ids"]
    assert torch.equal(fresh(ids).logits, model(ids).logits)
    with pytest.warns(UserWarning, match="is dense now"):
        match_state_dict(fresh, dense)
    fresh.load_state_dict(dense)
    assert torch.equal(fresh(ids).logits, make("qwen3")(ids).logits)


def test_an_expert_that_the_router_never_chooses_stays_dense_and_it_is_said():
    model = make("mixtral")

    def without_last(module, args, output):
        weights, index = output[0].softmax(-1)[:, : E - 1].topk(K)
        return output[0], weights / weights.sum(-1, keepdim=True), index

    model.model.layers[0].mlp.gate.register_forward_hook(without_last)
    with pytest.warns(UserWarning, match="3 of .* layers stay dense because no gradient"):
        report = compress(model, batches(), keep=0.7, refit=False, allocation="fisher", progress=False)
    last = [layer for layer in report.layers if layer.name.startswith(f"{PLACE}.{E - 1}.")]
    assert [layer.layout for layer in last] == ["dense"] * 3
    assert [layer.tokens for layer in last] == [0] * 3


def test_experts_of_an_unknown_kind_stay_dense_and_it_is_said():
    torch.manual_seed(0)
    model = GptOssForCausalLM(GptOssConfig(**COMMON, num_local_experts=E, head_dim=8)).eval()
    assert unknown_experts(model) == [PLACE]
    with pytest.warns(UserWarning, match="experts of a kind that is not known"):
        report = compress(model, batches(2), keep=0.8, refit=False, allocation="fisher", progress=False)
    assert not any("experts" in layer.name for layer in report.layers)
    assert fused(model).gate_up_proj.ndim == 3


def test_experts_are_held_in_int8_those_that_stay_dense_included(tmp_path):
    model = make("qwen3")
    report = compress(model, batches(2), rank=1.0, refit=False, allocation="fisher", quantize="int8", progress=False)
    assert len([name for name in report.plan if split_name(name)]) == 3 * E
    assert report.targeted["compressed"].bytes < 0.5 * report.targeted["dense"].bytes
    model.save_pretrained(tmp_path)
    ids = batches(1)[0]["input_ids"]
    assert torch.equal(load_compressed(tmp_path)(ids).logits, model(ids).logits)


def test_a_forward_that_the_module_already_had_is_put_back(model, batch):
    experts, calls = fused(model), []
    own = experts.forward

    def forward(*args):
        calls.append(len(args))
        return own(*args)

    experts.forward = forward
    layers = select_layers(model)
    taps = Taps(layers, CalibrationMoments(layer_shapes(layers)))
    taps.install()
    with torch.no_grad():
        model(**batch)
    assert calls == [3]
    taps.remove()
    taps.remove()
    assert vars(experts)["forward"] is forward


@pytest.mark.parametrize("shared", [True, False])
def test_two_observers_of_experts_do_not_end_each_other(batch, shared):
    model = make("mixtral")
    layers = select_layers(model)
    seen = [layers, layers if shared else select_layers(model)]
    first, second = (Taps(each, CalibrationMoments(layer_shapes(each))) for each in seen)
    for round_ in range(2):
        for taps in (first, second):
            taps.install()
            taps.begin_batch(TokenRows(mask=batch["attention_mask"]))
        model(**batch).loss.backward()
        if round_ == 0:
            for taps in (first, second):
                taps.end_batch()
            second.remove()
    first.remove()
    second.remove()
    counts = [[taps.moments.tokens(f"{PLACE}.{e}.w_up") for e in range(E)] for taps in (first, second)]
    assert counts[0] == counts[1]
    assert sum(counts[0]) == 2 * K * int(batch["attention_mask"].sum())
    assert not {"forward", "_fasc_views", "_fasc_before"} & set(vars(fused(model)))


def test_a_refit_of_experts_is_refused_before_any_work_is_done():
    with pytest.raises(RefitError, match="do not show what goes into each expert"):
        compress(make("qwen3"), batches(2), keep=0.8, refit=True, progress=False)
