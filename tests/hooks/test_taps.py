from __future__ import annotations

import dataclasses

import pytest
import torch
from layer_moments import full_moments
from tap_cases import assert_moments, brute_force, tapped
from tiny import Tokens, causal_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from fasc_lightning.batches import TokenRows
from fasc_lightning.dependence import pooled_rho
from fasc_lightning.hooks import Taps
from fasc_lightning.layers import layer_shapes, linear_weight, matches, select_layers
from fasc_lightning.statistics import CalibrationMoments
from fasc_lightning.statistics._layer_moments import NEEDS


@pytest.fixture
def llama():
    return causal_model("llama").double()


@pytest.fixture
def batch():
    data = Tokens(samples=4, padded=True)
    return {key: torch.stack([data[i][key] for i in range(4)]) for key in data[0]}


def test_moments_of_a_padded_batch_are_those_of_a_sum_of_token_losses(llama, batch):
    layers = select_layers(llama)
    terms = int((batch["labels"][:, 1:] != -100).sum())
    mask = batch["attention_mask"].bool()
    expected = brute_force(llama, layers, lambda: llama(**batch).loss * terms)
    taps, moments = tapped(layers)
    taps.install()
    taps.begin_batch(TokenRows(mask=mask, scale=terms))
    llama(**batch).loss.backward()
    taps.end_batch()
    keep = mask.flatten()
    for name in layers:
        x, h = expected[name]
        # The model itself computes norms and the loss in float32, at another scale here.
        assert_moments(moments, name, x[keep], h[keep], rtol=1e-5)


def test_cross_moments_and_the_pooled_score(llama, batch):
    """C and rho against the paper's definition on recorded pairs."""
    layers = select_layers(llama)
    expected = brute_force(llama, layers, lambda: llama(**batch).loss)
    moments = CalibrationMoments(layer_shapes(layers), torch.float64, needs={"C"})
    taps = Taps(layers, moments)
    taps.install()
    taps.begin_batch(TokenRows())
    llama(**batch).loss.backward()
    taps.end_batch()
    for name, module in layers.items():
        x, h = expected[name]
        found = moments.layer(name)
        torch.testing.assert_close(found.C, x.T @ h / len(x), rtol=1e-6, atol=1e-12)
        W = module.weight.detach()
        x, g = x - x.mean(0), (h - h.mean(0)) @ W
        norm = torch.linalg.matrix_norm
        rho = norm(x.T @ g) / (norm(x.T @ x) * norm(g.T @ g)).sqrt()
        torch.testing.assert_close(pooled_rho(found, W), rho, rtol=1e-5, atol=0)
    with pytest.raises(ValueError, match="was not gathered"):
        pooled_rho(dataclasses.replace(found, C=None), W)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_statistics_of_pairs_and_sequences_are_those_of_autograd(batch, family):
    """Padded sequences of several lengths: weight gradients of one sequence at a time, tokens from recorded pairs."""
    model = causal_model(family).double().eval()
    layers = select_layers(model)
    predicted = (batch["labels"][:, 1:] != -100).sum(1)
    mask = batch["attention_mask"].bool()
    lengths = mask.sum(1).tolist()
    squares = dict.fromkeys(layers, 0.0)
    grams = {name: [0.0, 0.0] for name in layers}
    for i in range(len(lengths)):
        (model(**{key: value[i : i + 1] for key, value in batch.items()}).loss * predicted[i]).backward()
        for name, module in layers.items():
            G = gradient_of_weight(module)
            squares[name] += (G**2).sum(1) / len(lengths)
            for side, product in enumerate((G.T @ G, G @ G.T)):
                grams[name][side] += product / len(lengths)
        model.zero_grad()
    terms = int(predicted.sum())
    pairs = brute_force(model, layers, lambda: model(**batch).loss * terms)

    moments = CalibrationMoments(layer_shapes(layers), torch.float64, needs=NEEDS)
    taps = Taps(layers, moments)
    taps.install()
    taps.begin_batch(TokenRows(mask=mask, scale=terms))
    model(**batch).loss.backward()
    taps.end_batch()
    for name, module in layers.items():
        found, (x, h) = moments.layer(name), pairs[name]
        x, h = x[mask.flatten()], h[mask.flatten()]
        by_hand = full_moments(x, h, linear_weight(module).detach(), lengths)
        for field in ("C", "abs_x", "saliency"):
            assert_near(getattr(found, field), getattr(by_hand, field))
        for found_side, by_hand_side in zip(found.coupled, by_hand.coupled, strict=True):
            assert_near(found_side, by_hand_side)
        assert_near(found.fisher_rows, squares[name])
        for side in (0, 1):
            S = grams[name][side]
            assert_near(found.kronecker[side], S * (squares[name].sum().sqrt() / S.trace()))


def gradient_of_weight(module):
    """dL/dW as (m, n)."""
    gradient = module.weight.grad.double()
    return gradient if isinstance(module, nn.Linear) else gradient.T


def assert_near(found, expected, rtol=1e-5):
    # Norms and the loss are computed in float32 by the model itself.
    torch.testing.assert_close(found, expected, rtol=rtol, atol=rtol * expected.abs().max().item())


@pytest.mark.parametrize("needs", [["C"], ["abs_x"], NEEDS])
def test_inputs_are_shared_whatever_is_needed(llama, batch, needs):
    layers = select_layers(llama)
    moments = CalibrationMoments(layer_shapes(layers), torch.float64, needs=needs)
    taps = Taps(layers, moments)
    taps.install()
    taps.begin_batch(TokenRows())
    llama(**batch).loss.backward()
    taps.end_batch()
    assert len(moments.inputs) == 8


def test_a_share_of_the_tokens_makes_sequences_of_those_tokens(llama, batch):
    """Nothing is scaled: G_i is the sum over the tokens that were kept."""
    layers = select_layers(llama)
    mask = batch["attention_mask"].bool()
    rows = TokenRows(mask=mask, fraction=0.5, sample_seeds=[3, 1, 4, 1])
    pairs = brute_force(llama, layers, lambda: llama(**batch).loss)
    moments = CalibrationMoments(layer_shapes(layers), torch.float64, needs=["fisher_rows"])
    taps = Taps(layers, moments)
    taps.install()
    taps.begin_batch(rows)
    llama(**batch).loss.backward()
    taps.end_batch()
    name = next(iter(layers))
    x, h = pairs[name]
    index, lengths = rows.index(tuple(mask.shape), x.device), rows.lengths(tuple(mask.shape))
    assert sum(lengths) < mask.sum()
    expected = full_moments(x[index], h[index], linear_weight(layers[name]).detach(), lengths)
    assert_near(moments.layer(name).fisher_rows, expected.fisher_rows)


def test_layers_that_share_an_input_share_one_matrix(llama, batch):
    layers = select_layers(llama)
    taps, moments = tapped(layers)
    taps.install()
    taps.begin_batch(TokenRows())
    llama(**batch).loss.backward()
    taps.end_batch()
    kinds = sorted({tuple(name.rsplit(".", 1)[-1] for name in key) for key in moments.inputs})
    assert kinds == [("down_proj",), ("gate_proj", "up_proj"), ("k_proj", "q_proj", "v_proj"), ("o_proj",)]
    assert len(moments.inputs) == 8


def test_frozen_parameters_need_no_gradient_and_get_none(llama, batch):
    layers = select_layers(llama)
    expected = brute_force(llama, layers, lambda: llama(**batch).loss)
    llama.requires_grad_(False)
    taps, moments = tapped(layers)
    taps.install()
    taps.begin_batch(TokenRows())
    llama(**batch).loss.backward()
    taps.end_batch()
    for name in layers:
        assert_moments(moments, name, *expected[name])
    assert all(p.grad is None for p in llama.parameters())


def test_taps_do_not_change_outputs_or_gradients(llama, batch):
    llama(**batch).loss.backward()
    before = [p.grad.clone() for p in llama.parameters()]
    logits = llama(**batch).logits
    llama.zero_grad()
    taps, _ = tapped(select_layers(llama))
    taps.install()
    taps.begin_batch(TokenRows())
    output = llama(**batch)
    output.loss.backward()
    taps.end_batch()
    assert torch.equal(output.logits, logits)
    for p, grad in zip(llama.parameters(), before, strict=True):
        assert torch.equal(p.grad, grad)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_counts_each_token_once(llama, batch, reentrant):
    layers = select_layers(llama)
    expected = brute_force(llama, layers, lambda: llama(**batch).loss)
    llama.train()
    llama.activation_checkpointing_enable({"use_reentrant": reentrant})
    llama.enable_input_require_grads()  # reentrant checkpoints need an input with a gradient
    taps, moments = tapped(layers)
    taps.install()
    taps.begin_batch(TokenRows())
    llama(**batch, use_cache=False).loss.backward()
    taps.end_batch()
    for name in layers:
        assert_moments(moments, name, *expected[name])


def test_plain_checkpoint_of_a_shared_input():
    """q and k read one tensor inside a checkpoint; the recomputation makes another tensor of it."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x):
            x = x.tanh()
            return self.q(x) * self.k(x)

    block = Block().double()
    x = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    layers = select_layers(block)
    expected = brute_force(block, layers, lambda: block(x).sum())
    for reentrant in (False, True):
        taps, moments = tapped(layers)
        taps.install()
        taps.begin_batch(TokenRows())
        checkpoint(block, x, use_reentrant=reentrant).sum().backward()
        taps.end_batch()
        taps.remove()
        assert list(moments.inputs) == [("k", "q")]
        for name in layers:
            assert_moments(moments, name, *expected[name])


def test_checkpointing_does_not_pin_what_it_recomputes(llama, batch):
    llama.train()
    llama.activation_checkpointing_enable({"use_reentrant": False})
    taps, _ = tapped(select_layers(llama))
    taps.install()
    taps.begin_batch(TokenRows())
    llama(**batch, use_cache=False).loss.backward()
    assert taps._by_input
    assert not any(call.rows is not None for call in taps._by_input.values())
    taps.end_batch()


def test_layers_that_only_look_linear_are_left_alone():
    class Tripled(nn.Linear):
        def forward(self, x):
            return 3 * super().forward(x)

    model = nn.ModuleDict({"plain": nn.Linear(3, 3), "tripled": Tripled(3, 3)})
    assert list(select_layers(model)) == ["plain"]


def test_bf16_autocast_accumulates_in_float32(batch):
    model = causal_model("llama")
    layers = select_layers(model)
    taps, moments = tapped(layers, torch.float32)
    taps.install()
    taps.begin_batch(TokenRows())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(**batch).loss.backward()
    taps.end_batch()
    reference = brute_force(model, layers, lambda: model(**batch).loss)
    for name in layers:
        A, G = moments.layer(name).A, moments.layer(name).G
        assert A.dtype == G.dtype == torch.float32
        x, h = reference[name]
        # bf16 activations are 3 digits; the accumulation must add nothing to that.
        assert (A - x.T @ x / len(x)).norm() < 0.03 * (x.T @ x / len(x)).norm()
        assert (G - h.T @ h / len(h)).norm() < 0.06 * (h.T @ h / len(h)).norm()


def test_a_layer_called_twice_counts_both_calls():
    layer = nn.Linear(3, 3).double()
    model = nn.ModuleDict({"layer": layer})
    x = torch.randn(5, 3, dtype=torch.float64)

    def loss():
        return (layer(layer(x).tanh()) ** 2).sum() + layer(x).sum()

    expected = brute_force(model, {"layer": layer}, loss)
    taps, moments = tapped({"layer": layer})
    taps.install()
    taps.begin_batch(TokenRows())
    loss().backward()
    taps.end_batch()
    assert_moments(moments, "layer", *expected["layer"])
    assert moments.tokens("layer") == 15


def test_members_of_a_shared_input_that_no_gradient_reaches_do_not_count_it():
    model = nn.ModuleDict({"a": nn.Linear(3, 2), "b": nn.Linear(3, 2)}).double()
    taps, moments = tapped(dict(model.items()))
    taps.install()
    x, y = torch.randn(5, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    taps.begin_batch(TokenRows())
    (model["a"](x).sum() + model["b"](x).detach().sum()).backward()
    taps.end_batch()
    taps.begin_batch(TokenRows())
    (model["a"](y) * model["b"](y)).sum().backward()
    taps.end_batch()
    assert moments.tokens("a") == 9
    assert moments.tokens("b") == 4
    both = torch.cat([x, y])
    torch.testing.assert_close(moments.layer("a").A, both.T @ both / 9)
    torch.testing.assert_close(moments.layer("b").A, y.T @ y / 4)


def test_other_forwards_pass_untouched():
    layer = nn.Linear(3, 2)
    taps, moments = tapped({"layer": layer}, torch.float32)
    taps.install()
    x = torch.randn(4, 3)
    layer(x).sum().backward()  # outside of a batch
    taps.begin_batch(TokenRows())
    with torch.no_grad():
        layer(x)
    with torch.inference_mode():
        layer(x)
    layer(x)  # never reached by a backward pass
    taps.end_batch()
    assert moments.tokens("layer") == 0
    assert not any(m.count for m in moments.inputs.values())


def test_a_second_backward_pass_does_not_count_again():
    layer = nn.Linear(3, 2)
    taps, moments = tapped({"layer": layer}, torch.float32)
    taps.install()
    taps.begin_batch(TokenRows())
    loss = layer(torch.randn(4, 3)).sum()
    loss.backward(retain_graph=True)
    loss.backward()
    taps.end_batch()
    assert moments.tokens("layer") == 4


def test_inplace_activation_after_a_frozen_layer():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Linear(4, 2)).double()
    x = torch.randn(6, 3, dtype=torch.float64)
    expected = brute_force(model, select_layers(model, ["2"]), lambda: (model[2](torch.relu(model[0](x))) ** 2).sum())
    model.requires_grad_(False)
    taps, moments = tapped(select_layers(model))
    taps.install()
    taps.begin_batch(TokenRows())
    (model(x) ** 2).sum().backward()
    taps.end_batch()
    assert_moments(moments, "2", *expected["2"])
    assert moments.tokens("0") == 6


def test_an_input_modified_in_place_is_refused():
    layer = nn.Linear(3, 3).requires_grad_(False)
    taps, _ = tapped({"layer": layer}, torch.float32)
    taps.install()
    taps.begin_batch(TokenRows())
    x = torch.randn(4, 3)
    y = layer(x)
    x += 1
    with pytest.raises(RuntimeError, match="'layer' was modified in place"):
        y.sum().backward()


def test_non_finite_values_are_refused_by_name():
    layer = nn.Linear(3, 2)
    taps, moments = tapped({"layer": layer}, torch.float32)
    taps.install()
    taps.begin_batch(TokenRows(label="batch 7"))
    y = layer(torch.randn(4, 3))
    with pytest.raises(FloatingPointError, match=r"a gradient of layer 'layer' is NaN or Inf in batch 7"):
        (y * torch.tensor(float("inf"))).sum().backward()
    taps.begin_batch(TokenRows(label="batch 8"))
    y = layer(torch.tensor([[1.0, float("nan"), 0.0]]))
    with pytest.raises(FloatingPointError, match=r"an activation of layer 'layer'"):
        y.nan_to_num().sum().backward()
    assert moments.tokens("layer") == 0


def test_on_an_accelerator_non_finite_values_are_refused_by_name_at_the_end_of_the_batch():
    layers = {name: nn.Linear(3, 3) for name in ("first", "second")}
    taps, moments = tapped(layers, torch.float32)
    moments.refuses_at_once = False
    taps.install()
    for broken in ("gradient", "activation"):
        taps.begin_batch(TokenRows(label="batch 7"))
        y = layers["first"](torch.randn(4, 3))
        if broken == "gradient":
            (layers["second"](y).sum() + (y * float("inf")).sum()).backward()
        else:
            layers["second"](y * float("nan")).nan_to_num().sum().backward()
        with pytest.raises(FloatingPointError, match=rf"{broken} of layer '\w+' is NaN or Inf in batch 7"):
            taps.end_batch()
    taps.begin_batch(TokenRows(label="batch 8"))  # nothing is left of the batches before
    layers["first"](torch.randn(4, 3)).sum().backward()
    taps.end_batch()


class HostReads(TorchDispatchMode):
    """Counts the reads of a scalar by the host, each of which waits for an accelerator."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("needs", ["coupled", "plain"])
def test_a_batch_reads_one_scalar_whatever_the_number_of_layers(batch, needs):
    counts = []
    for targets in (["q_proj"], None):
        model = causal_model("llama")
        layers = select_layers(model, targets)
        moments = CalibrationMoments(layer_shapes(layers), needs={needs}, output_share=0.5)
        moments.refuses_at_once = False
        taps = Taps(layers, moments)
        taps.install()
        with HostReads() as reads:
            taps.begin_batch(TokenRows(mask=batch["attention_mask"].bool()))
            loss = model(**batch).loss
            before = reads.count
            loss.backward()
            taps.end_batch()
        counts.append(reads.count - before)
        taps.remove()
    assert counts == [1, 1]


def test_removing_leaves_no_hook():
    model = causal_model("llama")
    taps, _ = tapped(select_layers(model), torch.float32)
    taps.install()
    taps.install()
    taps.remove()
    taps.remove()
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in model.modules())


# Selection.


def test_default_selection_leaves_the_output_embedding_alone():
    for family in ("llama", "gpt2"):
        names = select_layers(causal_model(family))
        assert names
        assert not any("lm_head" in name for name in names)
    assert len(select_layers(causal_model("llama"))) == 14
    assert len(select_layers(causal_model("gpt2"))) == 8


def test_named_layers_are_taken_even_if_tied():
    model = causal_model("llama", tie_word_embeddings=True)
    assert list(select_layers(model, ["lm_head"])) == ["lm_head"]


def test_tied_linear_layers_are_left_alone():
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3), "c": nn.Linear(3, 3)})
    model["b"].weight = model["a"].weight
    assert list(select_layers(model)) == ["c"]


def test_patterns_follow_peft():
    assert matches("model.layers.0.q_proj", ["q_proj"])
    assert not matches("model.layers.0.xq_proj", ["q_proj"])
    assert matches("model.layers.0.q_proj", r".*\.0\..*")
    assert not matches("model.layers.0.q_proj", "q_proj")
    model = causal_model("llama")
    assert len(select_layers(model, ["q_proj", "k_proj"])) == 4
    assert len(select_layers(model, r".*mlp.*", exclude=["down_proj"])) == 4
    assert len(select_layers(model, "all-linear", exclude=r".*layers\.0\..*")) == 7


def test_targets_that_match_nothing_say_what_there_is():
    with pytest.raises(ValueError, match=r"matches none of the 15 .*model\.layers\.0\.self_attn\.q_proj"):
        select_layers(causal_model("llama"), ["query"])
