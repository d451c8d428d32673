from __future__ import annotations

import copy
import sys

import pytest
import torch
import torch_pruning as tp
import transformers
from tiny import Tokens, causal_model

from fasc_lightning import compress
from fasc_lightning.layers import select_layers
from fasc_lightning.studies.pruning import _llm_pruner as llm_pruner
from fasc_lightning.studies.pruning import kept_ends, prune_llm
from fasc_lightning.studies.pruning._llm_pruner import plan_units

HEAD = 8
PRUNABLE = ["llama", "mistral", "qwen2", "gemma2", "gpt2"]


def batches(count=2, padded=False):
    data = Tokens(samples=2 * count, length=12, padded=padded)
    keys = ("input_ids", "attention_mask") if padded else ("input_ids",)
    return [{key: torch.stack([data[i][key] for i in (2 * b, 2 * b + 1)]) for key in keys} for b in range(count)]


def logits(model, ids=None):
    with torch.no_grad():
        return model.eval()(batches()[0]["input_ids"] if ids is None else ids).logits


def state(model):
    flags = [p.requires_grad for p in model.parameters()]
    modes = [m.training for m in model.modules()]
    sizes = [(m.in_features, m.out_features) for m in model.modules() if isinstance(m, torch.nn.Linear)]
    return flags, modes, sizes, model.config.to_dict(), {n: v.clone() for n, v in model.state_dict().items()}


def assert_same(model, before):
    after = state(model)
    assert after[:4] == before[:4]
    assert after[4].keys() == before[4].keys()
    assert all(torch.equal(after[4][name], value) for name, value in before[4].items())


def scored(model, data):
    """|w dL/dw| of each weight by name, from plain backward passes in which nothing of the package takes part."""
    model = copy.deepcopy(model).eval().requires_grad_(True)
    for batch in data:
        ids = batch["input_ids"]
        log_prob = model(ids).logits[:, :-1].log_softmax(-1)
        (-log_prob.gather(2, ids[:, 1:, None]).sum()).backward()
    return {name: (p * p.grad).abs().detach() for name, p in model.named_parameters() if p.grad is not None}


def kept_rows(dense, pruned):
    """Which rows of a dense weight are left, in order."""
    return [int((dense == row).all(1).nonzero()) for row in pruned]


@pytest.mark.parametrize("family", PRUNABLE)
@pytest.mark.parametrize("keep", [0.8, 0.4])
def test_the_budget_is_met_and_the_model_runs(family, keep):
    model = causal_model(family)
    result = prune_llm(model, batches(), keep)
    held = sum(layer.weight.numel() for layer in select_layers(model).values())
    assert result.parameters_after == held <= keep * result.parameters_before
    assert result.kept > keep - 0.03  # of 48 channels and 2 or 4 heads
    assert result.method == "llm-pruner"
    assert result.passes == 1
    assert result.tokens == 2 * 2 * 11
    ids = torch.tensor([[5, 6, 7]])
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    cached = model.eval().generate(ids, attention_mask=torch.ones_like(ids), use_cache=True, **options)
    plain = model.generate(ids, attention_mask=torch.ones_like(ids), use_cache=False, **options)
    assert torch.equal(cached, plain)


def test_channels_are_ranked_by_a_taylor_score_summed_by_hand():
    model = causal_model(dtype=torch.float32).double()
    dense = copy.deepcopy(model)
    product = scored(dense, batches())
    result = prune_llm(model, batches(), 0.6)
    for i in range(2):
        mlp = f"model.layers.{i}.mlp"
        score = product[f"{mlp}.gate_proj.weight"].sum(1) + product[f"{mlp}.up_proj.weight"].sum(1)
        score += product[f"{mlp}.down_proj.weight"].sum(0)
        best = sorted(score.topk(result.channels[1]).indices.tolist())
        for part in ("gate_proj", "up_proj"):
            pair = (m.get_submodule(f"{mlp}.{part}").weight for m in (dense, model))
            assert kept_rows(*pair) == best
        assert kept_rows(*(m.get_submodule(f"{mlp}.down_proj").weight.T for m in (dense, model))) == best


def test_grouped_query_heads_are_ranked_and_cut_in_whole_groups():
    model = causal_model().double()
    dense = copy.deepcopy(model)
    product = scored(dense, batches())
    result = prune_llm(model, batches(), 0.5)
    assert result.head_groups == (2, 1)
    for i in range(2):
        name = f"model.layers.{i}.self_attn"
        parts = [product[f"{name}.{part}_proj.weight"].sum(1) for part in "qkv"]
        parts.append(product[f"{name}.o_proj.weight"].sum(0))
        best = int(sum(part.view(2, -1).sum(1) for part in parts).argmax())
        for part, width in (("q", 2 * HEAD), ("k", HEAD), ("v", HEAD)):
            pair = (m.get_submodule(f"{name}.{part}_proj").weight for m in (dense, model))
            assert kept_rows(*pair) == list(range(best * width, (best + 1) * width))


def test_the_score_is_that_of_torch_pruning_on_its_own_graph():
    from fasc_lightning.studies.pruning._coupling import mlp_group, unit_scores

    mlp = causal_model().model.layers[0].mlp
    linear = {name: module for name, module in mlp.named_children() if isinstance(module, torch.nn.Linear)}
    group = mlp_group(0, "mlp", mlp, linear)
    mlp(torch.randn(1, 6, 32)).square().sum().backward()
    products = {f"mlp.{name}": (layer.weight * layer.weight.grad).abs().detach() for name, layer in linear.items()}
    graph = tp.DependencyGraph().build_dependency(mlp, torch.zeros(1, 2, 32))
    theirs = tp.importance.GroupTaylorImportance(group_reduction="sum", normalizer=None)(
        graph.get_pruning_group(mlp.up_proj, tp.prune_linear_out_channels, list(range(48)))
    )
    torch.testing.assert_close(unit_scores(group, products).float(), theirs)


@pytest.mark.parametrize("family", PRUNABLE)
def test_the_pruned_model_is_the_dense_one_with_the_same_units_at_zero(family):
    model = causal_model(family).double()
    dense = copy.deepcopy(model)
    prune_llm(model, batches(), 0.5)
    dense_layers, pruned_layers = select_layers(dense), select_layers(model)
    for name, layer in dense_layers.items():
        # What writes to the residual stream: its inputs are the heads and channels.
        if not name.endswith(("o_proj", "down_proj", "c_proj")):
            continue
        columns, left = (
            x.weight if isinstance(x, transformers.pytorch_utils.Conv1D) else x.weight.T
            for x in (layer, pruned_layers[name])
        )
        gone = torch.tensor([i not in kept_rows(columns, left) for i in range(len(columns))])
        assert 0 < gone.sum() < len(gone)
        with torch.no_grad():
            columns[gone] = 0
    torch.testing.assert_close(logits(model), logits(dense))


@pytest.mark.parametrize(("family", "keep"), [("llama", 0.5), ("qwen2", 0.7), ("gpt2", 0.95)])
def test_a_configuration_that_can_say_the_new_sizes_lets_the_model_be_reloaded(family, keep, tmp_path):
    model = causal_model(family)
    result = prune_llm(model, batches(), keep)
    assert result.config_adjusted
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    torch.testing.assert_close(logits(again), logits(model))


def test_a_configuration_that_cannot_say_them_is_left_alone():
    model = causal_model("gpt2")
    before = model.config.to_dict()
    result = prune_llm(model, batches(), 0.5)
    assert result.head_groups[1] < result.head_groups[0]
    assert not result.config_adjusted
    assert model.config.to_dict() == before


def test_the_ends_can_be_left_alone_and_count_in_the_budget():
    model = causal_model(num_hidden_layers=4)
    dense = copy.deepcopy(model)
    result = prune_llm(model, batches(), 0.7, keep_first=1, keep_last=1)
    assert result.blocks == (1, 2)
    assert result.kept <= 0.7
    assert not result.config_adjusted
    for i in (0, 3):
        for p, q in zip(model.model.layers[i].parameters(), dense.model.layers[i].parameters(), strict=True):
            assert torch.equal(p, q)
    with pytest.raises(ValueError, match=r"keep=0\.4 is less than 0\.606"):
        prune_llm(dense, batches(), 0.4, keep_first=1, keep_last=1)
    with pytest.raises(ValueError, match="4 blocks"):
        prune_llm(dense, batches(), 0.4, keep_first=4)


def test_the_ends_scale_with_the_depth():
    assert [kept_ends(depth) for depth in (32, 30, 12, 2)] == [(4, 2), (4, 2), (2, 1), (0, 0)]


def test_rounded_heads_leave_the_rest_of_the_budget_to_the_channels():
    kept = plan_units([("heads", 3, 100), ("channels", 1000, 1)], 1300, 0.75)
    assert kept == [2, 775]  # 0.775 of three heads are two; all of the budget of 975 is used
    assert plan_units([("heads", 3, 100), ("channels", 1000, 1)], 1300, 1.0) == [3, 1000]


def test_only_whole_targeted_modules_are_cut():
    model = causal_model()
    dense = copy.deepcopy(model)
    result = prune_llm(model, batches(), 0.5, exclude=r".*self_attn.*")
    assert result.head_groups == (0, 0)
    assert result.channels == (48, 24)
    assert model.config.intermediate_size == 24
    with pytest.raises(ValueError, match="can only be cut with"):
        prune_llm(dense, batches(), 0.5, targets=["up_proj", "q_proj"])


@pytest.mark.parametrize("family", ["opt", "gpt_neox"])
def test_a_family_of_another_form_is_refused_by_name(family):
    model = causal_model(family)
    before = state(model)
    with pytest.raises(ValueError, match=f"family '{family}'"):
        prune_llm(model, batches(), 0.5)
    assert_same(model, before)


def test_a_compressed_model_is_refused():
    model = causal_model()
    compress(model, batches(8), keep=0.6, targets=r".*layers\.0\.mlp.*", progress=False)
    with pytest.raises(ValueError, match="low-rank"):
        prune_llm(model, batches(), 0.5)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_a_failure_after_the_cut_leaves_the_model_as_it_was(family, monkeypatch):
    model = causal_model(family).train()
    next(model.parameters()).requires_grad_(False)
    before, parameters = state(model), list(model.parameters())
    seen = []

    def fail(model, example):
        seen.append(sum(layer.weight.numel() for layer in select_layers(model).values()))
        raise RuntimeError("on purpose")

    monkeypatch.setattr(llm_pruner, "_check_usable", fail)
    total = sum(layer.weight.numel() for layer in select_layers(model).values())
    with pytest.raises(RuntimeError, match="on purpose"):
        prune_llm(model, batches(), 0.5)
    assert seen[0] <= total / 2  # it had been cut
    assert_same(model, before)
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))


def test_a_gradient_that_is_not_finite_is_refused_and_nothing_changes():
    model = causal_model()
    with torch.no_grad():
        model.lm_head.weight[3] = float("inf")
    before = state(model)
    with pytest.raises(FloatingPointError, match="batch 0"):
        prune_llm(model, batches(), 0.5)
    assert_same(model, before)


def test_modes_flags_and_other_gradients_stay():
    model = causal_model().train()
    model.model.layers[0].mlp.requires_grad_(False)
    model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    prune_llm(model, batches(padded=True), 0.6)
    assert model.training
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {"lm_head.weight"}


def test_no_data_is_refused():
    with pytest.raises(ValueError, match="at least one batch"):
        prune_llm(causal_model(), [], 0.5)


def test_a_missing_package_is_named_with_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    monkeypatch.delitem(sys.modules, "fasc_lightning.studies.pruning._coupling", raising=False)
    monkeypatch.delattr("fasc_lightning.studies.pruning._coupling", raising=False)
    with pytest.raises(ModuleNotFoundError, match=r"fasc-lightning\[eval\]"):
        prune_llm(causal_model(), batches(), 0.5)
